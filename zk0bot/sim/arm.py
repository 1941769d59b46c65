"""The simulated SO-101: model, joints, units, forward and inverse kinematics.

Outside this module a joint vector is in the units of a ``so101_follower``: five joints in degrees,
the gripper from 0 (closed) to 100 (open). MuJoCo's own radians stay in here.
"""

from dataclasses import dataclass
from functools import cache
from importlib import resources

import mujoco
import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Rgb = tuple[float, float, float]

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
MOTORS = tuple(f"{joint}.pos" for joint in JOINTS)
CAMERAS = ("front", "wrist")
HOME = np.array([0.0, -60.0, 60.0, 60.0, -90.0, 20.0])
"""Forearm level, gripper bent towards the table, fingers side by side."""
FPS = 10
GRIPPER = 5
REACHING = 4
"""The first joints, which move the tool centre in inverse kinematics."""


@cache
def load_model(cube_rgb: Rgb) -> mujoco.MjModel:
    """The compiled scene with a cube of this colour (parts 0 to 1). Shared: do not change it."""
    model = mujoco.MjModel.from_xml_string(
        resources.files(__package__).joinpath("so101.xml").read_text()
    )
    model.geom("cube").rgba[:3] = cube_rgb
    return model


class Arm:
    """One state of the scene: the arm, the table, one cube. Cheap: the model is shared."""

    def __init__(self, cube_rgb: Rgb) -> None:
        self.model = load_model(cube_rgb)
        self.data = mujoco.MjData(self.model)
        self._substeps = round(1 / FPS / self.model.opt.timestep)
        self._tool = self.model.site("tcp").id
        self._cube = self.model.joint("cube").qposadr[0]
        limits = self.model.jnt_range[: len(JOINTS)]
        self.low, self.high = from_radians(limits[:, 0]), from_radians(limits[:, 1])

    def reset(self, joints: ArrayLike, cube_xy: ArrayLike, yaw: float) -> None:
        """Place arm and cube at rest."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[: len(JOINTS)] = self.data.ctrl[:] = to_radians(joints)
        x, y = np.asarray(cube_xy, float)
        self.data.qpos[self._cube :][:7] = [x, y, 0.02, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        mujoco.mj_forward(self.model, self.data)

    def step(self, target: ArrayLike) -> None:
        """Move for 1/FPS seconds towards absolute joint targets, cut to the joints' limits."""
        goal = to_radians(np.clip(np.asarray(target, float), self.low, self.high))
        start = self.data.ctrl.copy()
        for share in (np.arange(self._substeps) + 1) / self._substeps:
            self.data.ctrl[:] = start + (goal - start) * share
            mujoco.mj_step(self.model, self.data)
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    def joints(self) -> Array:
        """Where the joints are now."""
        return from_radians(self.data.qpos[: len(JOINTS)])

    def tool(self) -> Array:
        """The tool centre between the fingertips, metres."""
        return np.array(self.data.site_xpos[self._tool])

    def cube(self) -> Array:
        """The cube's centre, metres."""
        return np.array(self.data.qpos[self._cube :][:3])

    def shoulder_xy(self) -> Array:
        """Where the shoulder's pan axis meets the table, metres."""
        return np.array(self.model.body("shoulder").pos[:2])


@dataclass(frozen=True, kw_only=True)
class Reach:
    """An answer of inverse kinematics and how far its tool centre stays from the goal."""

    joints: Array
    error_m: float


def to_radians(joints: ArrayLike) -> Array:
    """MuJoCo joint positions of a joint vector (any leading shape, 6)."""
    joints = np.asarray(joints, float)
    radians: Array = np.radians(joints)
    radians[..., GRIPPER] = _SHUT + joints[..., GRIPPER] / 100 * (_OPEN - _SHUT)
    return radians


def from_radians(radians: ArrayLike) -> Array:
    """The joint vector of MuJoCo joint positions (any leading shape, 6)."""
    radians = np.asarray(radians, float)
    joints: Array = np.degrees(radians)
    joints[..., GRIPPER] = (radians[..., GRIPPER] - _SHUT) / (_OPEN - _SHUT) * 100
    return joints


_SHUT, _OPEN = -0.17453, 1.74533
"""The gripper joint's range in the model, radians."""


def solve_reach(arm: Arm, goal: ArrayLike, start: ArrayLike, *, iterations: int = 120) -> Reach:
    """Joints that bring the tool centre to ``goal`` (metres), the gripper pointing down if it can.

    Damped least squares from ``start`` over the first four joints; the others keep their value.
    The arm itself does not move.
    """
    model, data = arm.model, mujoco.MjData(arm.model)
    site = model.site("tcp").id
    data.qpos[: len(JOINTS)] = to_radians(start)
    low, high = model.jnt_range[:REACHING].T
    moves, turns = np.zeros((3, model.nv)), np.zeros((3, model.nv))
    for k in range(iterations):
        tilt_weight = _TILT_WEIGHT * min(1.0, 2 - 2 * k / iterations)
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_jacSite(model, data, moves, turns, site)
        miss = np.asarray(goal, float) - data.site_xpos[site]
        tilt = np.cross(data.site_xmat[site].reshape(3, 3)[:, 0], [0.0, 0.0, -1.0])
        if np.linalg.norm(miss) < 1e-3 and np.linalg.norm(tilt) < 0.15:
            break
        jacobian = np.vstack([moves[:, :REACHING], tilt_weight * turns[:, :REACHING]])
        error = np.concatenate([miss, tilt_weight * tilt])
        step = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 1e-4 * np.eye(6), error)
        data.qpos[:REACHING] = np.clip(data.qpos[:REACHING] + step.clip(-0.2, 0.2), low, high)
    mujoco.mj_kinematics(model, data)
    miss = np.asarray(goal, float) - data.site_xpos[site]
    return Reach(joints=from_radians(data.qpos[: len(JOINTS)]), error_m=float(np.linalg.norm(miss)))


_TILT_WEIGHT = 0.12
"""Metres that a radian of tilt is worth at first; it fades, so that the position comes first."""
