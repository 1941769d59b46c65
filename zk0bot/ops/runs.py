"""Submitting a run, watching it to its end, stopping it."""

import contextlib
import hashlib
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from zk0bot.config.models import RunConfig
from zk0bot.config.paths import Paths, audit_dir, loopback_dir
from zk0bot.errors import ConfigError, RunError, ServiceError, SessionAbsentError
from zk0bot.files import private_dir, read_record, write_json
from zk0bot.ops import control
from zk0bot.ops.enrolment import OPERATOR
from zk0bot.ops.machine import Machine
from zk0bot.ops.record import close_run, find_active_run, get_run, save_run
from zk0bot.ops.services import exclusive
from zk0bot.ops.specs import SERVER_SESSION, superlink_address
from zk0bot.ops.state import find_session
from zk0bot.records import Record, RunRecord, RunState
from zk0bot.trust.audit import AuditLog

STOP_GRACE_S = 20.0
"""How long a ServerApp gets to end by itself after a stop request."""
_POLL_S = 0.2
_ASK_S = 3.0
"""Seconds between questions to the SuperLink about a run."""
_SETTLE_S = 3.0
"""A ServerApp may still write its record this long after Flower says that it ended."""
_SILENCE_S = 90.0
"""A SuperLink that does not answer for this long is lost; a restarted one needs a few seconds."""


class _FlowerRunId(Record):
    """``flower.json`` in a run's folder: which Flower run carries it."""

    flower_run_id: str


def submit_run(machine: Machine, config: RunConfig) -> RunRecord:
    """Hand a run to the server of this machine; it starts within seconds.

    Raises SessionAbsentError without a server, RunError while another run is under way,
    ConfigError when results cannot be written.
    """
    with exclusive(machine.paths.root):
        superlink = _get_superlink(machine)
        run = _register(machine.paths, config)
    return _submit(machine.paths, superlink, run)


def watch(machine: Machine, run_id: str) -> Iterator[RunRecord]:
    """Yield the run's record now and at each change; the last one is final.

    A run that nobody will finish (its ServerApp or the server is gone) is closed as failed.
    """
    witness = _Witness(machine=machine, run_id=run_id)
    last: RunRecord | None = None
    while True:
        run = get_run(machine.paths, run_id)
        if not run.is_final:
            run = witness.look(time.monotonic()) or run
        if run != last:
            last = run
            yield run
        if run.is_final:
            return
        time.sleep(_POLL_S)


def stop_run(machine: Machine, on_wait: Callable[[str], None]) -> RunRecord:
    """End the run under way: first by request, after a while by Flower; its final record.

    Raises RunError when no run is under way.
    """
    paths = machine.paths
    active = find_active_run(paths)
    if active is None:
        raise RunError("no run is under way", hint="zk0bot runs")
    AuditLog(audit_dir(paths.server_dir)).note("run-stop-asked", OPERATOR, run=active.run_id)
    paths.stop_request(active.run_id).touch()
    if not machine.host.panes(SERVER_SESSION):
        return close_run(paths, active.run_id, "stopped", "stopped by request; its server is gone")
    on_wait("the round loop to stop")
    run = _wait_final(paths, active.run_id, STOP_GRACE_S)
    if run.is_final:
        return run
    with contextlib.suppress(ServiceError):  # a SuperLink that is gone runs nothing
        _stop_by_force(machine, run.run_id)
    return close_run(paths, run.run_id, "stopped", "stopped by request")


def _register(paths: Paths, config: RunConfig) -> RunRecord:
    """The record of a new run, on disk. Raises RunError while another one is under way."""
    active = find_active_run(paths)
    if active:
        raise RunError(f"run {active.run_id} is {active.state}", hint="zk0bot stop ends it")
    started = datetime.now()
    run = RunRecord(
        run_id=f"{started:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
        num_rounds=config.num_server_rounds,
        phase="starting",
        output_dir=str(_make_output_dir(Path(config.output_dir), started)),
    )
    private_dir(paths.run_dir(run.run_id))
    write_json(paths.run_config(run.run_id), config)
    _audit_start(paths, run.run_id)
    save_run(paths, run)
    return run


def _audit_start(paths: Paths, run_id: str) -> None:
    """Log that a run starts, with the hash of its ``config.json``."""
    settings = hashlib.sha256(paths.run_config(run_id).read_bytes()).hexdigest()
    log = AuditLog(audit_dir(paths.server_dir))
    log.append("run-started", OPERATOR, run=run_id, settings_sha256=settings)


def _submit(paths: Paths, superlink: control.Superlink, run: RunRecord) -> RunRecord:
    """Hand a registered run to Flower; it is closed as failed when that is refused."""
    try:
        flower_run_id = control.submit(superlink, run.run_id)
    except (RunError, ServiceError) as error:
        close_run(paths, run.run_id, "failed", error.message)
        raise
    write_json(_flower_path(paths, run.run_id), _FlowerRunId(flower_run_id=flower_run_id))
    return run


@dataclass
class _Witness:
    """Looks, beside the record, at what Flower says of a run."""

    machine: Machine
    run_id: str
    _next: float = 0.0
    _answered_at: float | None = None
    _ended_at: float | None = None
    _ended: control.FlowerRun | None = field(default=None)

    def look(self, at: float) -> RunRecord | None:
        """The closed record when the run is over and nobody said so; else None."""
        if self._ended and self._ended_at is not None and at - self._ended_at > _SETTLE_S:
            return self._close(f"its ServerApp ended: {_describe(self._ended)}")
        if at < self._next:
            return None
        self._next = at + _ASK_S
        if not self.machine.host.panes(SERVER_SESSION):
            return self._close("the server is not running any more")
        return self._ask(at)

    def _ask(self, at: float) -> RunRecord | None:
        self._answered_at = self._answered_at or at
        try:
            flower_run = _get_flower_run(self.machine, self.run_id)
        except ServiceError:
            is_lost = at - self._answered_at > _SILENCE_S
            return self._close("the SuperLink does not answer") if is_lost else None
        self._answered_at = at
        if flower_run and flower_run.is_finished and self._ended is None:
            self._ended, self._ended_at = flower_run, at
        return None

    def _close(self, reason: str) -> RunRecord:
        was_stopped = self._ended is not None and self._ended.outcome == "stopped"
        state: RunState = "stopped" if was_stopped else "failed"
        return close_run(self.machine.paths, self.run_id, state, reason)


def _describe(run: control.FlowerRun) -> str:
    return f"{run.outcome}, {run.details}" if run.details else run.outcome


def _get_superlink(machine: Machine) -> control.Superlink:
    spec = find_session(machine.paths.server_dir)
    if spec is None or not machine.host.panes(SERVER_SESSION):
        raise SessionAbsentError("the server is not running here", hint="zk0bot server start")
    return control.Superlink(address=superlink_address(spec), loopback=loopback_dir(spec.dir))


def _get_flower_run(machine: Machine, run_id: str) -> control.FlowerRun | None:
    """What Flower knows of a run; None before it was handed over."""
    path = _flower_path(machine.paths, run_id)
    if not path.is_file():
        return None
    flower_run_id = read_record(path, _FlowerRunId).flower_run_id
    return control.get_flower_run(_get_superlink(machine), flower_run_id)


def _stop_by_force(machine: Machine, run_id: str) -> None:
    flower_run = _get_flower_run(machine, run_id)
    if flower_run and not flower_run.is_finished:
        control.stop(_get_superlink(machine), flower_run.run_id)


def _wait_final(paths: Paths, run_id: str, timeout_s: float) -> RunRecord:
    end_at = time.monotonic() + timeout_s
    while not (run := get_run(paths, run_id)).is_final and time.monotonic() < end_at:
        time.sleep(_POLL_S)
    return run


def _flower_path(paths: Paths, run_id: str) -> Path:
    return paths.run_dir(run_id) / "flower.json"


def _make_output_dir(base: Path, started: datetime) -> Path:
    """A new folder for results, absolute; ConfigError when it cannot be written to."""
    name = f"{started:%Y-%m-%d_%H-%M-%S}"
    folder = base.expanduser().absolute() / name
    for attempt in range(2, 100):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            folder = folder.with_name(f"{name}_{attempt}")
            continue
        except OSError as error:
            raise ConfigError(
                f"cannot write results to {base}: {error.strerror}",
                hint="choose another folder with --set output-dir=PATH",
            ) from error
        return folder
    raise ConfigError(f"{base} has no free name like {name}")
