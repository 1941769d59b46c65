"""The scripted expert: reach over the cube by inverse kinematics, smoothly, and stay."""

import numpy as np

from zk0bot.sim.arm import Arm, Array, solve_reach
from zk0bot.sim.env import So101TouchEnv

MOVE_STEPS = 15
STAY_STEPS = 5
EPISODE_STEPS = MOVE_STEPS + STAY_STEPS
ABOVE_M = 0.022
"""The tool centre's goal over the cube's centre: 2 mm over its top."""


def plan(arm: Arm) -> Array:
    """Absolute joint targets ``EPISODE_STEPS, 6`` from where the arm is to the cube."""
    start = arm.joints()
    goal = solve_reach(arm, arm.cube() + np.array([0.0, 0.0, ABOVE_M]), start).joints
    way = start + (goal - start) * minimum_jerk(MOVE_STEPS)[:, None]
    return np.concatenate([way, np.repeat(goal[None], STAY_STEPS, axis=0)])


def minimum_jerk(steps: int) -> Array:
    """Shares of the way after each of ``steps`` steps, the last 1.0, soft at both ends."""
    t = (np.arange(steps) + 1) / steps
    return 10 * t**3 - 15 * t**4 + 6 * t**5


def succeeds(env: So101TouchEnv, targets: Array) -> bool:
    """Whether following ``targets`` from the environment's present state succeeds."""
    return any(env.advance(target) for target in targets)
