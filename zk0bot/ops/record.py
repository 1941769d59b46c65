"""Run records on disk: reading them, and closing those that nobody will finish."""

import logging
from dataclasses import dataclass, field

from zk0bot.config.paths import Paths, audit_dir
from zk0bot.errors import UnknownNameError
from zk0bot.files import read_record, write_json
from zk0bot.ops.process import has_fork
from zk0bot.ops.specs import SUPEREXEC
from zk0bot.records import Record, RunRecord, RunState, Verdict, now
from zk0bot.trust.audit import AuditLog

logger = logging.getLogger(__name__)

_GRACE_S = 20.0
"""A run without a ServerApp for this long is given up; one takes a few seconds to start."""
_LOOK_S = 5.0
_ACTOR = "server"
"""Who closes runs, in the audit log."""


class RunList(Record):
    """All runs of this server, newest first."""

    runs: list[RunRecord]

    def to_text(self) -> str:
        if not self.runs:
            return "no runs yet; zk0bot run starts one"
        lines = [f"{'RUN':<20}  {'STATE':<23}  {'ROUNDS':>9}  {'LOSS':>7}  STARTED"]
        return "\n".join(lines + [_line(run) for run in self.runs])


def list_runs(paths: Paths) -> RunList:
    """All runs, newest first."""
    found = sorted(paths.runs_dir.glob("*/run.json"), reverse=True)
    return RunList(runs=[read_record(path, RunRecord) for path in found])


def find_last_run(paths: Paths) -> RunRecord | None:
    """The newest run; None before the first."""
    found = sorted(paths.runs_dir.glob("*/run.json"))
    return read_record(found[-1], RunRecord) if found else None


def get_run(paths: Paths, run_id: str) -> RunRecord:
    """One run. Raises UnknownNameError."""
    path = paths.run_record(run_id)
    if not path.is_file():
        known = [folder.name for folder in paths.runs_dir.glob("*")]
        raise UnknownNameError.of("run", run_id, known)
    return read_record(path, RunRecord)


def find_active_run(paths: Paths) -> RunRecord | None:
    """The run that is not final; None when there is none."""
    return next((run for run in list_runs(paths).runs if not run.is_final), None)


def save_run(paths: Paths, run: RunRecord) -> None:
    write_json(paths.run_record(run.run_id), run)


def close_run(paths: Paths, run_id: str, state: RunState, reason: str) -> RunRecord:
    """Make a run final that its ServerApp did not finish; one that is final stays as it is."""
    run = get_run(paths, run_id)
    if run.is_final:
        return run
    closed = run.model_copy(
        update={
            "state": state,
            "reason": reason,
            "phase": "",
            "eta_s": None,
            "updated_at": now(),
            "verdict": Verdict(state=state, reasons=[reason]),
        }
    )
    log = AuditLog(audit_dir(paths.server_dir))
    log.note("run-ended", _ACTOR, run=run_id, state=state, reason=reason)
    save_run(paths, closed)
    return closed


def close_active_runs(paths: Paths, state: RunState, reason: str) -> None:
    """Make every run final that is not."""
    for run in list_runs(paths).runs:
        if not run.is_final:
            close_run(paths, run.run_id, state, reason)


@dataclass
class OrphanWatch:
    """Marks runs as failed whose ServerApp process is gone."""

    paths: Paths
    _next_look: float = 0.0
    _alone_since: dict[str, float] = field(default_factory=dict)

    def look(self, at: float) -> None:
        """Called often; looks every few seconds. ``at`` is a monotonic time in seconds."""
        if at < self._next_look:
            return
        self._next_look = at + _LOOK_S
        run = find_active_run(self.paths)
        if run is None or has_fork(self.paths.server_dir, SUPEREXEC):
            self._alone_since.clear()
            return
        since = self._alone_since.setdefault(run.run_id, at)
        if at - since >= _GRACE_S:
            self._give_up(run.run_id)

    def _give_up(self, run_id: str) -> None:
        reason = "its ServerApp ended without a verdict; zk0bot server logs -p serverapp"
        try:
            close_run(self.paths, run_id, "failed", reason)
        except OSError as error:  # a full disk; the next look tries again
            logger.warning("cannot close run %s: %s", run_id, error)


def _line(run: RunRecord) -> str:
    rounds = f"{run.rounds_done}/{run.num_rounds}"
    started = run.started_at.strftime("%m-%d %H:%M")  # the year is in the id
    return f"{run.run_id:<20}  {run.state:<23}  {rounds:>9}  {_format_loss(run.loss):>7}  {started}"


def _format_loss(loss: float | None) -> str:
    if loss is None:
        return "-"
    return f"{loss:.4f}" if loss < 100 else f"{loss:.1e}"
