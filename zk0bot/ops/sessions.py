"""Sessions: runs that a server starts by itself when enough clients are there.

Idle until ``min-fit-clients`` are here, a run, its weights published, idle again, until a client
comes that was not in the last session, or one has other data.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from zk0bot.config.models import RunConfig, SessionsConfig
from zk0bot.config.paths import Paths
from zk0bot.errors import DataError
from zk0bot.files import private_dir, read_json, read_record, write_json
from zk0bot.ops.record import build_run_id
from zk0bot.ops.retention import remove_checkpoints
from zk0bot.records import (
    USABLE_STATES,
    PresenceList,
    Published,
    RunRecord,
    SessionPhase,
    SessionsState,
    now,
    round_of,
)

logger = logging.getLogger(__name__)

PRESENT_S = 30.0
"""A client that was heard of within this is here; its egress hop speaks every 10 s or so."""
LONGEST_REST_S = 3600.0
_NEWS = {"news": "a new client or new data", "clients": "a new client", "data": "new data"}

Clients = Mapping[str, str]
"""Data tokens of those that are here, by fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ``step`` decided: the new state, and whether to start a session now."""

    state: SessionsState
    is_due: bool = False


def step(
    state: SessionsState, config: SessionsConfig, clients: Clients, at: datetime, *, is_busy: bool
) -> Plan:
    """What is waited for at ``at``, with these clients here and other runs under way or not."""
    told = {name: token or clients.get(name, "") for name, token in state.clients.items()}
    here = {"present": len(clients), "needed": config.run.min_fit_clients}
    state = state.model_copy(update=here | {"clients": told})
    if is_busy:
        return Plan(state=_enter(state, "idle", "another run is under way", at))
    if state.phase == "resting" and at < state.since + timedelta(seconds=rest_s(state, config)):
        return Plan(state=state)
    if len(clients) < config.run.min_fit_clients:
        reason = f"{len(clients)} of {config.run.min_fit_clients} clients"
        return Plan(state=_enter(state, "idle", reason, at))
    if not (reason := find_reason(state, config, clients)):
        return Plan(state=_enter(state, "idle", f"waits for {_NEWS[config.when]}", at))
    settling = _enter(state, "settling", reason, at)
    is_due = at >= settling.since + timedelta(seconds=config.settle_s)
    return Plan(state=settling, is_due=is_due)


def find_reason(state: SessionsState, config: SessionsConfig, clients: Clients) -> str:
    """Why a session is to begin; empty: nothing is new."""
    if not state.run_id:
        return "the first session"
    if state.failures:
        return "the last session failed"
    came = [name for name in clients if name not in state.clients]
    before = {name: state.clients.get(name, "") for name in clients}
    changed = [name for name, old in before.items() if old and clients[name] not in ("", old)]
    if came and config.when in ("news", "clients"):
        return f"{len(came)} new clients" if len(came) > 1 else "a new client"
    if changed and config.when in ("news", "data"):
        return f"new data at {len(changed)} clients" if len(changed) > 1 else "new data at a client"
    return "the next session" if config.when == "always" else ""


def rest_s(state: SessionsState, config: SessionsConfig) -> float:
    """Seconds between two sessions; after failures longer and longer, up to an hour."""
    rest = config.cooldown_s
    if state.failures:
        rest = min(LONGEST_REST_S, max(rest, 1.0) * 2.0 ** min(state.failures, 20))
    return rest


def finish(state: SessionsState, run: RunRecord, at: datetime) -> SessionsState:
    """The session's run has ended: its weights count when it completed."""
    if run.state in USABLE_STATES:
        done = {"sessions_done": state.sessions_done + 1, "failures": 0}
        state = state.model_copy(update=done | {"published_run": run.run_id})
    elif run.state == "failed":
        state = state.model_copy(update={"failures": state.failures + 1})
    return _enter(state, "resting", f"run {run.run_id} {run.state}", at)


@dataclass
class Sessions:
    """Carries the plan out: reads who is here, submits runs, publishes their weights."""

    paths: Paths
    config: SessionsConfig
    submit: Callable[[RunConfig, str], object]
    """Puts a run of this id into the queue."""
    clock: Callable[[], datetime] = now
    _state: SessionsState | None = None

    @property
    def published_run(self) -> str:
        """The run whose weights the next session starts from; empty: there is none."""
        return (self._state or load_state(self.paths)).published_run

    def look(self, runs: Sequence[RunRecord]) -> None:
        """One look; ``runs`` are all of this server."""
        before, at = self._state or load_state(self.paths), self.clock()
        state = before.model_copy(update={"since": min(before.since, at)})  # the clock was set back
        if state.phase == "running":
            state = self._watch(state, runs, at)
        if state.phase != "running":
            state = self._plan(state, runs, at)
        if state != before or self._state is None:
            write_json(self.paths.sessions, state)
        self._state = state

    def _watch(
        self, state: SessionsState, runs: Sequence[RunRecord], at: datetime
    ) -> SessionsState:
        run = next((run for run in runs if run.run_id == state.run_id), None)
        if run is None:  # killed before it was there, or its folder was removed
            state = state.model_copy(update={"failures": state.failures + 1})
            return _enter(state, "resting", f"run {state.run_id} is gone", at)
        if not run.is_final:
            return state
        if run.state in USABLE_STATES:
            publish(self.paths, run)
        return self._make_room(finish(state, run, at), runs)

    def _make_room(self, state: SessionsState, runs: Sequence[RunRecord]) -> SessionsState:
        """Remove checkpoints of sessions that are too old to be kept."""
        stored, number = [*state.stored, state.run_id], self.config.keep or len(state.stored) + 1
        spent = {run_id for run_id in stored[:-number] if run_id != state.published_run}
        for run in runs:
            if run.run_id in spent:
                remove_checkpoints(run)
        return state.model_copy(update={"stored": [r for r in stored if r not in spent]})

    def _plan(self, state: SessionsState, runs: Sequence[RunRecord], at: datetime) -> SessionsState:
        clients = find_clients(self.paths, at)
        is_busy = any(not run.is_final for run in runs)
        plan = step(state, self.config, clients, at, is_busy=is_busy)
        if not plan.is_due:
            return plan.state
        return self._start(plan.state, clients, at)

    def _start(self, state: SessionsState, clients: Clients, at: datetime) -> SessionsState:
        """Begin a session; its state is on the disk before its run is, so that it is not lost."""
        run_id = build_run_id(at)
        told = {name: token or state.clients.get(name, "") for name, token in clients.items()}
        state = state.model_copy(update={"run_id": run_id, "clients": told})
        state = _enter(state, "running", f"run {run_id}", at)
        write_json(self.paths.sessions, state)
        config = self.config.run.model_copy(update={"start_from": state.published_run})
        self.submit(config, run_id)
        logger.info("session of %d clients: run %s", len(clients), run_id)
        return state


def load_state(paths: Paths) -> SessionsState:
    """What the last life of this server has left; a new state where there is none or a torn one."""
    try:
        return read_record(paths.sessions, SessionsState)
    except FileNotFoundError:
        return SessionsState()
    except DataError as error:
        logger.warning("%s", error.message)
        return SessionsState()


def find_clients(paths: Paths, at: datetime) -> dict[str, str]:
    """Data tokens of the clients that are here, by fingerprint."""
    try:
        nodes = read_record(paths.presence, PresenceList).nodes
    except FileNotFoundError:
        return {}
    heard_since = at - timedelta(seconds=PRESENT_S)
    return {
        node.fingerprint: node.data_token
        for node in nodes
        if node.node_id and node.last_seen and node.last_seen >= heard_since
    }


def publish(paths: Paths, run: RunRecord) -> None:
    """Let ``published/current`` lead to the best checkpoint of ``run``, in one step."""
    checkpoint = run.best_checkpoint or run.last_checkpoint
    if not checkpoint:
        logger.warning("run %s has no checkpoint: nothing is published", run.run_id)
        return
    folder = private_dir(paths.published_dir)
    link = folder / ".current.new"
    with contextlib.suppress(FileNotFoundError):
        link.unlink()
    link.symlink_to(Path(checkpoint))
    link.replace(folder / "current")
    write_json(folder / "published.json", _describe(run, checkpoint))


def _describe(run: RunRecord, checkpoint: str) -> Published:
    round_ = round_of(checkpoint)
    return Published(
        run_id=run.run_id,
        round=round_ or run.rounds_done,
        loss=_find_loss(run, round_) if round_ else None,
        checkpoint=checkpoint,
    )


def _find_loss(run: RunRecord, round_: int) -> float | None:
    """Held-out loss after a round, from the run's results."""
    with contextlib.suppress(FileNotFoundError, DataError):
        history = read_json(Path(run.output_dir) / "server" / "policy_loss_history.json")
        if isinstance(history, dict) and isinstance(entry := history.get(str(round_)), dict):
            loss = entry.get("server_policy_loss")
            return loss if isinstance(loss, float) else None
    return None


def _enter(state: SessionsState, phase: SessionPhase, reason: str, at: datetime) -> SessionsState:
    since = state.since if phase == state.phase else at
    return state.model_copy(update={"phase": phase, "reason": reason, "since": since})
