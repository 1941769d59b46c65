"""The round loop: wait, send, collect, gate, fold, step, evaluate, save.

Flower's own ``Strategy.start`` holds all replies in memory, waits for ever below the minimum, has
no checkpoint and calls an untrained run completed.
"""

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from zk0bot.config.models import RunConfig
from zk0bot.errors import DeadlineError, RunError, UpdateError
from zk0bot.federation.aggregation import (
    RunningMean,
    ServerOptimizer,
    apply_change,
    build_server_optimizer,
)
from zk0bot.federation.codec import Tensors, decode, encode, norm, shapes_of
from zk0bot.federation.cohort import Cohort
from zk0bot.federation.gate import check_update
from zk0bot.federation.messages import unpack, unpack_blob
from zk0bot.federation.output import AcceptedUpdate, OutputTree
from zk0bot.federation.referee import Referee
from zk0bot.federation.run_log import RunLog
from zk0bot.federation.schedule import build_train_request
from zk0bot.federation.transport import Courier, Reply
from zk0bot.files import replacing
from zk0bot.records import ClientProgress
from zk0bot.report.verdict import RoundOutcome
from zk0bot.training.protocol import (
    DatasetStatistics,
    EvaluateRequest,
    EvaluateResult,
    TrainRequest,
    TrainResult,
)
from zk0bot.training.statistics import pool_statistics

logger = logging.getLogger(__name__)

SETTLE_S = 30.0
"""With enough clients, how long others that are still loading are waited for before round 1."""
LOOK_S = 0.25
"""Between looks at who is online."""
POLL_S = 0.05
"""Between looks at flags and progress files; asking the SuperLink is far rarer."""


class RunStopped(RunError):
    """Somebody asked this run to end."""

    code = "run_stopped"


@dataclass
class RoundReplies:
    """What the nodes of one round have answered so far."""

    accepted: dict[int, AcceptedUpdate] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    def is_answered(self, node_id: int) -> bool:
        return node_id in self.accepted or node_id in self.failures


@dataclass
class Federation:
    """One run's parts, wired by ``server_app``; ``run`` takes it to its last round."""

    config: RunConfig
    courier: Courier
    cohort: Cohort
    referee: Referee
    log: RunLog
    output: OutputTree
    scratch: Path
    weights: Tensors
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    outcomes: list[RoundOutcome] = field(default_factory=list)

    def run(self) -> None:
        """All rounds, with evaluations and checkpoints.

        Raises DeadlineError when too few clients come, RunError when a round misses its quorum or
        an evaluation fails, RunStopped when somebody asked for the end.
        """
        try:
            self._run()
        finally:
            self.referee.close()

    def _run(self) -> None:
        optimizer = build_server_optimizer(self.config)
        self._wait_for_members()
        statistics = self._agree_on_statistics()
        self.referee.begin(0, self.weights, statistics, [])
        started = self.clock()
        for round_ in range(1, self.config.num_server_rounds + 1):
            accepted = self._run_round(round_, optimizer, statistics)
            self.referee.begin(round_, self.weights, statistics, accepted)
            self._note_progress(round_, started)
        self.log.enter("evaluating")
        self.referee.note_final_losses(self._ask_for_final_losses(statistics))
        while self.referee.is_busy():
            self._check_stop()
            self.referee.collect()
            self.sleep(POLL_S)

    def _wait_for_members(self) -> None:
        """Until min-fit-clients members have described themselves, and a little for the others.

        What the others say later is taken in before the next round.
        """
        needed = self.config.min_fit_clients
        deadline = self.clock() + self.config.wait_deadline_s
        settled_by = None
        self.log.enter("waiting for clients", state="waiting", reason=f"0 of {needed} clients")
        while True:
            here = self.cohort.available(self.courier, self._look_around())
            reason = f"{len(here)} of {needed} clients are ready"
            self.log.update(reason=reason)
            if len(here) >= needed:
                settled_by = settled_by or self.clock() + SETTLE_S
                if self.cohort.is_settled() or self.clock() > settled_by:
                    return
            self._check_deadline(deadline, reason)
            self.sleep(LOOK_S)

    def _look_around(self) -> list[int]:
        """Online nodes, after asking newcomers and taking in what has arrived."""
        self._check_stop()
        online = self.courier.nodes()
        self.cohort.take_answers(self.courier)
        self.cohort.forget_absent(online)
        self.courier.drop_late(online, keep=self.cohort.asked)
        self.cohort.ask_newcomers(self.courier, online)
        return online

    def _agree_on_statistics(self) -> DatasetStatistics | None:
        if self.config.statistics == "local":
            return None
        members = sorted(self.cohort.members.values(), key=lambda member: member.name)
        return pool_statistics([member.statistics for member in members if member.statistics])

    def _run_round(
        self, round_: int, optimizer: ServerOptimizer, statistics: DatasetStatistics | None
    ) -> list[AcceptedUpdate]:
        chosen = self._choose(round_)
        replies = self._send_and_collect(round_, chosen, statistics)
        accepted = [replies.accepted[n] for n in self._by_name(replies.accepted)]
        self._require_quorum(round_, chosen, replies)
        self.log.enter("aggregating")
        change = optimizer.step(self._fold(replies))
        self.weights = apply_change(self.weights, change)
        outcome = RoundOutcome(
            round=round_,
            accepted=len(accepted),
            asked=len(chosen),
            update_norm=norm(change),
            finite=all(bool(np.isfinite(value).all()) for value in self.weights.values()),
            failures=self._failure_lines(replies),
        )
        self.outcomes.append(outcome)
        if not outcome.finite:
            raise RunError(f"round {round_}: the aggregated model holds NaN or Inf")
        self.output.write_round(round_, accepted, outcome.update_norm)
        return accepted

    def _choose(self, round_: int) -> list[int]:
        """Nodes to ask; waits for quorum if members are offline or still owe a reply."""
        needed = self.config.min_fit_clients
        deadline = self.clock() + self.config.wait_deadline_s
        while True:
            online = self._look_around()
            available = self.cohort.available(self.courier, online)
            if len(available) >= needed:
                return self.cohort.choose(available, round_)
            reason = f"round {round_}: {len(available)} of {needed} clients are available"
            self.log.update(state="degraded", phase="waiting for clients", reason=reason)
            self._check_deadline(deadline, reason)
            self.sleep(LOOK_S)

    def _send_and_collect(
        self, round_: int, chosen: list[int], statistics: DatasetStatistics | None
    ) -> RoundReplies:
        lines = [
            ClientProgress(node_id=str(n), name=self.cohort.members[n].name, phase="sending")
            for n in chosen
        ]
        self.log.enter("training", state="running", reason="", round=round_, clients=lines)
        replies = RoundReplies()
        blob = encode(self.weights)
        orders = {n: self._send(n, round_, blob, statistics, replies) for n in chosen}
        deadline = self.clock() + self.config.round_deadline_s
        while not all(replies.is_answered(n) for n in chosen) and self.clock() < deadline:
            self._check_stop()
            for reply in self.courier.poll(chosen):
                self._take_reply(round_, reply, orders[reply.node_id], replies)
            self.log.take_progress(round_)
            self._count_bytes()
            self.referee.collect()
            self.sleep(POLL_S)
        self._count_bytes()
        for node_id in chosen:
            if not replies.is_answered(node_id):
                reason = f"no answer within {self.config.round_deadline_s:g} s"
                self._fail(node_id, reason, replies, phase="late")
        return replies

    def _send(
        self,
        node_id: int,
        round_: int,
        blob: bytes,
        statistics: DatasetStatistics | None,
        replies: RoundReplies,
    ) -> TrainRequest:
        request = build_train_request(
            self.config,
            spec=self.cohort.spec,
            base_hash=self.cohort.base_hash,
            run_id=self.log.record.run_id,
            round_=round_,
            node=self.cohort.members[node_id],
            statistics=statistics,
            evaluate_first=self.referee.is_due(round_ - 1),
        )
        why = self.courier.send(
            node_id,
            "train",
            request,
            group=str(round_),
            deadline_s=self.config.round_deadline_s,
            blob=blob,
        )
        if why:
            self._fail(node_id, why, replies)
        return request

    def _take_reply(
        self, round_: int, reply: Reply, request: TrainRequest, replies: RoundReplies
    ) -> None:
        if reply.content is None:
            self._fail(reply.node_id, reply.failure, replies)
            return
        try:
            result = unpack(reply.content, TrainResult)
            blob = unpack_blob(reply.content)
            update = check_update(blob, result, request, shapes_of(self.weights))
        except UpdateError as error:
            self._fail(reply.node_id, f"update refused: {error.message}", replies)
            return
        with replacing(self._update_file(reply.node_id)) as temporary:
            temporary.write_bytes(blob)
        replies.accepted[reply.node_id] = AcceptedUpdate(
            node=self.cohort.members[reply.node_id], result=result, update_norm=norm(update)
        )
        self.log.set_client(
            reply.node_id,
            phase="done",
            step=result.num_steps,
            steps=result.num_steps,
            loss=result.loss,
        )
        self._tell(
            reply.node_id,
            f"round {round_}: {len(blob)} bytes after {result.num_steps} steps, "
            f"loss {result.loss:.4f}",
        )

    def _fold(self, replies: RoundReplies) -> Tensors:
        """The mean update, weighted by samples seen, folded in the order of client names."""
        mean = RunningMean()
        for node_id in self._by_name(replies.accepted):
            update = decode(self._update_file(node_id).read_bytes())
            mean.fold(update, replies.accepted[node_id].result.num_samples)
        shutil.rmtree(self.scratch, ignore_errors=True)
        return mean.mean()

    def _by_name(self, node_ids: Iterable[int]) -> list[int]:
        """An order that repeats: node ids differ from start to start, names do not."""
        return sorted(node_ids, key=lambda n: self.cohort.members[n].name)

    def _count_bytes(self) -> None:
        self.log.update(bytes_up=self.courier.bytes_up, bytes_down=self.courier.bytes_down)

    def _require_quorum(self, round_: int, chosen: list[int], replies: RoundReplies) -> None:
        needed = self.config.min_fit_clients
        if len(replies.accepted) >= needed:
            return
        lines = "; ".join(self._failure_lines(replies))
        raise DeadlineError(
            f"round {round_}: {len(replies.accepted)} of {len(chosen)} updates accepted, "
            f"{needed} needed ({lines})",
            hint="look at `zk0bot client logs` on the nodes named",
        )

    def _fail(
        self, node_id: int, reason: str, replies: RoundReplies, *, phase: str = "failed"
    ) -> None:
        replies.failures[node_id] = reason
        self._tell(node_id, f"round {self.log.record.round}: {phase}: {reason}")
        self.log.set_client(node_id, phase=phase, reason=reason)

    def _tell(self, node_id: int, line: str) -> None:
        """Log what happened with one client, for the server and in the client's own file."""
        node = self.cohort.members[node_id]
        logger.info("%s: %s", node.name, line)
        self.output.note(node, line)

    def _failure_lines(self, replies: RoundReplies) -> list[str]:
        return [f"{self.cohort.members[n].name}: {why}" for n, why in replies.failures.items()]

    def _ask_for_final_losses(
        self, statistics: DatasetStatistics | None
    ) -> dict[str, EvaluateResult]:
        """The clients' held-out losses of the final weights, by client name.

        Empty where the server measures on sets of its own.
        """
        if self.config.eval_datasets or not self.config.eval_frequency:
            return {}
        request = EvaluateRequest(
            spec=self.cohort.spec,
            base_hash=self.cohort.base_hash,
            run_id=self.log.record.run_id,
            weights_path="",
            statistics=statistics,
            eval_batches=self.config.eval_batches,
        )
        blob = encode(self.weights)
        timeout = self.config.round_deadline_s
        group = str(self.config.num_server_rounds)
        asked = set(self.cohort.available(self.courier, self._look_around()))
        for node_id in sorted(asked):
            why = self.courier.send(
                node_id, "evaluate", request, group=group, deadline_s=timeout, blob=blob
            )
            if why:
                logger.warning("node %s not asked to evaluate: %s", node_id, why)
                asked.discard(node_id)
        return self._collect_losses(asked, self.clock() + timeout)

    def _collect_losses(self, asked: set[int], deadline: float) -> dict[str, EvaluateResult]:
        results: dict[str, EvaluateResult] = {}
        while asked and self.clock() < deadline:
            self._check_stop()
            for reply in self.courier.poll(sorted(asked)):
                asked.discard(reply.node_id)
                name = self.cohort.members[reply.node_id].name
                try:
                    results[name] = _read_evaluation(reply)
                except UpdateError as error:
                    logger.warning("%s did not evaluate: %s", name, error.message)
            self._count_bytes()
            self.sleep(POLL_S)
        return results

    def _note_progress(self, round_: int, started: float) -> None:
        left = self.config.num_server_rounds - round_
        per_round = (self.clock() - started) / round_
        self.log.update(at_once=True, rounds_done=round_, eta_s=per_round * left)

    def _update_file(self, node_id: int) -> Path:
        return self.scratch / f"{node_id}.safetensors"

    def _check_stop(self) -> None:
        if self.log.is_stop_requested():
            raise RunStopped("stopped by request")

    def _check_deadline(self, deadline: float, waited_for: str) -> None:
        if self.clock() < deadline:
            return
        refusals = "; ".join(self.cohort.objections())
        raise DeadlineError(
            f"{waited_for}, after {self.config.wait_deadline_s:g} s"
            + (f"; refused: {refusals}" if refusals else ""),
            hint="start more clients, or lower min-fit-clients",
        )


def _read_evaluation(reply: Reply) -> EvaluateResult:
    """Raises UpdateError when the node did not measure a finite loss."""
    if reply.content is None:
        raise UpdateError(reply.failure)
    result = unpack(reply.content, EvaluateResult)
    if not math.isfinite(result.loss) or result.num_examples < 1:
        raise UpdateError(f"loss {result.loss} over {result.num_examples} examples")
    return result
