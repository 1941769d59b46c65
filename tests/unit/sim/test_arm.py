import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zk0bot.sim.arm import HOME, Arm, from_radians, solve_reach, to_radians

RED = (0.86, 0.10, 0.10)
JOINT = st.floats(-150, 150)
VECTORS = st.tuples(JOINT, JOINT, JOINT, JOINT, JOINT, st.floats(0, 100)).map(np.array)


@pytest.fixture
def arm() -> Arm:
    arm = Arm(RED)
    arm.reset(HOME, (0.25, 0.0), 0.0)
    return arm


def test_the_tool_at_zero_lies_where_the_public_dimensions_put_it(arm: Arm) -> None:
    arm.reset(np.zeros(6), (0.25, 0.0), 0.0)
    # Shoulder 0.0692 ahead and 0.1166 up; upper arm (0.028, 0.1126), forearm (0.1349, 0.0052).
    ahead = 0.0692 + 0.028 + 0.1349 + 0.0611 + 0.0981
    up = 0.1166 + 0.1126 + 0.0052
    np.testing.assert_allclose(arm.tool(), [ahead, 0, up], atol=1e-6)


def test_the_tool_at_home_hangs_over_the_table_ahead_of_the_base(arm: Arm) -> None:
    np.testing.assert_allclose(arm.tool(), [0.2002, 0, 0.0645], atol=1e-3)


def test_a_positive_pan_turns_to_the_right_as_on_the_real_arm(arm: Arm) -> None:
    arm.reset(HOME + np.array([30, 0, 0, 0, 0, 0]), (0.25, 0.0), 0.0)
    assert arm.tool()[1] < -0.05


@given(VECTORS)
def test_units_survive_the_way_to_radians_and_back(joints: np.ndarray) -> None:
    np.testing.assert_allclose(from_radians(to_radians(joints)), joints, atol=1e-9)


def test_units_convert_chunks_as_they_convert_single_vectors() -> None:
    chunk = np.arange(24.0).reshape(2, 2, 6)
    np.testing.assert_allclose(to_radians(chunk)[1, 0], to_radians(chunk[1, 0]))


def test_the_gripper_counts_from_closed_to_open(arm: Arm) -> None:
    assert arm.low[5] == pytest.approx(0, abs=1e-3)
    assert arm.high[5] == pytest.approx(100, abs=1e-3)


def test_the_arm_arrives_near_its_targets(arm: Arm) -> None:
    target = HOME + np.array([20, 30, -20, 10, 5, 30])
    for _ in range(10):
        arm.step(target)
    np.testing.assert_allclose(arm.joints(), target, atol=1.5)


def test_targets_beyond_the_limits_are_cut(arm: Arm) -> None:
    for _ in range(12):
        arm.step(HOME + np.array([400, 0, 0, 0, 0, 0]))
    assert arm.joints()[0] == pytest.approx(110, abs=1)
    arm.step(HOME + np.array([100, 0, 0, 0, 0, 0]))  # starts from the limit, not from 400
    assert arm.joints()[0] < 107


def test_the_arm_pushes_the_cube_and_not_through_the_table(arm: Arm) -> None:
    arm.reset(HOME, (0.25, 0.0), 0.0)
    goal = solve_reach(arm, [0.25, 0.0, -0.05], HOME).joints
    for _ in range(15):
        arm.step(goal)
    assert arm.tool()[2] > -0.005
    assert 0.0 < arm.cube()[2] < 0.06


def test_reach_finds_places_all_over_the_workspace(arm: Arm) -> None:
    shoulder = arm.shoulder_xy()
    for angle in np.linspace(-0.75, 0.75, 7):
        for reach in (0.18, 0.25, 0.31):
            place = [*(shoulder + reach * np.array([np.cos(angle), np.sin(angle)])), 0.042]
            assert solve_reach(arm, place, HOME).error_m < 0.01


def test_reach_leaves_the_arm_where_it_is(arm: Arm) -> None:
    before = arm.joints()
    solve_reach(arm, [0.3, 0.1, 0.05], HOME)
    np.testing.assert_array_equal(arm.joints(), before)
