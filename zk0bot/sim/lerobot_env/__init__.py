"""The simulated SO-101 as a LeRobot environment type; a package, as LeRobot's discovery demands.

    lerobot-eval --env.discover_packages_path=zk0bot.sim.lerobot_env --env.type=so101 \
        --env.task=touch-red --policy.path=FOLDER --eval.n_episodes=10 --eval.batch_size=1
"""

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

from zk0bot.sim.arm import FPS, JOINTS
from zk0bot.sim.env import GYM_NAMESPACE, MAX_STEPS


@EnvConfig.register_subclass("so101")
@dataclass
class So101EnvConfig(EnvConfig):  # type: ignore[misc]  # lerobot ships no types
    """Settings of ``So101TouchEnv``, as flags ``--env.*``."""

    task: str = "touch-red"
    """``touch-red``, ``touch-green`` or ``touch-blue``."""
    fps: int = FPS
    sector: str = "third"
    """Where the cube lies: ``third`` or ``wide`` of the task's owner, or a sector's name."""
    episode_length: int = MAX_STEPS
    image_size: int = 64
    render_size: int = 256
    """Side of the pictures in the videos."""
    cameras: list[str] = field(default_factory=lambda: ["front"])
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        joints = (len(JOINTS),)
        self.features = {
            "action": PolicyFeature(type=FeatureType.ACTION, shape=joints),
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=joints),
        }
        self.features_map = {"action": "action", "agent_pos": "observation.state"}
        for camera in self.cameras:
            shape = (self.image_size, self.image_size, 3)
            self.features[f"pixels/{camera}"] = PolicyFeature(FeatureType.VISUAL, shape)
            self.features_map[f"pixels/{camera}"] = f"observation.images.{camera}"

    @property
    def package_name(self) -> str:
        """The namespace of the gymnasium ids."""
        return GYM_NAMESPACE

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Arguments of ``So101TouchEnv`` beyond the task, which is in the id."""
        return {
            "sector": self.sector,
            "max_steps": self.episode_length,
            "image_size": self.image_size,
            "render_size": self.render_size,
            "cameras": tuple(self.cameras),
        }
