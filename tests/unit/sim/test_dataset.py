import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from zk0bot.errors import DataError
from zk0bot.sim.arm import MOTORS
from zk0bot.sim.dataset import ensure_sim_dataset, expert_episodes, main, make_dataset
from zk0bot.sim.tasks import TASKS

pytestmark = pytest.mark.slow
GREEN = TASKS[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, int]]]:
    root = tmp_path_factory.mktemp("sim") / "made"
    told: list[tuple[int, int]] = []
    make_dataset(
        root,
        GREEN,
        sector=GREEN.wide,
        episodes=3,
        seed=4,
        cameras=("front", "wrist"),
        progress=lambda done, total: told.append((done, total)),
    )
    return root, told


def test_what_was_seen_and_done_reads_back(made) -> None:
    root, _ = made
    dataset = LeRobotDataset("sim/read", root=root, video_backend="pyav")
    episodes = expert_episodes(
        GREEN, sector=GREEN.wide, seed=4, cameras=("front", "wrist"), image_size=64
    )
    assert (dataset.num_episodes, dataset.num_frames, dataset.fps) == (3, 60, 10)
    for number in range(3):
        episode = next(episodes)
        for step in (0, 10, 19):
            item = dataset[20 * number + step]
            np.testing.assert_array_equal(item["observation.state"], episode.states[step])
            np.testing.assert_array_equal(item["action"], episode.actions[step])
            assert item["task"] == "Touch the green cube."
            for camera in ("front", "wrist"):
                seen = item[f"observation.images.{camera}"].permute(1, 2, 0).numpy() * 255
                assert np.abs(seen - episode.images[camera][step]).mean() < 4


def test_the_metadata_is_that_of_a_follower(made) -> None:
    root, _ = made
    info = json.loads((root / "meta/info.json").read_text())
    assert (info["codebase_version"], info["robot_type"]) == ("v3.0", "so101_follower")
    for key in ("observation.state", "action"):
        assert info["features"][key]["names"] == list(MOTORS)
        assert info["features"][key]["shape"] == [6]
    assert info["features"]["observation.images.front"]["info"]["video.codec"] == "h264"
    stats = json.loads((root / "meta/stats.json").read_text())
    assert min(stats["action"]["std"]) > 1


def test_progress_is_told_from_nothing_to_the_last_episode(made) -> None:
    assert made[1] == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_only_the_dataset_is_left(made) -> None:
    assert [path.name for path in made[0].parent.iterdir()] == ["made"]


def test_an_existing_folder_is_not_overwritten(made) -> None:
    with pytest.raises(DataError, match="exists already"):
        make_dataset(made[0], GREEN, sector=GREEN.wide, episodes=1, seed=0)


def test_another_seed_gives_other_episodes() -> None:
    first, second = (
        next(expert_episodes(GREEN, sector=GREEN.wide, seed=s, cameras=(), image_size=64))
        for s in (0, 1)
    )
    assert np.abs(first.actions - second.actions).max() > 1


def test_a_dataset_is_made_once_for_its_uri(tmp_path: Path) -> None:
    told: list[int] = []
    uri = "sim:touch-red?episodes=1"
    one = ensure_sim_dataset(uri, tmp_path, lambda done, total: told.append(done))
    other = ensure_sim_dataset(uri, tmp_path, lambda done, total: told.append(done))
    assert one == other
    assert told == [0, 1]


def test_the_command_tells_each_episode_and_then_the_place(tmp_path: Path, capsys) -> None:
    uri = "sim:touch-red?episodes=2"
    assert main(["--cached", uri, str(tmp_path)]) == 0
    assert main(["--cached", uri, str(tmp_path)]) == 0
    *lines, path, again = map(json.loads, capsys.readouterr().out.splitlines())
    assert lines == [{"done": k, "total": 2} for k in range(3)]
    assert path == again == {"path": str(ensure_sim_dataset(uri, tmp_path))}


def test_the_command_says_what_is_wrong_with_a_uri(tmp_path: Path, capsys) -> None:
    assert main(["sim:touch-rad", str(tmp_path / "new")]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == {
        "code": "unknown_name",
        "message": "unknown simulated task 'touch-rad'",
        "hint": "did you mean 'touch-red'?",
    }


def test_a_second_process_waits_and_what_a_killed_one_left_goes(tmp_path: Path) -> None:
    uri = "sim:touch-red?episodes=1"
    shelf = tmp_path / "touch-red-wide-left-1-0"
    left = shelf / ".abc.killed/dataset/meta"
    left.mkdir(parents=True)
    descriptor = os.open(shelf, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    made: list[Path] = []
    second = threading.Thread(target=lambda: made.append(ensure_sim_dataset(uri, tmp_path)))
    second.start()
    second.join(timeout=0.5)
    assert second.is_alive() and left.exists()
    os.close(descriptor)
    second.join(timeout=60)
    assert [path.name for path in shelf.iterdir()] == [made[0].name]


@pytest.mark.parametrize(("number", "left"), [(signal.SIGKILL, 1), (signal.SIGTERM, 0)])
def test_a_stopped_maker_leaves_nothing_that_looks_like_a_dataset(
    tmp_path: Path, number: int, left: int
) -> None:
    root = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, "-m", "zk0bot.sim.dataset", "sim:touch-red?episodes=40", str(root)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = [json.loads(process.stdout.readline()) for _ in range(3)]
    process.send_signal(number)
    process.communicate()
    assert lines == [{"done": k, "total": 40} for k in range(3)]
    assert not root.exists()
    assert [path.name.startswith(".stopped.") for path in tmp_path.iterdir()] == [True] * left
