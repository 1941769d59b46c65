"""The touch task as a gymnasium environment, in the shapes that LeRobot's tools expect."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike, NDArray

from zk0bot.sim.arm import FPS, HOME, JOINTS, Arm
from zk0bot.sim.renderer import Image, renderer_for
from zk0bot.sim.tasks import REACH_M, TASKS, Scene, Sector, get_sector, get_task

MAX_STEPS = 40
TOUCH_M = 0.045
"""Success: tool centre this near the cube's centre (its edge is 0.040) ..."""
HOLD_STEPS = 3
"""... for this many steps on end: an untrained net touches in passing nearly half the time."""
HOME_NOISE = np.array([8.0, 4.0, 4.0, 4.0, 4.0, 4.0])
YAW = 0.5
GYM_NAMESPACE = "zk0bot"
Observation = dict[str, Any]


class So101TouchEnv(gym.Env[Observation, NDArray[np.float32]]):
    """One arm, one cube; actions are absolute joint targets at 10 Hz.

    Observation: ``{"pixels": {camera: H,W,3 uint8}, "agent_pos": float32[6]}``.
    ``info["is_success"]`` after every step; success ends the episode.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  # gymnasium's own declaration
        "render_modes": ["rgb_array"],
        "render_fps": FPS,
    }

    def __init__(
        self,
        *,
        task: str = "touch-red",
        sector: str = "third",
        cameras: Sequence[str] = ("front",),
        image_size: int = 64,
        render_size: int = 256,
        render_mode: str = "rgb_array",
        max_steps: int = MAX_STEPS,
    ) -> None:
        self.cameras = tuple(cameras)
        self.render_mode = render_mode
        self._image_size = image_size
        self._render_size = render_size
        self._max_episode_steps = max_steps
        self._set_task(task, get_sector(sector, get_task(task)))
        picture = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Dict(dict.fromkeys(self.cameras, picture)),
                "agent_pos": gym.spaces.Box(-200, 200, (len(JOINTS),), np.float32),
            }
        )
        self.action_space = gym.spaces.Box(
            self.arm.low.astype(np.float32), self.arm.high.astype(np.float32)
        )
        self._steps = self._held = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """A new episode of the present task; all its chance comes from ``seed``."""
        super().reset(seed=seed)
        self._place()
        return self.observe(), self._info()

    def reset_to(self, scene: Scene) -> None:
        """Start ``scene``, drawing nothing: ``observe`` and ``picture`` do that when asked."""
        self._set_task(scene.task.name, scene.sector)
        super().reset(seed=scene.seed)
        self._place()

    def step(self, action: ArrayLike) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        is_done = self.advance(action)
        reward = float(self._held > 0)
        return self.observe(), reward, is_done, self._steps >= self._max_episode_steps, self._info()

    def advance(self, action: ArrayLike) -> bool:
        """One step without drawing; True once the touch has been held long enough."""
        self.arm.step(action)
        self._steps += 1
        self._held = self._held + 1 if self.distance_m() < TOUCH_M else 0
        return self._held >= HOLD_STEPS

    def observe(self) -> Observation:
        """What the policy gets to see now."""
        pixels = {name: self.picture(name) for name in self.cameras}
        return {"pixels": pixels, "agent_pos": self.arm.joints().astype(np.float32)}

    def picture(self, camera: str) -> Image:
        """The policy's picture from one camera."""
        return renderer_for(self.arm.model, self._image_size).render(self.arm.data, camera)

    def distance_m(self) -> float:
        """From the tool centre to the cube's centre."""
        return float(np.linalg.norm(self.arm.tool() - self.arm.cube()))

    def render(self) -> Image:
        """The picture for people."""
        return renderer_for(self.arm.model, self._render_size).render(self.arm.data, "front")

    def _set_task(self, task: str, sector: Sector) -> None:
        self.task = get_task(task)
        self.sector = sector
        self.task_description = self.task.instruction
        self.arm = Arm(self.task.rgb)

    def _place(self) -> None:
        """Cube uniform by area in the sector, arm near HOME."""
        chance = self.np_random
        joints = HOME + chance.uniform(-1, 1, len(JOINTS)) * HOME_NOISE
        reach = np.sqrt(chance.uniform(REACH_M[0] ** 2, REACH_M[1] ** 2))
        angle = chance.uniform(self.sector.low, self.sector.high)
        yaw = chance.uniform(-YAW, YAW)
        place = self.arm.shoulder_xy() + reach * np.array([np.cos(angle), np.sin(angle)])
        self.arm.reset(joints, place, yaw)
        self._steps = self._held = 0

    def _info(self) -> dict[str, Any]:
        return {"is_success": self._held >= HOLD_STEPS, "task": self.task_description}


for _task in TASKS:
    gym.register(
        f"{GYM_NAMESPACE}/{_task.name}",
        entry_point="zk0bot.sim.env:So101TouchEnv",
        kwargs={"task": _task.name},
    )
