"""Texts drawn from a run's record."""

from typing import Any

from zk0bot.ops.state import format_bytes, format_duration, wrap_line
from zk0bot.records import ClientProgress, RunRecord


class RunView:
    """A run as the result of a command: its record, or the verdict in words."""

    def __init__(self, run: RunRecord) -> None:
        self._run = run

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        return self._run.model_dump(mode=mode)

    def to_text(self) -> str:
        run = self._run
        lines = [f"run {run.run_id}: {run.state}"]
        reasons = run.verdict.reasons if run.verdict else [run.reason] if run.reason else []
        lines += [wrap_line(reason, indent="  ") for reason in reasons]
        if run.verdict and run.verdict.final_loss is not None:
            lines.append(wrap_line(f"held-out loss {describe_losses(run)}", indent="  "))
        if run.success is not None:
            lines.append(f"  closed-loop success {run.success:.0%}")
        lines.append(f"  {describe_traffic(run)}")
        lines.append(f"  results in {run.output_dir}")
        return "\n".join(lines)


def describe_losses(run: RunRecord) -> str:
    """Held-out loss at the start and at the end, and the best round."""
    verdict = run.verdict
    if verdict is None or verdict.final_loss is None:
        return "not measured"
    first = "?" if verdict.initial_loss is None else f"{verdict.initial_loss:.4f}"
    best = "" if verdict.best_round is None else f", best in round {verdict.best_round}"
    return f"{first} before round 1, {verdict.final_loss:.4f} at the end{best}"


def describe_traffic(run: RunRecord) -> str:
    """Tensor bytes each way, as the clients see it."""
    return f"{format_bytes(run.bytes_up)} up, {format_bytes(run.bytes_down)} down"


def describe_round(run: RunRecord) -> str:
    """One line: the round under way, what happens, loss, traffic, time left."""
    parts = [f"round {run.round} of {run.num_rounds}", run.phase or run.state]
    if run.reason:
        parts.append(run.reason)
    if run.loss is not None:
        parts.append(f"held-out loss {run.loss:.4f}")
    if run.success is not None:
        parts.append(f"success {run.success:.0%}")
    parts.append(describe_traffic(run))
    if run.eta_s is not None:
        parts.append(f"{format_duration(run.eta_s)} left")
    return ", ".join(parts)


def describe_client(client: ClientProgress) -> str:
    """One line: what a client does in this round."""
    parts: list[str] = [client.phase]
    if client.phase == "training" and client.steps:
        parts.append(f"step {client.step} of {client.steps}")
    if client.loss is not None:
        parts.append(f"loss {client.loss:.4f}")
    if client.reason:
        parts.append(client.reason)
    return ", ".join(parts)


def list_changes(before: RunRecord | None, after: RunRecord) -> list[str]:
    """Plain texts for what changed: a new round or phase, a client's new phase.

    Each keeps to 80 columns and takes more than one line where it must.
    """
    lines = []
    if before is None or _heading(before) != _heading(after):
        lines.append(wrap_line(describe_round(after)))
    known = {client.node_id: client for client in before.clients} if before else {}
    is_new_round = before is None or before.round != after.round
    for client in after.clients:
        old = known.get(client.node_id)
        if is_new_round or old is None or old.phase != client.phase:
            lines.append(wrap_line(f"{client.name}: {describe_client(client)}", indent="  "))
    return lines


def _heading(run: RunRecord) -> tuple[object, ...]:
    return run.round, run.rounds_done, run.phase, run.state, run.reason
