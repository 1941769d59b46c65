"""Values that several federation tests start from."""

from zk0bot.training.protocol import FeatureStatistics, NodeDescription
from zk0bot.version import __version__

BASE_HASH = "b" * 64


def describe(
    name: str,
    *,
    frames: int = 100,
    base_hash: str = BASE_HASH,
    version: str = __version__,
    with_statistics: bool = True,
) -> NodeDescription:
    """A node that would be admitted, unless told otherwise."""
    moments = FeatureStatistics(
        count=frames or 1, mean=[0.0] * 6, std=[1.0] * 6, min=[-1.0] * 6, max=[1.0] * 6
    )
    statistics = {"observation.state": moments, "action": moments} if with_statistics else None
    return NodeDescription(
        dataset_id=f"{name}-0000-0000",
        num_episodes=5,
        num_train_frames=frames,
        num_heldout_frames=10,
        base_hash=base_hash,
        statistics=statistics,
        device="cpu",
        zk0bot_version=version,
    )
