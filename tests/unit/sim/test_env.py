import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from zk0bot.sim.env import HOLD_STEPS, TOUCH_M, So101TouchEnv
from zk0bot.sim.expert import EPISODE_STEPS, minimum_jerk, plan, succeeds
from zk0bot.sim.tasks import SEEDS_PER_TASK, TASKS, Scene, evaluation_scenes, training_seed

SCENE = evaluation_scenes(1)[0]


def observation_at(seed: int):
    env = So101TouchEnv(cameras=("front", "wrist"))
    observation, info = env.reset(seed=seed)
    for target in plan(env.arm)[:4]:
        observation, *_ = env.step(target)
    return observation, info


def test_the_same_seed_gives_the_same_episode() -> None:
    one, other = observation_at(5)[0], observation_at(5)[0]
    np.testing.assert_array_equal(one["agent_pos"], other["agent_pos"])
    for camera in ("front", "wrist"):
        np.testing.assert_array_equal(one["pixels"][camera], other["pixels"][camera])


def test_a_scene_is_the_episode_of_its_seed() -> None:
    env = So101TouchEnv()
    states = []
    for scene in (SCENE, evaluation_scenes(2)[1]):
        env.reset_to(scene)
        states.append(env.observe()["agent_pos"])
    env.reset(seed=SCENE.seed)
    np.testing.assert_array_equal(env.observe()["agent_pos"], states[0])
    assert not np.array_equal(states[0], states[1])


def test_another_seed_gives_another_episode() -> None:
    assert not np.array_equal(observation_at(5)[0]["agent_pos"], observation_at(6)[0]["agent_pos"])


def test_observations_have_the_declared_shapes_and_units() -> None:
    env = So101TouchEnv(cameras=("front", "wrist"), image_size=48)
    observation, info = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert observation["pixels"]["wrist"].shape == (48, 48, 3)
    assert observation["agent_pos"][1] == pytest.approx(-60, abs=4.1)
    assert info == {"is_success": False, "task": "Touch the red cube."}


def test_gymnasium_makes_every_task_by_name() -> None:
    for task in TASKS:
        env = gym.make(f"zk0bot/{task.name}")
        env.reset(seed=0)
        assert env.get_wrapper_attr("task_description") == task.instruction
        assert env.get_wrapper_attr("_max_episode_steps") == 40


# Actions are degrees on purpose: LeRobot's statistics normalise them.
@pytest.mark.filterwarnings("ignore:.*we recommend using a symmetric")
def test_gymnasiums_own_checks_pass() -> None:
    check_env(So101TouchEnv(), skip_render_check=True)


def test_success_needs_the_touch_held() -> None:
    env = So101TouchEnv()
    env.reset_to(SCENE)
    held = 0
    for target in plan(env.arm):
        _, reward, is_done, _, info = env.step(target)
        near = env.distance_m() < TOUCH_M
        held = held + 1 if near else 0
        assert reward == near
        assert is_done == info["is_success"] == (held >= HOLD_STEPS)
        if is_done:
            return
    pytest.fail("the expert did not succeed")


def test_leaving_the_cube_starts_the_count_anew() -> None:
    env = So101TouchEnv()
    env.reset_to(SCENE)
    home, targets = env.arm.joints(), plan(env.arm)
    while env.distance_m() >= TOUCH_M:
        assert not env.advance(targets[0])
        targets = targets[1:]
    for _ in range(6):
        env.advance(home)
    assert env.distance_m() >= TOUCH_M
    env.arm.reset(home + (targets[-1] - home), env.arm.cube()[:2], 0.0)
    assert [env.advance(targets[-1]) for _ in range(HOLD_STEPS)] == [False, False, True]


def test_an_episode_is_truncated_at_its_limit() -> None:
    env = So101TouchEnv(max_steps=3)
    env.reset_to(SCENE)
    assert [env.step(env.arm.joints())[3] for _ in range(3)] == [False, False, True]


def test_cubes_lie_in_their_sector_and_ring() -> None:
    env = So101TouchEnv()
    for scene in evaluation_scenes(15):
        env.reset_to(scene)
        x, y = env.arm.cube()[:2] - env.arm.shoulder_xy()
        assert scene.sector.low <= np.arctan2(y, x) <= scene.sector.high
        assert 0.18 <= np.hypot(x, y) <= 0.31


def test_minimum_jerk_is_soft_at_both_ends_and_arrives() -> None:
    way = minimum_jerk(15)
    assert way[-1] == pytest.approx(1.0)
    assert np.all(np.diff(way) > 0)
    assert way[0] < 0.01 and 1 - way[-2] < 0.01


def test_the_expert_succeeds_in_nearly_every_scene() -> None:
    env = So101TouchEnv()
    won = 0
    for index in range(10):
        for task in TASKS:
            seed = training_seed(task, seed=0, index=SEEDS_PER_TASK // 2 + index)
            env.reset_to(Scene(task=task, sector=task.wide, seed=seed))
            targets = plan(env.arm)
            assert targets.shape == (EPISODE_STEPS, 6)
            won += succeeds(env, targets)
    assert won >= 29
