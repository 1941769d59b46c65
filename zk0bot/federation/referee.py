"""Judging the model while clients train on: evaluations and checkpoints in the background.

The server's warm process does the work; one worker thread waits for it. Results are taken in by
the round loop, which alone writes the record.
"""

import logging
import math
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from zk0bot.config.models import RunConfig
from zk0bot.errors import RunError
from zk0bot.federation.background import Worker
from zk0bot.federation.card import write_card
from zk0bot.federation.codec import Tensors
from zk0bot.federation.evaluator import Evaluator, composite_loss
from zk0bot.federation.output import AcceptedUpdate, OutputTree
from zk0bot.federation.run_log import RunLog
from zk0bot.training.protocol import AssessResult, DatasetStatistics, EvaluateResult

logger = logging.getLogger(__name__)
FILMED_SCENES = 1
LAST_SAVE_S = 120.0
"""How long the end of a failed run waits for checkpoints that were begun."""
ClientLosses = dict[str, tuple[float, int]]
"""Held-out loss and number of examples by client name."""


@dataclass(frozen=True)
class Job[T]:
    """Work of the server's warm process on the weights of one round."""

    round: int
    future: Future[T]


@dataclass
class View:
    """What is known of the model after one round."""

    accepted: list[AcceptedUpdate] = field(default_factory=list)
    assessed: AssessResult | None = None
    by_client: ClientLosses = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """Of the server's own sets where it has some, else of the clients' held-out episodes."""
        if self.assessed and self.assessed.datasets:
            pairs = [(entry.loss, entry.num_examples) for entry in self.assessed.datasets]
            return composite_loss(pairs)
        return composite_loss(list(self.by_client.values())) if self.by_client else None


@dataclass
class Referee:
    """Evaluates every eval-frequency rounds, round 0 and the last; saves checkpoints."""

    config: RunConfig
    evaluator: Evaluator
    output: OutputTree
    log: RunLog
    worker: Worker = field(default_factory=Worker)
    _views: dict[int, View] = field(default_factory=dict)
    _assessments: list[Job[AssessResult]] = field(default_factory=list)
    _saves: list[Job[None]] = field(default_factory=list)
    _stored: dict[int, Path] = field(default_factory=dict)
    """Weights that jobs read, by round."""

    def is_due(self, round_: int) -> bool:
        """Whether the model after ``round_`` rounds is evaluated; clients measure it, too."""
        frequency = self.config.eval_frequency
        last = self.config.num_server_rounds
        return frequency > 0 and (round_ % frequency == 0 or round_ == last)

    def begin(
        self,
        round_: int,
        weights: Tensors,
        statistics: DatasetStatistics | None,
        accepted: list[AcceptedUpdate],
    ) -> None:
        """After ``round_`` (0: before training): begin what is due, checkpoint first."""
        self._note_clients_view(round_ - 1, accepted)
        self._save(round_, weights, statistics)
        self._assess(round_, weights, statistics, accepted)
        self.collect()

    def collect(self) -> None:
        """Take in evaluations and saves that have finished; their errors surface here."""
        while self._saves and self._saves[0].future.done():
            self._saves.pop(0).future.result()
        while self._assessments and self._assessments[0].future.done():
            job = self._assessments.pop(0)
            self._note_assessment(job.round, job.future.result())
        self._remove_used_weights()

    def is_busy(self) -> bool:
        """Whether anything that was begun is not taken in yet."""
        return bool(self._assessments or self._saves)

    def note_final_losses(self, results: dict[str, EvaluateResult]) -> None:
        """The clients' view of the last round."""
        losses = {name: (result.loss, result.num_examples) for name, result in results.items()}
        self._update(self.config.num_server_rounds, by_client=losses)

    def close(self) -> None:
        """Drop evaluations, wait a little for checkpoints, draw what is known."""
        for job in self._assessments:
            job.future.cancel()
        wait([job.future for job in self._saves], timeout=LAST_SAVE_S)
        self.output.draw_charts()

    def comparable_losses(self) -> dict[int, float]:
        """Held-out loss by round; first and last over the same clients, where clients measured."""
        losses = dict(self.output.losses)
        last = self.config.num_server_rounds
        ends = [self._views.get(0, View()), self._views.get(last, View())]
        if not all(view.by_client and view.assessed is None for view in ends):
            return losses
        both = ends[0].by_client.keys() & ends[1].by_client.keys()
        if not both:
            return {round_: loss for round_, loss in losses.items() if 0 < round_ < last}
        for round_, view in zip((0, last), ends, strict=True):
            losses[round_] = composite_loss([view.by_client[name] for name in sorted(both)])
        return losses

    def _assess(
        self,
        round_: int,
        weights: Tensors,
        statistics: DatasetStatistics | None,
        accepted: list[AcceptedUpdate],
    ) -> None:
        has_own = bool(self.config.eval_datasets or self.config.eval_scenes)
        if not (self.is_due(round_) and has_own and statistics):
            return
        self._views.setdefault(round_, View()).accepted = accepted
        is_last = round_ == self.config.num_server_rounds
        work = partial(
            self.evaluator.assess,
            self._store(round_, weights),
            statistics,
            video_dir=self.output.video_dir(round_),
            videos=FILMED_SCENES if is_last else 0,
        )
        self._assessments.append(Job(round_, self.worker.submit(work)))

    def _note_assessment(self, round_: int, result: AssessResult) -> None:
        episodes = sum(entry.episodes for entry in result.rollouts)
        if episodes:
            successes = sum(entry.successes for entry in result.rollouts)
            self.log.update(success=successes / episodes)
            logger.info("round %d: closed loop %d/%d", round_, successes, episodes)
        self._update(round_, assessed=result)

    def _note_clients_view(self, round_: int, accepted: list[AcceptedUpdate]) -> None:
        """What the clients of the next round measured before they trained."""
        losses = {
            update.member.name: (update.result.heldout_loss, update.result.heldout_examples)
            for update in accepted
            if update.result.heldout_loss is not None and update.result.heldout_examples
        }
        if losses:
            self._update(round_, by_client=losses)

    def _update(self, round_: int, **changes: object) -> None:
        """Add to what is known of a round, and write it once there is a loss."""
        view = self._views.setdefault(round_, View())
        for name, value in changes.items():
            setattr(view, name, value)
        if (loss := view.loss) is None:
            return
        if not math.isfinite(loss):
            raise RunError(f"round {round_}: the held-out loss is {loss}")
        logger.info("round %d: held-out loss %.4f", round_, loss)
        self.output.write_evaluation(round_, loss, view.accepted, view.assessed)
        self.log.update(loss=loss)

    def _save(self, round_: int, weights: Tensors, statistics: DatasetStatistics | None) -> None:
        interval = self.config.checkpoint_interval
        is_last = round_ == self.config.num_server_rounds
        if not (is_last or (interval and round_ > 0 and round_ % interval == 0)):
            return
        metrics: dict[str, float | int | str | None] = {
            "round": round_,
            "num_rounds": self.config.num_server_rounds,
            "run_id": self.log.record.run_id,
            "held_out_loss": self.output.losses.get(round_),
        }
        work = partial(
            self.evaluator.save,
            self._store(round_, weights),
            statistics,
            self.output.checkpoint_dir(round_),
            card=write_card(self.config, self.log.record.run_id, round_, self.output.losses),
            metrics=metrics,
        )
        self._saves.append(Job(round_, self.worker.submit(work)))

    def _store(self, round_: int, weights: Tensors) -> Path:
        if round_ not in self._stored:
            self._stored[round_] = self.evaluator.store(weights, round_)
        return self._stored[round_]

    def _remove_used_weights(self) -> None:
        """Those of the last round stay: who compares policies afterwards reads them."""
        needed = {job.round for job in self._assessments} | {job.round for job in self._saves}
        for round_ in self._stored.keys() - needed - {self.config.num_server_rounds}:
            self._stored.pop(round_).unlink(missing_ok=True)
