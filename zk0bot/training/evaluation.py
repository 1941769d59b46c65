"""How good a policy is: held-out loss with fixed noise, and closed loop in simulation.

Shape letters: N scenes asked at once, B batch, S side of a picture, T chunk steps, A actions.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from numpy.typing import NDArray
from torch import Tensor

from zk0bot.sim.pairs import PAIRS, pair_scenes
from zk0bot.sim.rollout import Actor, Floats, rollout
from zk0bot.sim.tasks import evaluation_scenes
from zk0bot.training.data.dataset import chunk_indices
from zk0bot.training.data.meta import Ints
from zk0bot.training.data.statistics import ACTION, STATE
from zk0bot.training.filming import save_rollout
from zk0bot.training.loop import LossSum
from zk0bot.training.memory import MicroBatch
from zk0bot.training.model.policy import (
    IMAGE_PREFIX,
    encode_tasks,
    flow_loss_sum,
    predict_chunk,
    valid_entries,
)
from zk0bot.training.processing import (
    Batch,
    Feed,
    build_scaler,
    seeded_generator,
    split_batch,
    to_device,
    with_noise,
)
from zk0bot.training.protocol import (
    DatasetStatistics,
    PairResult,
    RolloutRequest,
    SectorResult,
)

NOISE_SEED = 4242
SCENE_NOISE_SEED = 7
EVALUATION_BATCH = 64
"""Frames that share a draw of noise, and that are evaluated at a time where memory allows."""
ERROR_FRAMES = 64
"""Frames of an evaluation set at which a chunk is predicted."""
ERROR_DRAW = 8
"""Those of them that share a draw of noise."""
StepProgress = Callable[[int, int], None]


@torch.no_grad()
def mean_loss(
    policy: SmolVLAPolicy,
    feed: Feed,
    frames: Ints,
    progress: StepProgress = lambda k, n: None,
    *,
    loss_sum: LossSum = flow_loss_sum,
    micro_batch: MicroBatch | None = None,
) -> float:
    """Policy loss over ``frames``, mean over valid action entries, with noise and time fixed by
    the frame's place, so that two policies are compared on equal terms.

    ``micro_batch`` says how many frames fit at a time, and learns it. Raises MemoryShortError when
    one is too much.
    """
    micro_batch = micro_batch or MicroBatch()
    device = next(policy.parameters()).device
    policy.eval()
    total, count = 0.0, 0
    for start in range(0, len(frames), EVALUATION_BATCH):
        progress(start, len(frames))
        batch = _fixed_batch(feed, frames[start : start + EVALUATION_BATCH], start)
        work = functools.partial(_loss_in_parts, policy, batch, loss_sum, device)
        total += micro_batch.run(len(batch[ACTION]), work)
        count += valid_entries(batch)
    return total / count


@torch.no_grad()
def action_error(
    policy: SmolVLAPolicy,
    feed: Feed,
    statistics: DatasetStatistics,
    frames: Ints,
    *,
    micro_batch: MicroBatch | None = None,
) -> tuple[dict[str, float], list[float]]:
    """How far predicted chunks lie from the recorded actions, in the joints' own units: mean
    absolute difference by joint, and by step of the chunk over all joints.

    Open loop: each of ``frames`` is asked as it was recorded, with noise fixed by its place. Steps
    past an episode's end do not count. ``micro_batch`` as for ``mean_loss``.
    """
    micro_batch = micro_batch or MicroBatch()
    policy.eval()
    recording, scaler = feed.dataset.recording, build_scaler(statistics, ACTION)
    total_TA = np.zeros((feed.noise_shape[0], recording.actions_NA.shape[1]))
    count_T = np.zeros(feed.noise_shape[0])
    for start in range(0, len(frames), EVALUATION_BATCH):
        part = frames[start : start + EVALUATION_BATCH]
        work = functools.partial(_predict_in_parts, policy, _error_batch(feed, part, start))
        chunk = scaler.restore(micro_batch.run(len(part), work)).numpy()
        following, is_past = chunk_indices(recording.episode_N, part, feed.noise_shape[0])
        error_BTA = np.abs(chunk - recording.actions_NA[following]) * ~is_past[:, :, None]
        total_TA += error_BTA.sum(axis=0)
        count_T += (~is_past).sum(axis=0)
    by_joint = total_TA.sum(axis=0) / count_T.sum()
    by_step = total_TA.mean(axis=1) / np.maximum(count_T, 1)
    names = recording.action_names
    return {name: round(float(by_joint[k]), 3) for k, name in enumerate(names)}, [
        round(float(value), 3) for value in by_step[count_T > 0]
    ]


def stratified_frames(episode_N: Ints, frames: Ints, limit: int) -> Ints:
    """At most ``limit`` of ``frames`` (0: all), spread evenly over their episodes and over time
    within each."""
    if limit == 0 or limit >= len(frames):
        return frames
    groups = [frames[episode_N[frames] == e] for e in np.unique(episode_N[frames])]
    chosen = [
        group[np.linspace(0, len(group) - 1, count).round().astype(np.int64)]
        for group, count in zip(groups, _shares(limit, len(groups)), strict=True)
        if count
    ]
    spread: Ints = np.unique(np.concatenate(chosen))
    return spread


def run_rollout(
    act: Actor,
    request: RolloutRequest,
    *,
    cameras: Sequence[str],
    image_size: int,
    n_action_steps: int,
    policy_loss: float | None = None,
    progress: StepProgress = lambda k, n: None,
) -> tuple[list[SectorResult], list[Path]]:
    """Successes per part of the table, and the films of the first ``videos`` scenes of each.

    A film is ``video_dir/client_M/rollout_<timestamp>.mp4`` with a JSON of the same name beside
    it, M being the number of the part's owner.
    """
    scenes = evaluation_scenes(request.scenes_per_sector, first_seed=request.first_seed)
    sectors: list[SectorResult] = []
    films: list[Path] = []
    names = list(dict.fromkeys(scene.sector.name for scene in scenes))
    for owner, name in enumerate(names):
        progress(owner, len(names))
        results = rollout(
            [scene for scene in scenes if scene.sector.name == name],
            act,
            cameras=cameras,
            image_size=image_size,
            n_action_steps=n_action_steps,
            record=request.videos,
        )
        outcomes = [result.success for result in results]
        sectors.append(
            SectorResult(
                sector=name, successes=sum(outcomes), episodes=len(outcomes), outcomes=outcomes
            )
        )
        folder = Path(request.video_dir) / f"client_{owner}"
        films += [save_rollout(r, r.track, folder, policy_loss) for r in results if r.track]
    return sectors, films


def run_pairs(
    act: Actor,
    request: RolloutRequest,
    *,
    cameras: Sequence[str],
    image_size: int,
    n_action_steps: int,
    progress: StepProgress = lambda k, n: None,
) -> list[PairResult]:
    """Successes of every task in the thirds of the others: what ``run_rollout`` leaves out."""
    pairs = [pair for pair in PAIRS if not pair.is_own]
    found: list[PairResult] = []
    for number, pair in enumerate(pairs):
        progress(number, len(pairs))
        results = rollout(
            pair_scenes(pair, request.scenes_per_sector, first_seed=request.first_seed),
            act,
            cameras=cameras,
            image_size=image_size,
            n_action_steps=n_action_steps,
        )
        outcomes = [result.success for result in results]
        found.append(PairResult(task=pair.task.name, place=pair.place.name, outcomes=outcomes))
    return found


def policy_actor(policy: SmolVLAPolicy, statistics: DatasetStatistics) -> Actor:
    """Acts as ``policy`` does on a robot; the flow noise is fixed per scene and step."""
    device = next(policy.parameters()).device
    states_scaler = build_scaler(statistics, STATE)
    actions_scaler = build_scaler(statistics, ACTION)
    shape = (policy.config.chunk_size, policy.config.max_action_dim)

    def act(
        images: dict[str, NDArray[np.uint8]],
        states: Floats,
        instructions: list[str],
        step: int,
        indices: NDArray[np.int64],
    ) -> Floats:
        tokens, mask = encode_tasks(policy, instructions)
        batch: Batch = {
            STATE: states_scaler.scale(torch.from_numpy(states)),
            "observation.language.tokens": tokens,
            "observation.language.attention_mask": mask,
            **{
                f"{IMAGE_PREFIX}{name}": torch.from_numpy(picture).permute(0, 3, 1, 2).contiguous()
                for name, picture in images.items()
            },
            "noise": _scene_noise(indices, step, shape),
        }
        batch = to_device(batch, device)
        chunk = predict_chunk(policy, batch, batch["noise"])
        restored: Floats = actions_scaler.restore(chunk.float().cpu()).numpy()
        return restored

    return act


def _loss_in_parts(
    policy: SmolVLAPolicy, batch: Batch, loss_sum: LossSum, device: torch.device, size: int
) -> float:
    parts = split_batch(batch, size)
    return sum(float(loss_sum(policy, to_device(part, device))) for part in parts)


def _fixed_batch(feed: Feed, frames: Ints, start: int) -> Batch:
    return with_noise(feed.batch(frames), feed.noise_shape, [NOISE_SEED, start])


def _error_batch(feed: Feed, frames: Ints, start: int) -> Batch:
    batch = feed.batch(frames)
    draws = [
        with_noise(part, feed.noise_shape, [NOISE_SEED, start + place * ERROR_DRAW])["noise"]
        for place, part in enumerate(split_batch(batch, ERROR_DRAW))
    ]
    return {**batch, "noise": torch.cat(draws)}


def _predict_in_parts(policy: SmolVLAPolicy, batch: Batch, size: int) -> Tensor:
    device = next(policy.parameters()).device
    parts = (to_device(part, device) for part in split_batch(batch, size))
    return torch.cat([predict_chunk(policy, part, part["noise"]).float().cpu() for part in parts])


def _shares(total: int, parts: int) -> list[int]:
    """``total`` cut into ``parts`` whole numbers that differ by one at most."""
    return [total // parts + (k < total % parts) for k in range(parts)]


def _scene_noise(indices: NDArray[np.int64], step: int, shape: tuple[int, int]) -> Tensor:
    return torch.stack(
        [
            torch.randn(shape, generator=seeded_generator([SCENE_NOISE_SEED, step, int(index)]))
            for index in indices
        ]
    )
