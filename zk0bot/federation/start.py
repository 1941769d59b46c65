"""The weights that a run begins with: those of its model, or the best ones of another run."""

import contextlib
import logging
from dataclasses import dataclass, field, replace

from zk0bot.config.paths import Paths
from zk0bot.errors import DataError, RunError
from zk0bot.federation.codec import Shapes, TensorMap, Tensors, shapes_of
from zk0bot.federation.run_state import Saved, StateStore
from zk0bot.files import read_record
from zk0bot.records import RunRecord, round_of
from zk0bot.training.adapters.residual import NO_CHAIN

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Start:
    """What all nodes start from."""

    base_hash: str
    weights: TensorMap
    round: int = 0
    base_version: int = 0
    base_chain: str = NO_CHAIN
    base: Tensors = field(default_factory=dict)
    """How far the weights under the adapters have moved, dense."""

    @classmethod
    def of(cls, saved: Saved) -> "Start":
        """Where a run stood when it was saved."""
        return cls(
            base_hash=saved.state.base_hash,
            weights=saved.model,
            round=saved.state.round,
            base_version=saved.state.base_version,
            base_chain=saved.state.base_chain,
            base=saved.base,
        )


def find_start(paths: Paths, run_id: str, base_hash: str, shapes: Shapes) -> Start:
    """The best round of run ``run_id`` by held-out loss; its end where nobody measured.

    Raises RunError when it has no state, or trained another policy.
    """
    best = _find_best(paths, run_id)
    saved = StateStore(paths.run_state_dir(run_id)).load(best)
    if saved is None:
        raise RunError(
            f"run {run_id} has no saved state to start from",
            hint="those of the newest three completed runs are kept: zk0bot runs",
        )
    if saved.state.base_hash != base_hash or shapes_of(saved.model) != dict(shapes):
        raise RunError(
            f"run {run_id} trained another policy than this one",
            hint="use its model-name and policy settings, or start anew without start-from",
        )
    if best not in (None, saved.state.round):
        logger.warning("round %d of %s, its best, is not there any more", best, run_id)
    logger.info("starting from round %d of %s", saved.state.round, run_id)
    return replace(Start.of(saved), round=0)


def _find_best(paths: Paths, run_id: str) -> int | None:
    """The round whose checkpoint is the best; None while none is."""
    with contextlib.suppress(FileNotFoundError, DataError):
        return round_of(read_record(paths.run_record(run_id), RunRecord).best_checkpoint) or None
    return None
