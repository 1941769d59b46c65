import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from numpy.typing import NDArray
from torch import Tensor, nn

from zk0bot.errors import MemoryShortError
from zk0bot.sim.rollout import Floats
from zk0bot.training import evaluation
from zk0bot.training.data.dataset import Dataset
from zk0bot.training.evaluation import (
    ERROR_DRAW,
    NOISE_SEED,
    action_error,
    mean_loss,
    policy_actor,
    run_pairs,
    run_rollout,
    stratified_frames,
)
from zk0bot.training.memory import MicroBatch
from zk0bot.training.model.policy import flow_loss_sum, predict_chunk
from zk0bot.training.processing import Batch, Feed, build_scaler, with_noise
from zk0bot.training.protocol import RolloutRequest


def test_frames_are_spread_over_all_episodes() -> None:
    episodes = np.repeat(np.arange(5), [20, 20, 20, 20, 40])
    frames = np.flatnonzero(episodes > 0)
    chosen = stratified_frames(episodes, frames, 10)
    assert np.unique(episodes[chosen], return_counts=True)[1].tolist() == [3, 3, 2, 2]
    assert set(chosen) <= set(frames)
    assert {20, 39, 80, 119} <= set(chosen)  # first and last of an episode
    assert stratified_frames(episodes, frames, 3).tolist() == [20, 40, 60]


def test_no_limit_means_all_frames() -> None:
    episodes, frames = np.zeros(6, dtype=np.int64), np.arange(6)
    for limit in (0, 6, 9):
        assert stratified_frames(episodes, frames, limit).tolist() == list(range(6))


def test_held_out_loss_does_not_depend_on_chance(tiny: SmolVLAPolicy, dataset: Dataset) -> None:
    feed = Feed(dataset, tiny, dataset.statistics)
    torch.manual_seed(1)
    first = mean_loss(tiny, feed, dataset.heldout)
    torch.manual_seed(2)
    assert mean_loss(tiny, feed, dataset.heldout) == first
    assert first > 0.5  # an untrained policy


def test_short_memory_does_not_change_the_loss(tiny: SmolVLAPolicy, dataset: Dataset) -> None:
    def picky(policy: nn.Module, batch: Batch) -> Tensor:
        if len(batch["action"]) > 7:
            raise torch.cuda.OutOfMemoryError
        return flow_loss_sum(tiny, batch)

    def starving(policy: nn.Module, batch: Batch) -> Tensor:
        raise torch.cuda.OutOfMemoryError

    feed, micro_batch = Feed(dataset, tiny, dataset.statistics), MicroBatch()
    whole = mean_loss(tiny, feed, dataset.heldout)
    parts = mean_loss(tiny, feed, dataset.heldout, loss_sum=picky, micro_batch=micro_batch)
    assert parts == pytest.approx(whole, rel=1e-6)
    assert micro_batch.size(64) == 5  # 40, 20, 10, 5
    with pytest.raises(MemoryShortError):
        mean_loss(tiny, feed, dataset.heldout, loss_sum=starving)


@pytest.mark.slow
def test_rollout_counts_by_sector_and_films(
    tiny: SmolVLAPolicy, dataset: Dataset, tmp_path: Path
) -> None:
    request = RolloutRequest(
        scenes_per_sector=2, first_seed=700_000, videos=1, video_dir=str(tmp_path)
    )
    sectors, films = run_rollout(
        policy_actor(tiny, dataset.statistics),
        request,
        cameras=("front",),
        image_size=64,
        n_action_steps=10,
        policy_loss=1.5,
    )
    assert [(s.sector, s.episodes) for s in sectors] == [("left", 2), ("middle", 2), ("right", 2)]
    assert [film.parent.name for film in films] == ["client_0", "client_1", "client_2"]
    for film in films:
        entry = json.loads(film.with_suffix(".json").read_text())
        assert {"success", "duration", "policy_loss"} <= entry.keys()
        assert entry["policy_loss"] == 1.5
        with av.open(str(film)) as container:
            frames = sum(1 for _ in container.decode(video=0))
            assert container.streams.video[0].average_rate == 30
        assert frames == 3 * (round(entry["duration"] * 10) + 1)


@pytest.mark.slow
def test_every_task_is_tried_in_the_thirds_of_the_others(
    tiny: SmolVLAPolicy, dataset: Dataset
) -> None:
    request = RolloutRequest(scenes_per_sector=2, first_seed=700_000, every_pair=True)
    seen: list[str] = []
    act = policy_actor(tiny, dataset.statistics)

    def listen(
        images: dict[str, NDArray[np.uint8]],
        states: Floats,
        instructions: list[str],
        step: int,
        indices: NDArray[np.int64],
    ) -> Floats:
        seen.extend(instructions if step == 0 else [])
        return act(images, states, instructions, step, indices)

    found = run_pairs(listen, request, cameras=("front",), image_size=64, n_action_steps=10)
    assert [(f.task, f.place, len(f.outcomes)) for f in found] == [
        ("touch-red", "middle", 2), ("touch-red", "right", 2),
        ("touch-green", "left", 2), ("touch-green", "right", 2),
        ("touch-blue", "left", 2), ("touch-blue", "middle", 2),
    ]  # fmt: skip
    assert seen == [f"Touch the {c} cube." for c in ("red", "green", "blue") for _ in range(4)]


def test_the_action_error_is_that_of_the_actors_chunks(
    tiny: SmolVLAPolicy, dataset: Dataset
) -> None:
    feed = Feed(dataset, tiny, dataset.statistics)
    frames = dataset.heldout[[0, 12, 39]]  # of the last one, the last frame, one step is left
    by_joint, by_step = action_error(tiny, feed, dataset.statistics, frames)
    assert (list(by_joint), len(by_step)) == (list(dataset.recording.action_names), 20)
    first, _ = action_error(tiny, feed, dataset.statistics, frames[2:])
    batch = with_noise(feed.batch(frames[2:]), feed.noise_shape, [NOISE_SEED, 0])
    chunk = predict_chunk(tiny, batch, batch["noise"])[0, 0]
    scaler = build_scaler(dataset.statistics, "action")
    off = scaler.restore(chunk).detach().numpy() - dataset.recording.actions_NA[frames[2]]
    np.testing.assert_allclose(list(first.values()), np.abs(off), atol=2e-3)


def test_errors_are_means_over_the_steps_that_are_left(
    tiny: SmolVLAPolicy, dataset: Dataset
) -> None:
    feed, scaler = (
        Feed(dataset, tiny, dataset.statistics),
        build_scaler(dataset.statistics, "action"),
    )
    frames = dataset.heldout[[3, 9, 12, 15, 17, 18, 19, 31, 36, 39]]  # episodes have 20 frames
    by_joint, by_step = action_error(tiny, feed, dataset.statistics, frames)
    errors: list[list[NDArray[np.float32]]] = [[] for _ in range(20)]
    for start in (0, ERROR_DRAW):
        part = frames[start : start + ERROR_DRAW]
        batch = with_noise(feed.batch(part), feed.noise_shape, [NOISE_SEED, start])
        chunks = scaler.restore(predict_chunk(tiny, batch, batch["noise"])).detach().numpy()
        for frame, chunk in zip(part, chunks, strict=True):
            for step in range(20 - int(frame) % 20):
                errors[step].append(chunk[step] - dataset.recording.actions_NA[frame + step])
    expected = [float(np.abs(found).mean()) for found in errors if found]
    assert len(expected) == 17
    np.testing.assert_allclose(by_step, expected, atol=2e-3)
    every = np.abs([error for found in errors for error in found])
    np.testing.assert_allclose(list(by_joint.values()), every.mean(axis=0), atol=2e-3)


def test_errors_are_the_same_where_memory_is_short(
    tiny: SmolVLAPolicy, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed, frames, sizes = Feed(dataset, tiny, dataset.statistics), dataset.heldout[:11], []

    def predict(policy: SmolVLAPolicy, batch: dict[str, Tensor], noise: Tensor) -> Tensor:
        sizes.append(len(noise))
        if len(noise) > 4:
            raise torch.cuda.OutOfMemoryError
        return predict_chunk(policy, batch, noise)

    whole, steps = action_error(tiny, feed, dataset.statistics, frames)
    monkeypatch.setattr(evaluation, "predict_chunk", predict)
    parts, steps_of_parts = action_error(tiny, feed, dataset.statistics, frames)
    assert sizes == [11, 6, 3, 3, 3, 2]
    np.testing.assert_allclose(list(parts.values()), list(whole.values()), atol=2e-3)
    np.testing.assert_allclose(steps_of_parts, steps, atol=2e-3)


def test_a_policy_acts_the_same_in_the_same_scene(tiny: SmolVLAPolicy, dataset: Dataset) -> None:
    act = policy_actor(tiny, dataset.statistics)
    pictures = {"front": np.zeros((3, 64, 64, 3), dtype=np.uint8)}
    states = dataset.recording.states_NS[:3]
    texts = ["Touch the red cube."] * 3
    whole = act(pictures, states, texts, 10, np.array([0, 4, 9]))
    part = act({"front": pictures["front"][1:]}, states[1:], texts[1:], 10, np.array([4, 9]))
    assert whole.shape == (3, 20, 6)
    np.testing.assert_allclose(whole[1:], part, rtol=0, atol=1e-3)
    lower, upper = dataset.recording.actions_NA.min(0), dataset.recording.actions_NA.max(0)
    assert np.all(whole > lower - 400) and np.all(whole < upper + 400)


@pytest.mark.parametrize("step", [0, 10])
def test_noise_changes_with_scene_and_step(
    step: int, tiny: SmolVLAPolicy, dataset: Dataset
) -> None:
    act = policy_actor(tiny, dataset.statistics)
    pictures = {"front": np.zeros((2, 64, 64, 3), dtype=np.uint8)}
    states = np.repeat(dataset.recording.states_NS[:1], 2, axis=0)
    one, two = act(pictures, states, ["Touch the red cube."] * 2, step, np.array([0, 1]))
    assert np.abs(one - two).max() > 1e-3
