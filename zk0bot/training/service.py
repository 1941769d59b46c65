"""What a warm trainer does with each request: policy and data stay loaded between them."""

import contextlib
import functools
import hashlib
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from safetensors import SafetensorError
from torch import Tensor

from zk0bot.config.models import ClientConfig, PolicyConfig
from zk0bot.config.paths import Paths
from zk0bot.errors import ConfigError, DataError, MemoryShortError, ModelError, ServiceError
from zk0bot.sim.rollout import Floats, mean_trajectory_actor
from zk0bot.training.checkpoint import save_checkpoint
from zk0bot.training.data import Dataset, check_fits, dataset_id, find_dataset, load_dataset
from zk0bot.training.evaluation import (
    EVALUATION_BATCH,
    StepProgress,
    mean_loss,
    policy_actor,
    run_rollout,
    stratified_frames,
)
from zk0bot.training.exchange import Exchange
from zk0bot.training.loop import (
    LossSum,
    LossView,
    TrainOutcome,
    TrainPlan,
    batch_order,
    drawn_ahead,
    train_steps,
)
from zk0bot.training.memory import MicroBatch
from zk0bot.training.model_folder import TINY_NAME, refuse_foreign_model
from zk0bot.training.policy import (
    base_hash,
    build_policy,
    count_parameters,
    flow_loss_sum,
    load_trainable,
    read_metadata,
    read_tensors,
    trainable_tensors,
)
from zk0bot.training.processing import Batch, Feed, with_noise
from zk0bot.training.protocol import (
    AssessRequest,
    AssessResult,
    BaselineRequest,
    DatasetLoss,
    DatasetStatistics,
    DescribeRequest,
    EvaluateRequest,
    EvaluateResult,
    InitRequest,
    InitResult,
    Message,
    NodeDescription,
    PolicySpec,
    SaveRequest,
    SaveResult,
    TrainAloneRequest,
    TrainAloneResult,
    TrainRequest,
    TrainResult,
)
from zk0bot.training.recording import Ints
from zk0bot.training.reporter import Reporter
from zk0bot.training.statistics import statistics_hash
from zk0bot.version import __version__

logger = logging.getLogger(__name__)

OWN = "own"
"""Stands for a node's own statistics where agreed ones are told apart by their hash."""
MAX_DECODERS = 8
"""Threads that decode pictures, where these do not fit into memory."""


@dataclass(frozen=True, kw_only=True)
class LoadedPolicy:
    """A policy built from a spec; its trained tensors change with every request."""

    spec: PolicySpec
    policy: SmolVLAPolicy
    base_hash: str
    initial: dict[str, Tensor]
    """Its trained tensors as built."""
    training: MicroBatch = field(default_factory=MicroBatch)
    """What fits with gradients."""
    evaluation: MicroBatch = field(default_factory=MicroBatch)
    """What fits without."""


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """A node's dataset and the number by which the server knows it."""

    dataset: Dataset
    dataset_id: str


class Service:
    """Serves one request at a time; owns the policy, the dataset and the exchange folder."""

    def __init__(
        self,
        owner_dir: Path,
        paths: Paths,
        reporter: Reporter,
        *,
        loss_sum: LossSum = flow_loss_sum,
    ) -> None:
        self._owner_dir = owner_dir
        self._paths = paths
        self._reporter = reporter
        self._loss_sum = loss_sum
        self._exchange = Exchange(owner_dir)
        self._device = torch.device("cpu")
        self._own: OwnData | None = None
        self._model_folders: tuple[str, ...] | None = None
        """Those that a server may name; None: this is the server's own process."""
        self._loaded: LoadedPolicy | None = None
        self._sets: dict[str, Dataset] = {}
        self._run_statistics: dict[str, str] = {}

    def load(self, config: ClientConfig | None) -> None:
        """Choose the device and, for a node, make or find its dataset and check it."""
        self._device = find_device(config.device if config else "auto")
        if config is None:
            return
        self._model_folders = config.model_folders
        root = find_dataset(
            config.dataset_uri,
            self._paths,
            revision=config.revision,
            progress=self._reporter.set_loading,
        )
        dataset = load_dataset(
            root,
            episodes=config.episodes,
            heldout_episodes=config.heldout_episodes,
            rename_cameras=config.rename_cameras,
            progress=self._reporter.set_loading,
        )
        number = dataset_id(self._owner_dir, config.dataset_uri)
        name = config.name or f"client-{number[:8]}"
        self._own = OwnData(dataset=dataset, dataset_id=number)
        self._reporter.set_identity(dataset_id=number, name=name)

    def answer(self, request: Message, in_use: set[str]) -> Message:
        """The answer to any request but StatusRequest; raises a Zk0Error where it cannot be given.

        ``in_use`` names the files of this and the waiting requests.
        """
        self._exchange.sweep(in_use)
        try:
            return self._dispatch(request)
        except torch.cuda.OutOfMemoryError as error:
            self._loaded = None
            torch.cuda.empty_cache()
            raise MemoryShortError(
                f"out of memory: {error}", hint="end other programs on this device, or set device"
            ) from error
        except SafetensorError as error:  # those of reading are told apart where files are read
            raise ServiceError(
                f"tensors cannot be written: {error}", hint="free some disk space"
            ) from error

    @functools.singledispatchmethod
    def _dispatch(self, request: Message) -> Message:
        raise AssertionError(f"no answer to {type(request).__name__}")

    @_dispatch.register
    def _(self, request: DescribeRequest) -> NodeDescription:
        own, loaded = self._own_data(), self._policy(request.spec)
        check_fits(own.dataset, request.spec.policy)
        return NodeDescription(
            dataset_id=own.dataset_id,
            num_episodes=own.dataset.num_episodes,
            num_train_frames=len(own.dataset.train),
            num_heldout_frames=len(own.dataset.heldout),
            base_hash=loaded.base_hash,
            statistics=own.dataset.statistics if request.statistics == "pooled" else None,
            device=self._device.type,
            zk0bot_version=__version__,
        )

    @_dispatch.register
    def _(self, request: TrainRequest) -> TrainResult:
        dataset = self._own_data().dataset
        self._refuse_other_statistics(request.run_id, request.statistics)
        statistics = request.statistics or dataset.statistics
        loaded = self._policy_with(request.spec, request.weights_path, request.base_hash)
        feed = self._feed(loaded, dataset, statistics)
        frames = self._heldout_frames(dataset, request.eval_batches)
        loss = None
        if request.evaluate_first and len(frames):
            loss = self._heldout_loss(loaded, feed, frames, request.run_id, request.round)
        plan = TrainPlan(
            steps=request.local_steps,
            batch_size=request.batch_size,
            learning_rate=request.learning_rate,
            proximal_mu=request.proximal_mu,
        )
        outcome = self._train(loaded, feed, plan, request.seed, request.run_id, request.round)
        path = self._exchange.write("update", outcome.update)
        return TrainResult(
            update_path=str(path),
            num_samples=plan.steps * plan.batch_size,
            num_steps=plan.steps,
            loss=outcome.policy_loss + outcome.fedprox_loss,
            policy_loss=outcome.policy_loss,
            fedprox_loss=outcome.fedprox_loss,
            grad_norm=outcome.grad_norm,
            param_update_norm=_norm(outcome.update),
            param_hash=hashlib.sha256(path.read_bytes()).hexdigest(),
            heldout_loss=loss,
            heldout_examples=len(frames) if loss is not None else 0,
            train_s=outcome.train_s,
            micro_batch_size=outcome.micro_batch_size,
        )

    @_dispatch.register
    def _(self, request: EvaluateRequest) -> EvaluateResult:
        dataset = self._own_data().dataset
        self._refuse_other_statistics(request.run_id, request.statistics)
        loaded = self._policy_with(request.spec, request.weights_path, request.base_hash)
        feed = self._feed(loaded, dataset, request.statistics or dataset.statistics)
        frames = self._heldout_frames(dataset, request.eval_batches)
        if not len(frames):
            raise DataError(
                "no episode is held out: there is nothing to evaluate on",
                hint="set heldout-episodes of this client above 0",
            )
        loss = self._heldout_loss(loaded, feed, frames, request.run_id, round_=0)
        return EvaluateResult(loss=loss, num_examples=len(frames))

    @_dispatch.register
    def _(self, request: TrainAloneRequest) -> TrainAloneResult:
        dataset = self._own_data().dataset
        loaded = self._policy(request.spec)
        load_trainable(loaded.policy, loaded.initial)
        plan = TrainPlan(
            steps=request.steps,
            batch_size=request.batch_size,
            learning_rate=request.learning_rate,
        )
        feed = self._feed(loaded, dataset, dataset.statistics)
        outcome = self._train(loaded, feed, plan, request.seed, run_id="alone", round_=1)
        path = self._exchange.write(
            "alone",
            trainable_tensors(loaded.policy),
            statistics=statistics_hash(dataset.statistics),
        )
        return TrainAloneResult(
            weights_path=str(path),
            statistics=dataset.statistics,
            loss=outcome.policy_loss,
            num_steps=plan.steps,
        )

    @_dispatch.register
    def _(self, request: InitRequest) -> InitResult:
        loaded = self._policy(request.spec)
        total, trained = count_parameters(loaded.policy)
        return InitResult(
            weights_path=str(self._exchange.write("init", loaded.initial)),
            base_hash=loaded.base_hash,
            num_parameters=total,
            num_trainable=trained,
        )

    @_dispatch.register
    def _(self, request: AssessRequest) -> AssessResult:
        _refuse_foreign_statistics(Path(request.weights_path), request.statistics)
        loaded = self._policy_with(request.spec, request.weights_path)
        losses = [
            self._set_loss(loaded, request, number, uri)
            for number, uri in enumerate(request.datasets)
        ]
        if request.rollout is None:
            return AssessResult(datasets=losses, rollouts=[])
        total = sum(entry.num_examples for entry in losses)
        weighted = sum(entry.loss * entry.num_examples for entry in losses)
        sectors, videos = run_rollout(
            policy_actor(loaded.policy, request.statistics),
            request.rollout,
            cameras=request.spec.policy.cameras,
            image_size=request.spec.policy.image_size,
            n_action_steps=request.spec.policy.n_action_steps,
            policy_loss=weighted / total if total else None,
            progress=self._show_scenes,
        )
        return AssessResult(datasets=losses, rollouts=sectors, videos=[str(v) for v in videos])

    @_dispatch.register
    def _(self, request: BaselineRequest) -> AssessResult:
        policy = request.spec.policy
        actor = mean_trajectory_actor(
            self._trajectories(request.datasets),
            per_task=request.per_task,
            chunk_size=policy.chunk_size,
        )
        sectors, videos = run_rollout(
            actor,
            request.rollout,
            cameras=policy.cameras,
            image_size=policy.image_size,
            n_action_steps=policy.n_action_steps,
            progress=self._show_scenes,
        )
        return AssessResult(datasets=[], rollouts=sectors, videos=[str(v) for v in videos])

    @_dispatch.register
    def _(self, request: SaveRequest) -> SaveResult:
        if request.statistics is not None:
            _refuse_foreign_statistics(Path(request.weights_path), request.statistics)
        loaded = self._policy_with(request.spec, request.weights_path)
        output_dir = Path(request.output_dir)
        save_checkpoint(
            loaded.policy,
            request.statistics,
            output_dir,
            card=request.card,
            metrics=request.metrics,
        )
        return SaveResult(output_dir=str(output_dir))

    def _own_data(self) -> OwnData:
        if self._own is None:
            raise ConfigError(
                "the server's evaluator has no dataset of its own", hint="ask a client's trainer"
            )
        return self._own

    def _policy(self, spec: PolicySpec) -> LoadedPolicy:
        """The policy of ``spec``, kept from the last request or built."""
        if self._model_folders is not None:
            refuse_foreign_model(spec.policy, self._model_folders)
        if self._loaded is None or self._loaded.spec != spec:
            self._loaded = None  # frees its memory first
            self._reporter.set_state("working", f"building {spec.policy.model_name}")
            torch.set_num_threads(_num_threads(spec.policy, self._device))
            policy = build_policy(spec, self._paths)
            number = base_hash(policy)
            initial = {k: p.detach().clone() for k, p in trainable_tensors(policy).items()}
            self._loaded = LoadedPolicy(
                spec=spec, policy=policy.to(self._device), base_hash=number, initial=initial
            )
        return self._loaded

    def _policy_with(
        self, spec: PolicySpec, weights_path: str, expected_hash: str = ""
    ) -> LoadedPolicy:
        """The policy of ``spec`` with the trained tensors of a file."""
        loaded = self._policy(spec)
        if expected_hash and expected_hash != loaded.base_hash:
            raise ModelError(
                f"this machine has another base model: hash {loaded.base_hash[:12]}, the run's is "
                f"{expected_hash[:12]}",
                hint="use the same model-name, revision and zk0bot version as the server",
            )
        load_trainable(loaded.policy, read_tensors(Path(weights_path)))
        return loaded

    def _feed(self, loaded: LoadedPolicy, dataset: Dataset, statistics: DatasetStatistics) -> Feed:
        check_fits(dataset, loaded.spec.policy)
        return Feed(dataset, loaded.policy, statistics)

    def _train(
        self, loaded: LoadedPolicy, feed: Feed, plan: TrainPlan, seed: int, run_id: str, round_: int
    ) -> TrainOutcome:
        dataset = feed.dataset
        key = (seed, dataset.fingerprint, round_)

        def draw_one(step: int) -> Batch:
            places = batch_order(len(dataset.train), plan.batch_size, step, key)
            return with_noise(feed.batch(dataset.train[places]), feed.noise_shape, (*key, step))

        draw: Callable[[int], Batch] = draw_one
        view = LossView(self._device)
        self._reporter.set_state("working", "training")
        self._reporter.begin_order("training", run_id=run_id, round_=round_, steps=plan.steps)
        with contextlib.ExitStack() as stack:
            if not dataset.is_decoded:
                workers = min(MAX_DECODERS, os.cpu_count() or 1)
                draw = stack.enter_context(drawn_ahead(draw, plan.steps, workers))
            outcome = train_steps(
                loaded.policy,
                draw,
                plan,
                loss_sum=self._loss_sum,
                progress=lambda step, loss: self._reporter.step(step, lambda: view.read(loss)),
                micro_batch=loaded.training,
            )
        self._reporter.end_order()
        return outcome

    def _heldout_frames(self, dataset: Dataset, eval_batches: int) -> Ints:
        limit = eval_batches * EVALUATION_BATCH
        return stratified_frames(dataset.recording.episode_N, dataset.heldout, limit)

    def _heldout_loss(
        self, loaded: LoadedPolicy, feed: Feed, frames: Ints, run_id: str, round_: int
    ) -> float:
        self._reporter.set_state("working", "evaluating")
        self._reporter.begin_order("evaluating", run_id=run_id, round_=round_, steps=len(frames))
        loss = self._mean_loss(loaded, feed, frames, lambda done, _: self._reporter.step(done))
        self._reporter.end_order()
        return loss

    def _mean_loss(
        self,
        loaded: LoadedPolicy,
        feed: Feed,
        frames: Ints,
        progress: StepProgress = lambda k, n: None,
    ) -> float:
        return mean_loss(
            loaded.policy,
            feed,
            frames,
            progress,
            loss_sum=self._loss_sum,
            micro_batch=loaded.evaluation,
        )

    def _set_loss(
        self, loaded: LoadedPolicy, request: AssessRequest, number: int, uri: str
    ) -> DatasetLoss:
        self._reporter.set_state("working", "evaluating", number, len(request.datasets))
        dataset = self._evaluation_set(uri)
        frames = stratified_frames(
            dataset.recording.episode_N, dataset.train, request.eval_batches * EVALUATION_BATCH
        )
        loss = self._mean_loss(loaded, self._feed(loaded, dataset, request.statistics), frames)
        return DatasetLoss(
            dataset_name=uri, evaldata_id=number, loss=loss, num_examples=len(frames)
        )

    def _evaluation_set(self, uri: str) -> Dataset:
        """All episodes of a dataset, kept for the next request."""
        if uri not in self._sets:
            root = find_dataset(uri, self._paths, progress=self._show_work)
            self._sets[uri] = load_dataset(root, progress=self._show_work)
        return self._sets[uri]

    def _trajectories(self, uris: list[str]) -> dict[str, Floats]:
        """Per instruction the actions E,T,6 of all episodes, the shorter ones held at their end."""
        found: dict[str, list[Floats]] = {}
        for uri in uris:
            recording = self._evaluation_set(uri).recording
            for number in range(recording.num_episodes):
                rows = np.flatnonzero(recording.episode_N == number)
                text = recording.tasks[recording.task_N[rows[0]]]
                found.setdefault(text, []).append(recording.actions_NA[rows])
        longest = max(len(actions) for episodes in found.values() for actions in episodes)
        return {
            text: np.stack([_held(actions, longest) for actions in episodes])
            for text, episodes in found.items()
        }

    def _show_work(self, detail: str, done: int, total: int) -> None:
        self._reporter.set_state("working", detail, done, total)

    def _show_scenes(self, done: int, total: int) -> None:
        self._reporter.set_state("working", "trying in simulation", done, total)

    def _refuse_other_statistics(self, run_id: str, statistics: DatasetStatistics | None) -> None:
        """Weights trained with one set of statistics and used with another lose most of what they
        can do, and nothing shows it."""
        kind = OWN if statistics is None else statistics_hash(statistics)
        if self._run_statistics.setdefault(run_id, kind) != kind:
            raise ModelError(
                f"run {run_id} has used other normalisation statistics until now",
                hint="use the same policy (pooled or local) and the same statistics in all rounds",
            )


def find_device(wanted: Literal["auto", "cuda", "cpu"]) -> torch.device:
    """The device to work on; ConfigError when CUDA is asked for and not there."""
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise ConfigError("device is cuda, but there is none", hint="set device to auto or cpu")
    return torch.device("cuda" if has_cuda and wanted != "cpu" else "cpu")


def _num_threads(policy: PolicyConfig, device: torch.device) -> int:
    """One for the tiny model: more spend their time waiting for each other."""
    if policy.model_name == TINY_NAME:
        return 1
    if device.type == "cpu":
        logger.warning("%s trains on the CPU: this takes very long", policy.model_name)
    return os.cpu_count() or 1


def _norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def _held(actions: Floats, length: int) -> Floats:
    """``actions`` T,6 made ``length`` long by repeating the last."""
    return np.concatenate([actions, np.repeat(actions[-1:], length - len(actions), axis=0)])


def _refuse_foreign_statistics(weights_path: Path, statistics: DatasetStatistics) -> None:
    """Weights that name the statistics they were trained with are used with no others."""
    named = read_metadata(weights_path).get("statistics")
    if named is not None and named != statistics_hash(statistics):
        raise ModelError(
            f"{weights_path.name} was trained with other normalisation statistics",
            hint="evaluate and save it with the statistics that came with it",
        )
