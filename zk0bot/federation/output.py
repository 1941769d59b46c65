"""The output tree of one run, on disk after every round; keys as zk0 users know them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zk0bot.config.models import RunConfig
from zk0bot.federation.member import slug_of
from zk0bot.federation.view import AcceptedUpdate, View
from zk0bot.files import write_json
from zk0bot.records import CHECKPOINT, now, round_of
from zk0bot.report.chart import draw_policy_loss, draw_round_metrics
from zk0bot.report.history import RoundMetrics, to_policy_loss_history
from zk0bot.report.interval import build_rate
from zk0bot.training.protocol import SectorResult


@dataclass
class OutputTree:
    """Writes below ``root``; holds the histories that each file repeats in full."""

    root: Path
    losses: dict[int, float] = field(default_factory=dict)
    """Held-out loss by evaluated round."""
    metrics: list[RoundMetrics] = field(default_factory=list)

    def write_config(self, config: RunConfig) -> None:
        """``config.json``: every setting, resolved."""
        write_json(self.root / "config.json", config)

    def restore(self, metrics: Sequence[RoundMetrics]) -> None:
        """Go on after the rounds of ``metrics``."""
        self.metrics = list(metrics)

    def note(self, client: str, line: str) -> None:
        """Add a line to ``clients/<slug>/client.log``: the server's view of that client."""
        path = self.root / "clients" / slug_of(client) / "client.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as log:
            log.write(f"{now():%Y-%m-%d %H:%M:%S} {line}\n")

    def write_round(
        self, round_: int, accepted: list[AcceptedUpdate], global_update_norm: float
    ) -> None:
        """``clients/<slug>/round_N.json`` and ``federated_metrics.json``."""
        for update in accepted:
            path = self.root / "clients" / update.member.slug / f"round_{round_}.json"
            write_json(path, _client_entry(round_, update))
        self.metrics.append(
            RoundMetrics(
                round=round_,
                num_clients=len(accepted),
                avg_policy_loss=float(np.mean([u.result.policy_loss for u in accepted])),
                avg_client_loss=float(np.mean([u.result.loss for u in accepted])),
                param_update_norm=global_update_norm,
            )
        )
        metrics = [entry.model_dump() for entry in self.metrics]
        write_json(self.root / "server" / "federated_metrics.json", metrics)

    def write_evaluation(self, round_: int, loss: float, view: View) -> None:
        """``round_N_server_eval.json``, ``policy_loss_history.json``."""
        self.losses[round_] = loss
        server = self.root / "server"
        write_json(
            server / f"round_{round_}_server_eval.json",
            _evaluation_entry(round_, loss, view),
        )
        write_json(server / "policy_loss_history.json", to_policy_loss_history(self.losses))

    def draw_charts(self) -> None:
        """``federated_metrics.png`` and ``eval_policy_loss_chart.png`` from what is known now."""
        if self.metrics:
            draw_round_metrics(self.root / "server" / "federated_metrics.png", self.metrics)
        if self.losses:
            draw_policy_loss(self.root / "server" / "eval_policy_loss_chart.png", self.losses)

    def checkpoint_dir(self, round_: int) -> Path:
        return self.root / "models" / f"{CHECKPOINT}{round_}"

    def find_last(self) -> int:
        """The newest round that has a checkpoint; 0: none."""
        names = [path.name for path in (self.root / "models").glob(f"{CHECKPOINT}*")]
        return max(map(round_of, names), default=0)

    def name_checkpoint(self, name: str, round_: int) -> None:
        """Let ``models/<name>`` lead to the checkpoint of a round, in one step."""
        link = self.root / "models" / name
        temporary = link.with_name(f".{name}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(self.checkpoint_dir(round_).name)
        temporary.replace(link)

    def find_named(self, name: str) -> int:
        """The round of the checkpoint that ``models/<name>`` leads to; 0: none."""
        link = self.root / "models" / name
        if not link.is_symlink():
            return 0
        return round_of(link.readlink().name)

    def video_dir(self, round_: int) -> Path:
        return self.root / "evaluate" / f"round_{round_}"


def _client_entry(round_: int, update: AcceptedUpdate) -> dict[str, Any]:
    result = update.result
    return {
        "round": round_,
        "client_id": update.member.slug,
        "dataset_name": update.member.description.dataset_id,
        "loss": result.loss,
        "policy_loss": result.policy_loss,
        "fedprox_loss": result.fedprox_loss,
        "grad_norm": result.grad_norm,
        "num_steps": result.num_steps,
        "num_samples": result.num_samples,
        "param_update_norm": update.update_norm,
        "param_hash": result.param_hash,
        "train_s": result.train_s,
        "data_wait_s": result.data_wait_s,
        "heldout_loss": result.heldout_loss,
        "learning_rate": result.learning_rate,
        "mu": result.proximal_mu,
    }


def _evaluation_entry(round_: int, loss: float, view: View) -> dict[str, Any]:
    accepted, assessed = view.accepted, view.assessed
    datasets = assessed.datasets if assessed else []
    return {
        "round": round_,
        "server_composite_eval_loss": loss,
        "client_aggregated_training_metrics": {
            "avg_client_loss": _mean(update.result.loss for update in accepted),
            "std_client_loss": _std([update.result.loss for update in accepted]),
            "avg_client_proximal_loss": _mean(update.result.fedprox_loss for update in accepted),
            "avg_client_grad_norm": _mean(update.result.grad_norm for update in accepted),
            "num_clients": len(accepted),
            "param_update_norm": _mean(update.update_norm for update in accepted),
        },
        "individual_client_training_metrics": [
            _client_entry(round_, update) for update in accepted
        ],
        "client_heldout_eval_results": [
            {"client_id": slug_of(name), "loss": loss_there, "num_examples": num_examples}
            for name, (loss_there, num_examples) in sorted(view.by_client.items())
        ],
        "server_per_dataset_eval_results": [
            {
                "dataset_name": entry.dataset_name,
                "evaldata_id": entry.evaldata_id,
                "loss": entry.loss,
                "num_examples": entry.num_examples,
                "metrics": entry.model_dump(
                    include={"action_error", "action_error_by_step"}, exclude_defaults=True
                ),
            }
            for entry in datasets
        ],
        "num_server_eval_datasets": len(datasets),
        "closed_loop": _closed_loop(assessed.rollouts) if assessed else [],
    }


def _closed_loop(sectors: Sequence[SectorResult]) -> list[dict[str, Any]]:
    """Success by part of the table, then of all together, each with Wilson's 95 % interval."""
    if not sectors:
        return []
    whole = SectorResult(
        sector="all",
        successes=sum(entry.successes for entry in sectors),
        episodes=sum(entry.episodes for entry in sectors),
    )
    lines = []
    for entry in (*sectors, whole):
        rate = build_rate(entry.successes, entry.episodes)
        interval = {"success_rate": rate.value, "low": rate.low, "high": rate.high}
        lines.append({**entry.model_dump(), **interval})
    return lines


def _mean(values: Any) -> float | None:
    numbers = list(values)
    return float(np.mean(numbers)) if numbers else None


def _std(numbers: list[float]) -> float | None:
    return float(np.std(numbers)) if numbers else None
