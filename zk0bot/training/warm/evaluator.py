"""What the server's warm process does: the initial policy, the referee's view, checkpoints."""

from pathlib import Path

import numpy as np

from zk0bot.config.paths import Paths
from zk0bot.errors import ModelError
from zk0bot.sim.rollout import Actor, Floats, mean_trajectory_actor
from zk0bot.training.data.dataset import Dataset, check_fits, decode_if_it_fits, load_dataset
from zk0bot.training.data.marks import mark_episodes
from zk0bot.training.data.source import find_dataset, refuse_real_data
from zk0bot.training.data.statistics import statistics_hash
from zk0bot.training.evaluation import (
    ERROR_FRAMES,
    EVALUATION_BATCH,
    policy_actor,
    run_pairs,
    run_rollout,
    stratified_frames,
)
from zk0bot.training.filming import save_open_loop
from zk0bot.training.model.checkpoint import MovedBase, save_checkpoint
from zk0bot.training.model.policy import count_parameters, read_metadata
from zk0bot.training.processing import Feed
from zk0bot.training.protocol import (
    AssessRequest,
    AssessResult,
    BaselineRequest,
    DatasetLoss,
    DatasetStatistics,
    HeldoutSet,
    InitRequest,
    InitResult,
    MarkRequest,
    MarkResult,
    PairResult,
    PolicySpec,
    RolloutRequest,
    SaveRequest,
    SaveResult,
)
from zk0bot.training.warm.exchange import Exchange
from zk0bot.training.warm.loaded import LoadedPolicy, PolicyKeeper
from zk0bot.training.warm.reporter import Reporter


class Evaluator:
    """Policies of whatever weights, judged on the server's own sets and in simulation."""

    def __init__(
        self, paths: Paths, *, keeper: PolicyKeeper, exchange: Exchange, reporter: Reporter
    ) -> None:
        self._paths = paths
        self._keeper = keeper
        self._exchange = exchange
        self._reporter = reporter
        self._sets: dict[tuple[str, str], Dataset] = {}
        """By URI and episodes."""

    def init(self, request: InitRequest) -> InitResult:
        loaded = self._keeper.get(request.spec)
        total, trained = count_parameters(loaded.policy)
        return InitResult(
            weights_path=str(self._exchange.write("init", loaded.initial)),
            base_hash=loaded.base_hash,
            num_parameters=total,
            num_trainable=trained,
        )

    def assess(self, request: AssessRequest) -> AssessResult:
        _refuse_foreign_statistics(Path(request.weights_path), request.statistics)
        loaded = self._keeper.get_with(request.spec, Path(request.weights_path))
        losses = [
            self._set_loss(loaded, request, number, uri, self._evaluation_set(uri))
            for number, uri in enumerate(request.datasets)
        ]
        heldout = [
            self._set_loss(loaded, request, number, part.dataset, self._heldout_set(part))
            for number, part in enumerate(request.heldout)
        ]
        actor = policy_actor(loaded.policy, request.statistics)
        films = [str(film) for entry in losses for film in self._film(actor, request, entry)]
        if request.rollout is None:
            return AssessResult(datasets=losses, rollouts=[], videos=films, heldout=heldout)
        total = sum(entry.num_examples for entry in losses)
        weighted = sum(entry.loss * entry.num_examples for entry in losses)
        loss = weighted / total if total else None
        result = self._roll_out(actor, request.rollout, request.spec, losses, loss)
        return result.model_copy(update={"videos": [*films, *result.videos], "heldout": heldout})

    def mark(self, request: MarkRequest) -> MarkResult:
        sets = [self._evaluation_set(uri) for uri in request.datasets]
        return MarkResult(marks=[mark_episodes(s, s.train, request.key) for s in sets])

    def baseline(self, request: BaselineRequest) -> AssessResult:
        actor = mean_trajectory_actor(
            self._trajectories(request.datasets),
            per_task=request.per_task,
            chunk_size=request.spec.policy.chunk_size,
        )
        return self._roll_out(actor, request.rollout, request.spec, [], None)

    def save(self, request: SaveRequest) -> SaveResult:
        if request.statistics is not None:
            _refuse_foreign_statistics(Path(request.weights_path), request.statistics)
        loaded = self._keeper.get_with(request.spec, Path(request.weights_path))
        output_dir = Path(request.output_dir)
        save_checkpoint(
            loaded.policy,
            request.statistics,
            output_dir,
            card=request.card,
            metrics=request.metrics,
            moved=_moved_base(loaded),
        )
        return SaveResult(output_dir=str(output_dir))

    def _roll_out(
        self,
        actor: Actor,
        request: RolloutRequest,
        spec: PolicySpec,
        losses: list[DatasetLoss],
        policy_loss: float | None,
    ) -> AssessResult:
        sectors, videos = run_rollout(
            actor,
            request,
            cameras=spec.policy.cameras,
            image_size=spec.policy.image_size,
            n_action_steps=spec.policy.n_action_steps,
            policy_loss=policy_loss,
            progress=self._show_scenes,
        )
        return AssessResult(
            datasets=losses,
            rollouts=sectors,
            videos=[str(video) for video in videos],
            pairs=self._try_pairs(actor, request, spec) if request.every_pair else [],
        )

    def _try_pairs(
        self, actor: Actor, request: RolloutRequest, spec: PolicySpec
    ) -> list[PairResult]:
        return run_pairs(
            actor,
            request,
            cameras=spec.policy.cameras,
            image_size=spec.policy.image_size,
            n_action_steps=spec.policy.n_action_steps,
            progress=self._show_scenes,
        )

    def _set_loss(
        self,
        loaded: LoadedPolicy,
        request: AssessRequest,
        number: int,
        uri: str,
        dataset: Dataset,
    ) -> DatasetLoss:
        total = len(request.datasets) + len(request.heldout)
        self._reporter.set_state("working", "evaluating", number, total)
        decode_if_it_fits(dataset, self._show_work)
        frames = stratified_frames(
            dataset.recording.episode_N, dataset.train, request.eval_batches * EVALUATION_BATCH
        )
        check_fits(dataset, loaded.spec.policy)
        feed = Feed(dataset, loaded.policy, request.statistics)
        loss = loaded.mean_loss(feed, frames)
        some = stratified_frames(dataset.recording.episode_N, frames, ERROR_FRAMES)
        by_joint, by_step = loaded.action_error(feed, request.statistics, some)
        return DatasetLoss(
            dataset_name=uri,
            evaldata_id=number,
            loss=loss,
            num_examples=len(frames),
            action_error=by_joint,
            action_error_by_step=by_step,
        )

    def _film(self, actor: Actor, request: AssessRequest, entry: DatasetLoss) -> list[Path]:
        """The first episodes of an evaluation set, filmed open loop."""
        dataset = self._evaluation_set(entry.dataset_name)
        self._reporter.set_state("working", "filming")
        return [
            save_open_loop(
                dataset,
                number,
                actor,
                Path(request.film_dir) / f"evaldata_{entry.evaldata_id}",
                cameras=request.spec.policy.cameras,
                n_action_steps=request.spec.policy.n_action_steps,
                policy_loss=entry.loss,
            )
            for number in range(min(request.films, dataset.num_episodes))
        ]

    def _evaluation_set(self, uri: str, episodes: str = "") -> Dataset:
        """These episodes of a dataset, all by default, kept for the next request."""
        if (uri, episodes) not in self._sets:
            root = find_dataset(uri, self._paths, progress=self._show_work)
            found = load_dataset(root, episodes=episodes, progress=self._show_work)
            self._sets[uri, episodes] = found
        return self._sets[uri, episodes]

    def _heldout_set(self, part: HeldoutSet) -> Dataset:
        """Raises ConfigError for real data."""
        refuse_real_data(part.dataset)
        return self._evaluation_set(part.dataset, part.episodes)

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
        self._reporter.set_work(detail, done, total)

    def _show_scenes(self, done: int, total: int) -> None:
        self._reporter.set_state("working", "trying in simulation", done, total)


def _held(actions: Floats, length: int) -> Floats:
    """``actions`` T,6 made ``length`` long by repeating the last."""
    return np.concatenate([actions, np.repeat(actions[-1:], length - len(actions), axis=0)])


def _moved_base(loaded: LoadedPolicy) -> MovedBase | None:
    if not loaded.base.is_moved:
        return None
    return MovedBase(change=loaded.base.change, hash=loaded.base_hash)


def _refuse_foreign_statistics(weights_path: Path, statistics: DatasetStatistics) -> None:
    """Weights that name the statistics they were trained with are used with no others."""
    named = read_metadata(weights_path).get("statistics")
    if named is not None and named != statistics_hash(statistics):
        raise ModelError(
            f"{weights_path.name} was trained with other normalisation statistics",
            hint="evaluate and save it with the statistics that came with it",
        )
