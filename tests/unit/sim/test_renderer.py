import mujoco
import numpy as np
import pytest

from zk0bot.sim.arm import HOME, Arm
from zk0bot.sim.renderer import Renderer, renderer_for
from zk0bot.sim.tasks import TASKS

PRIMITIVES = """
<mujoco><worldbody>
  <camera name="top" pos="0 0 1" xyaxes="1 0 0 0 1 0" fovy="53.13"/>
  <geom name="table" type="box" size="2 2 0.1" pos="0 0 -0.1" rgba="1 1 1 1"/>
  <geom type="{kind}" size="{size}" pos="0 0 0.2" rgba="1 0 0 1"/>
  {more}
</worldbody></mujoco>
"""


def draw(kind: str, size: str, more: str = "") -> np.ndarray:
    model = mujoco.MjModel.from_xml_string(PRIMITIVES.format(kind=kind, size=size, more=more))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return Renderer(model, 100).render(data, "top")


def reds(image: np.ndarray) -> int:
    return int(((image[..., 0] > 80) & (image[..., 1] < 40)).sum())


def blue_pixels(image: np.ndarray) -> np.ndarray:
    return (image[..., 2] > 80) & (image[..., 1] < 40)


def blues(image: np.ndarray) -> int:
    return int(blue_pixels(image).sum())


def arm_at(cube_xy: tuple[float, float], colour: int = 0) -> Arm:
    arm = Arm(TASKS[colour].rgb)
    arm.reset(HOME, cube_xy, 0.3)
    return arm


# A picture of 100 pixels shows 1 m at distance 1: 125 pixels a metre at distance 0.8.
@pytest.mark.parametrize(
    ("kind", "size", "area_m2"),
    [
        ("box", "0.1 0.1 0.0001", 0.04),
        ("cylinder", "0.1 0.0001", np.pi * 0.01),
    ],
)
def test_a_flat_body_covers_its_area(kind: str, size: str, area_m2: float) -> None:
    assert reds(draw(kind, size)) == pytest.approx(area_m2 * 125**2, rel=0.1)


@pytest.mark.parametrize(("kind", "size"), [("sphere", "0.1"), ("capsule", "0.1 0.05")])
def test_a_round_body_covers_a_disc(kind: str, size: str) -> None:
    top = draw(kind, size)
    assert reds(top) == pytest.approx(np.pi * 0.01 * 125**2, rel=0.2)


def test_each_face_has_its_own_light() -> None:
    aside = '<geom type="box" size="0.05 0.05 0.2" pos="0.25 0 0.2" rgba="0 0 1 1"/>'
    blue = draw("sphere", "0.01", aside)[..., 2][blue_pixels(draw("sphere", "0.01", aside))]
    lid, wall = blue.max(), blue.min()
    assert lid > wall + 40  # the key light comes from above
    assert (blue == lid).sum() == pytest.approx((0.1 * 100 / 0.6) ** 2, rel=0.15)


def test_the_nearer_body_hides_the_farther() -> None:
    above = '<geom type="box" size="0.2 0.2 0.01" pos="0 0 0.5" rgba="0 0 1 1"/>'
    below = '<geom type="box" size="0.2 0.2 0.01" pos="0 0 0.05" rgba="0 0 1 1"/>'
    assert reds(draw("box", "0.1 0.1 0.01", above)) == 0
    assert reds(draw("box", "0.1 0.1 0.01", below)) > 500
    assert blues(draw("box", "0.1 0.1 0.01", below)) > 500


def test_an_unknown_kind_of_geom_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot draw"):
        draw("ellipsoid", "0.1 0.1 0.1")


def test_bodies_behind_the_camera_are_not_drawn() -> None:
    behind = '<geom type="box" size="0.3 0.3 0.01" pos="0 0 1.5" rgba="0 0 1 1"/>'
    assert blues(draw("box", "0.1 0.1 0.01", behind)) == 0


@pytest.mark.parametrize("camera", ["front", "wrist", "side"])
def test_the_same_state_gives_the_same_picture(camera: str) -> None:
    arm = arm_at((0.25, 0.08))
    once = Renderer(arm.model, 64).render(arm.data, camera)
    other = Renderer(arm.model, 64)
    other.render(arm_at((0.3, -0.1)).data, camera)
    np.testing.assert_array_equal(once, other.render(arm.data, camera))


def test_the_left_of_the_arm_is_the_right_of_the_front_picture() -> None:
    columns = []
    for y in (-0.15, 0.0, 0.15):
        arm = arm_at((0.27, y))
        picture = renderer_for(arm.model, 64).render(arm.data, "front")
        columns.append(np.argwhere((picture[..., 0] > 100) & (picture[..., 1] < 50))[:, 1].mean())
    assert columns == sorted(columns)
    assert columns[0] < 22 and columns[2] > 42


@pytest.mark.parametrize("colour", range(3))
@pytest.mark.parametrize("place", [(0.35, 0.0), (0.266, 0.211), (0.266, -0.211), (0.22, 0.0)])
def test_the_policys_picture_shows_the_cube_and_its_colour(
    colour: int, place: tuple[float, float]
) -> None:
    arm = arm_at(place, colour)
    picture = renderer_for(arm.model, 64).render(arm.data, "front").astype(int)
    others = [c for c in range(3) if c != colour]
    strong = picture[..., colour] - picture[..., others].max(-1) > 50
    if colour == 0:
        strong &= picture[..., 1] < 60  # the printed parts are orange
    assert strong.sum() > 25
