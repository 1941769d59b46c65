"""Judging the model while clients train on: evaluations and checkpoints in the background.

The server's warm process does the work; one worker thread waits for it. Results are taken in by
the round loop, which alone writes the record.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from zk0bot.config.models import RunConfig
from zk0bot.errors import RunError
from zk0bot.federation.card import write_card
from zk0bot.federation.codec import Tensors
from zk0bot.federation.evaluator import Evaluator, composite_loss
from zk0bot.federation.output import AcceptedUpdate, OutputTree
from zk0bot.federation.run_log import RunLog
from zk0bot.training.protocol import AssessResult, DatasetStatistics, EvaluateResult

logger = logging.getLogger(__name__)
FILMED_SCENES = 1


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation on its way."""

    round: int
    accepted: list[AcceptedUpdate]
    future: Future[AssessResult]


@dataclass
class Referee:
    """Evaluates every eval-frequency rounds, round 0 and the last; saves checkpoints."""

    config: RunConfig
    evaluator: Evaluator
    output: OutputTree
    log: RunLog
    _worker: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="referee")
    )
    _open: list[Evaluation] = field(default_factory=list)
    _saves: list[Future[None]] = field(default_factory=list)

    @property
    def is_server_side(self) -> bool:
        """Whether the server evaluates on sets or scenes of its own."""
        return bool(self.config.eval_datasets or self.config.eval_scenes)

    def is_due(self, round_: int) -> bool:
        """Whether the model after ``round_`` rounds is evaluated."""
        frequency = self.config.eval_frequency
        last = self.config.num_server_rounds
        return frequency > 0 and (round_ % frequency == 0 or round_ == last)

    def wants_clients_view_of(self, round_: int) -> bool:
        """Whether clients measure the weights they receive after ``round_`` rounds."""
        return self.is_due(round_)

    def evaluate(
        self,
        round_: int,
        weights: Tensors,
        statistics: DatasetStatistics | None,
        accepted: list[AcceptedUpdate],
    ) -> None:
        """Begin the server's evaluation of ``round_``, if it is due and the server has one."""
        if not (self.is_due(round_) and self.is_server_side and statistics):
            return
        is_last = round_ == self.config.num_server_rounds
        future = self._worker.submit(
            self.evaluator.assess,
            weights,
            statistics,
            name=f"round_{round_}",
            video_dir=self.output.video_dir(round_),
            videos=FILMED_SCENES if is_last else 0,
        )
        self._open.append(Evaluation(round=round_, accepted=accepted, future=future))

    def after_round(
        self,
        round_: int,
        weights: Tensors,
        statistics: DatasetStatistics | None,
        accepted: list[AcceptedUpdate],
    ) -> None:
        """Take the clients' view of the round before; begin evaluation and checkpoint if due."""
        if self.is_due(round_ - 1) and not self.config.eval_datasets:
            self._take_clients_view(round_ - 1, accepted)
        self.evaluate(round_, weights, statistics, accepted)
        interval = self.config.checkpoint_interval
        is_last = round_ == self.config.num_server_rounds
        if is_last or (interval and round_ % interval == 0):
            self._save(round_, weights, statistics)
        self.collect()

    def collect(self, *, wait: bool = False) -> None:
        """Take in evaluations and saves that have finished; their errors surface here."""
        while self._open and (wait or self._open[0].future.done()):
            self._take(self._open.pop(0))
        while self._saves and (wait or self._saves[0].done()):
            self._saves.pop(0).result()

    def finish(self, final: list[EvaluateResult]) -> None:
        """Wait for what is open; ``final`` is the clients' view of the last round, if asked for."""
        self.collect(wait=True)
        pairs = [(result.loss, result.num_examples) for result in final]
        if pairs:
            self._note_loss(self.config.num_server_rounds, composite_loss(pairs), [], None)

    def close(self) -> None:
        """Drop what has not begun; draw what is known."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        self.output.draw_charts()

    def _take_clients_view(self, round_: int, accepted: list[AcceptedUpdate]) -> None:
        pairs = [
            (update.result.heldout_loss, update.result.heldout_examples)
            for update in accepted
            if update.result.heldout_loss is not None and update.result.heldout_examples
        ]
        if pairs:
            self._note_loss(round_, composite_loss(pairs), accepted, None)

    def _take(self, evaluation: Evaluation) -> None:
        result = evaluation.future.result()
        episodes = sum(entry.episodes for entry in result.rollouts)
        if episodes:
            successes = sum(entry.successes for entry in result.rollouts)
            self.log.update(success=successes / episodes)
            logger.info("round %d: closed loop %d/%d", evaluation.round, successes, episodes)
        if result.datasets:
            loss = composite_loss([(entry.loss, entry.num_examples) for entry in result.datasets])
            self._note_loss(evaluation.round, loss, evaluation.accepted, result)

    def _note_loss(
        self,
        round_: int,
        loss: float,
        accepted: list[AcceptedUpdate],
        assessed: AssessResult | None,
    ) -> None:
        logger.info("round %d: held-out loss %.4f", round_, loss)
        if loss != loss:
            raise RunError(f"round {round_}: the held-out loss is NaN")
        self.output.write_evaluation(round_, loss, accepted, assessed)
        self.log.update(loss=loss)

    def _save(self, round_: int, weights: Tensors, statistics: DatasetStatistics | None) -> None:
        metrics: dict[str, float | int | str | None] = {
            "round": round_,
            "num_rounds": self.config.num_server_rounds,
            "run_id": self.log.record.run_id,
            "held_out_loss": self.output.losses.get(round_),
        }
        card = write_card(self.config, self.log.record.run_id, round_, self.output.losses)
        self._saves.append(
            self._worker.submit(
                self.evaluator.save,
                weights,
                statistics,
                self.output.checkpoint_dir(round_),
                card=card,
                metrics=metrics,
            )
        )
