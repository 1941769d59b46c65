"""The per-round files of a run's output tree, typed."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from zk0bot.errors import DataError
from zk0bot.files import read_json
from zk0bot.records import Record


class RoundMetrics(Record):
    """One entry of ``federated_metrics.json``."""

    round: int
    num_clients: int
    avg_policy_loss: float
    avg_client_loss: float
    param_update_norm: float


class PolicyLoss(Record):
    """One value of ``policy_loss_history.json``, whose keys are rounds."""

    server_policy_loss: float


def load_round_metrics(path: Path) -> list[RoundMetrics]:
    """The rounds in ``federated_metrics.json``, in order; DataError when it does not fit."""
    return sorted(_parse(path, TypeAdapter(list[RoundMetrics])), key=lambda entry: entry.round)


def load_policy_losses(path: Path) -> dict[int, float]:
    """Held-out loss by round from ``policy_loss_history.json``, in order; DataError likewise."""
    history = _parse(path, TypeAdapter(dict[int, PolicyLoss]))
    return {number: history[number].server_policy_loss for number in sorted(history)}


def to_policy_loss_history(losses: Mapping[int, float]) -> dict[str, dict[str, float]]:
    """The content of ``policy_loss_history.json``."""
    return {
        str(number): PolicyLoss(server_policy_loss=losses[number]).model_dump()
        for number in sorted(losses)
    }


def _parse[T](path: Path, adapter: TypeAdapter[T]) -> T:
    try:
        return adapter.validate_python(read_json(path))
    except ValidationError as error:
        raise DataError(f"{path} does not hold what its name says: {error}") from error
