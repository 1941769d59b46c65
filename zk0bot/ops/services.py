"""Starting and stopping the server and clients of this machine."""

import contextlib
import fcntl
import ipaddress
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from zk0bot.config.episode import read_episodes
from zk0bot.config.load import list_simulated_tasks
from zk0bot.config.models import ClientConfig, ServerConfig
from zk0bot.config.paths import (
    Paths,
    client_config,
    link_state,
    node_progress,
    trainer_state,
)
from zk0bot.config.uri import parse_dataset_uri
from zk0bot.errors import (
    ConfigError,
    ServiceError,
    SessionAbsentError,
    SessionExistsError,
    TrainerError,
    UnknownNameError,
)
from zk0bot.files import private_dir, write_json
from zk0bot.ops import record
from zk0bot.ops.health import (
    Check,
    OnWait,
    check_gateway,
    check_superlink,
    find_gateway,
    wait_until_ready,
)
from zk0bot.ops.host import Host
from zk0bot.ops.interrupt import undisturbed
from zk0bot.ops.process import end, find_started, free_ports, refuse_taken
from zk0bot.ops.specs import (
    SERVER_SESSION,
    SessionSpec,
    Surroundings,
    client_session,
    client_session_name,
    flower_home,
    helpers_dir,
    logs_dir,
    secrets_path,
    server_session,
    session_path,
    superlink_database,
    supervisor_path,
)
from zk0bot.ops.state import (
    ClientStatus,
    ServerStatus,
    Status,
    find_link,
    find_session,
    find_trainer,
    get_client_status,
    get_server_status,
    list_client_slugs,
    list_clients,
    wrap_line,
)
from zk0bot.records import GatewayHealth, Record
from zk0bot.version import __version__

STOP_GRACE_S = 8.0
"""How long processes get between SIGTERM and SIGKILL."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where services are started: paths, sessions, environment."""

    paths: Paths
    host: Host
    surroundings: Surroundings
    secrets: Mapping[str, str]
    """Tokens for the trainers."""


class StopReport(Record):
    """What ``stop`` ended."""

    session: str
    processes: list[str]
    """Names of the processes that ran, in start order."""
    pids: list[int]
    """All that got SIGTERM, children included."""
    killed: list[int]
    """Those of them that needed SIGKILL."""

    def to_text(self) -> str:
        names = ", ".join(self.processes) or "left-over processes"
        text = f"stopped {self.session}: {names} ({len(self.pids)} processes)"
        killed = f"; {len(self.killed)} needed SIGKILL" if self.killed else ""
        return wrap_line(f"{text}{killed}")


def start_server(machine: Machine, config: ServerConfig, on_wait: OnWait) -> ServerStatus:
    """Start the server's processes and return when they answer.

    Raises SessionExistsError, PortInUseError, or ServiceError naming the process that failed; then
    all that was started has been stopped again.
    """
    _refuse_public(config)
    checks = (
        check_superlink(config.superlink_port),
        check_gateway(config.host, config.port),
        _check_trainer("evaluator", machine.paths.evaluator_dir),
    )
    with _undone_on_failure(machine) as begun:
        with exclusive(machine.paths.root):
            _open_server(machine, config, begun)
        _finish_start(machine, begun[0], checks, config.start_deadline_s, on_wait)
    return get_server_status(machine.paths, machine.host)


def stop_server(machine: Machine) -> StopReport:
    """End the server's processes. Raises SessionAbsentError when there are none."""
    with exclusive(machine.paths.root):
        report = _stop(machine, machine.paths.server_dir, SERVER_SESSION)
        if report is None:
            raise SessionAbsentError("the server is not running", hint="zk0bot server start")
        record.close_active_runs(machine.paths, "stopped", "the server was stopped")
    return report


def start_client(
    machine: Machine, config: ClientConfig, on_wait: OnWait, *, wait: bool = True
) -> ClientStatus:
    """Start one client's processes and return when it has its data and is connected.

    With ``wait`` false it returns at once; ``wait_for_client`` does the rest. Raises what
    ``start_server`` raises, and TrainerError with the trainer's own reason.
    """
    slug = client_slug(config)
    _refuse_bad_data(config)
    refuse_unreachable(config.server)
    with _undone_on_failure(machine) as begun:
        with exclusive(machine.paths.root):
            _open_client(machine, slug, config, begun)
        if wait:
            _await_client(machine, begun[0], config, on_wait)
    return get_client_status(machine.paths, slug, machine.host)


def wait_for_client(machine: Machine, slug: str, config: ClientConfig, on_wait: OnWait) -> None:
    """Return when a client that was started has its data and is connected."""
    spec = find_session(machine.paths.client_dir(slug))
    if spec is None:
        raise SessionAbsentError(f"client {slug!r} is not running", hint="zk0bot client list")
    with _undone_on_failure(machine) as begun:
        begun.append(spec)
        _await_client(machine, spec, config, on_wait)


def stop_client(machine: Machine, slug: str) -> StopReport:
    """End one client's processes. Raises SessionAbsentError when there are none."""
    with exclusive(machine.paths.root):
        report = _stop(machine, machine.paths.client_dir(slug), client_session_name(slug))
    if report is None:
        raise SessionAbsentError(f"client {slug!r} is not running", hint="zk0bot client list")
    return report


@contextlib.contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """One start, stop or submission at a time below a state root.

    Locks the folder, so that no file is left; not re-entrant.
    """
    private_dir(root)
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def stop_services(machine: Machine) -> list[StopReport]:
    """End every client and the server below this state root, all at once; those that ran."""
    slugs = list_client_slugs(machine.paths)
    services = [(machine.paths.client_dir(slug), client_session_name(slug)) for slug in slugs]
    services.append((machine.paths.server_dir, SERVER_SESSION))
    with exclusive(machine.paths.root), ThreadPoolExecutor(len(services)) as pool:
        stops = [pool.submit(_stop, machine, *service) for service in services]
        reports = [report for stop in stops if (report := stop.result())]
        record.close_active_runs(machine.paths, "stopped", "the server was stopped")
    return reports


def stop_helpers(machine: Machine) -> list[StopReport]:
    """End the short-lived processes below this state root that nobody waits for any more."""
    ended = end(find_started(helpers_dir(machine.paths)), grace_s=STOP_GRACE_S)
    if not ended.pids:
        return []
    pids, killed = list(ended.pids), list(ended.killed)
    return [StopReport(session="helpers", processes=[], pids=pids, killed=killed)]


def get_status(machine: Machine) -> Status:
    """All that runs on this machine, and the last run.

    A run that a lost server has left behind is closed as failed.
    """
    clients = list_clients(machine.paths, machine.host).clients
    server = get_server_status(machine.paths, machine.host)
    if server.state == "stopped":
        with contextlib.suppress(OSError):  # a full disk; the next look closes it
            record.close_active_runs(machine.paths, "failed", "the server went away")
    return Status(
        server=server,
        clients=[client for client in clients if client.state != "stopped"],
        run=record.find_active_run(machine.paths) or record.find_last_run(machine.paths),
    )


def get_attach_command(machine: Machine, session: str) -> list[str]:
    """Command line that shows a running session. Raises SessionAbsentError."""
    if not machine.host.panes(session):
        raise SessionAbsentError(f"session {session} is not running", hint="zk0bot status")
    return machine.host.attach_command(session)


def client_slug(config: ClientConfig) -> str:
    """Short name of a client's folder and session: from its name, else from its dataset."""
    return slug_of(config.name or config.dataset_uri)


def slug_of(text: str) -> str:
    """``text`` in lower-case letters, digits and single dashes; a URI loses its scheme."""
    scheme, colon, value = text.partition(":")
    if colon and scheme == "local":
        value = Path(value).name or value
    elif colon and scheme == "sim":
        value = f"sim-{value}"
    slug = re.sub(r"[^a-z0-9]+", "-", (value if colon else text).lower()).strip("-")[:48].strip("-")
    if not slug:
        raise ConfigError(f"cannot make a short name of {text!r}", hint="give one with --name")
    return slug


def find_client(machine: Machine, text: str | None) -> str:
    """The client meant by a short name, name or URI; without one, the only running client.

    Raises UnknownNameError or ConfigError listing the choices.
    """
    slugs = list_client_slugs(machine.paths)
    if text:
        names = [text]
        with contextlib.suppress(ConfigError):  # no short name can be made of it: unknown
            names.append(slug_of(text))
        slug = next((name for name in names if name in slugs), None)
        slug = slug or _find_by_uri(machine, text, slugs)
        if slug is None:
            raise UnknownNameError.of("client", text, slugs)
        return slug
    running = [slug for slug in slugs if machine.host.panes(client_session_name(slug))]
    if len(running) == 1:
        return running[0]
    if not running:
        raise SessionAbsentError(
            "no client runs here", hint="zk0bot client start DATASET_URI; zk0bot client list"
        )
    raise ConfigError(
        f"{len(running)} clients run here: {', '.join(running)}", hint="name one of them"
    )


def refuse_unreachable(server: str) -> GatewayHealth:
    """Raises ServiceError unless a zk0bot server of the same version answers at HOST:PORT."""
    host, port = _split_address(server)
    health = find_gateway(host, port)
    if health is None:
        raise ServiceError(
            f"no zk0bot server answers at {server}",
            hint="zk0bot server start on the server machine; --server HOST:PORT names another",
        )
    for what, theirs, ours in (
        ("zk0bot", health.zk0bot_version, __version__),
        ("Flower", health.flwr_version, version("flwr")),
    ):
        if theirs != ours:
            raise ServiceError(
                f"the server at {server} runs {what} {theirs}, this machine {ours}",
                hint="install the same zk0bot version on both sides",
            )
    return health


def _find_by_uri(machine: Machine, text: str, slugs: list[str]) -> str | None:
    for slug in slugs:
        status = get_client_status(machine.paths, slug, machine.host)
        if text in (status.dataset_uri, status.name, status.dataset_uri.partition(":")[2]):
            return slug
    return None


def _refuse_public(config: ServerConfig) -> None:
    """Raises ConfigError unless the server listens where only this machine reaches it."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if config.host == "localhost" else config.host)
    except ValueError:
        address = ipaddress.ip_address("0.0.0.0")
    if address.version != 4 or not address.is_loopback:
        raise ConfigError(
            f"host {config.host!r} is not localhost or 127.x.x.x; connections are not encrypted "
            "yet",
            hint="use 127.0.0.1 and an SSH tunnel: ssh -L 9092:127.0.0.1:9092 SERVER",
        )
    if config.port == config.superlink_port:
        raise ConfigError(
            f"port and superlink-port are both {config.port}",
            hint="set ZK0BOT_PORT and ZK0BOT_SUPERLINK_PORT to different ones",
        )


def _refuse_running(machine: Machine, session: str, message: str, hint: str) -> None:
    if machine.host.panes(session):
        raise SessionExistsError(f"{message} (session {session})", hint=hint)


def _refuse_bad_data(config: ClientConfig) -> None:
    """Raises ConfigError for what is known to be wrong before anything starts."""
    read_episodes(config.episodes)
    uri = parse_dataset_uri(config.dataset_uri)
    if uri.kind == "local" and not Path(uri.value).expanduser().is_dir():
        raise ConfigError(
            f"there is no folder {uri.value}", hint="local:/path is a LeRobotDataset's folder"
        )
    if uri.kind == "sim":
        task, known = uri.value.partition("?")[0], list_simulated_tasks()
        if task not in known:
            raise UnknownNameError.of("simulated task", task, known)


def _split_address(server: str) -> tuple[str, int]:
    host, colon, port = server.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"server {server!r} is not HOST:PORT", hint="such as 127.0.0.1:9092")
    return host, int(port)


def _promised_ports(machine: Machine) -> list[int]:
    """Ports of running sessions, some of which may not listen yet."""
    folders = [machine.paths.server_dir]
    folders += [machine.paths.client_dir(slug) for slug in list_client_slugs(machine.paths)]
    specs = [spec for folder in folders if (spec := find_session(folder))]
    return [port for spec in specs if machine.host.panes(spec.name) for port in spec.ports]


def _prepare_server(machine: Machine, spec: SessionSpec) -> None:
    """A clean slate for the processes; records of runs stay."""
    paths = machine.paths
    record.close_active_runs(paths, "failed", "the server went away")
    for suffix in ("", "-wal", "-shm"):
        database = superlink_database(paths)
        database.with_name(database.name + suffix).unlink(missing_ok=True)
    shutil.rmtree(paths.progress_dir, ignore_errors=True)
    private_dir(paths.evaluator_dir)
    trainer_state(paths.evaluator_dir).unlink(missing_ok=True)
    _prepare(machine, spec)


def _prepare_client(machine: Machine, spec: SessionSpec, config: ClientConfig) -> None:
    _prepare(machine, spec)
    for path in (trainer_state(spec.dir), link_state(spec.dir), node_progress(spec.dir)):
        path.unlink(missing_ok=True)
    write_json(client_config(spec.dir), config, mode=0o600)


def _prepare(machine: Machine, spec: SessionSpec) -> None:
    """Folders, specs and secrets of a service; the logs of its last start become ``.log.1``."""
    private_dir(spec.dir)
    private_dir(logs_dir(spec.dir))
    shutil.rmtree(flower_home(spec.dir), ignore_errors=True)
    private_dir(flower_home(spec.dir))
    supervisor_path(spec.dir).unlink(missing_ok=True)
    write_json(session_path(spec.dir), spec, mode=0o600)
    write_json(secrets_path(spec.dir), dict(machine.secrets), mode=0o600)
    for process in spec.processes:
        if process.log_path.exists():
            process.log_path.replace(process.log_path.with_suffix(".log.1"))
        write_json(process.spec_path, process, mode=0o600)


def _open_server(machine: Machine, config: ServerConfig, begun: list[SessionSpec]) -> None:
    _refuse_running(machine, SERVER_SESSION, "the server is already running", "zk0bot server stop")
    _clear_leftovers(machine.paths.server_dir)
    refuse_taken((config.port, config.superlink_port), hint="stop it, or set another port "
                 "with ZK0BOT_PORT and ZK0BOT_SUPERLINK_PORT")  # fmt: skip
    spec = _identify(server_session(machine.paths, config, machine.surroundings))
    begun.append(spec)
    _prepare_server(machine, spec)
    _open(machine, spec)


def _open_client(
    machine: Machine, slug: str, config: ClientConfig, begun: list[SessionSpec]
) -> None:
    _refuse_running(
        machine,
        client_session_name(slug),
        f"client {slug!r} is already running",
        f"zk0bot client stop {slug}, or start another one with --name",
    )
    _clear_leftovers(machine.paths.client_dir(slug))
    egress_port, runtime_port = free_ports(config.first_port, 2, _promised_ports(machine))
    ports = {"egress_port": egress_port, "runtime_port": runtime_port}
    spec = _identify(client_session(machine.paths, slug, config, machine.surroundings, **ports))
    begun.append(spec)
    _prepare_client(machine, spec, config)
    _open(machine, spec)


def _identify(spec: SessionSpec) -> SessionSpec:
    """``spec`` as one start of its own, which no later start of the same service equals."""
    return spec.model_copy(update={"start_id": secrets.token_hex(8)})


def _open(machine: Machine, spec: SessionSpec) -> None:
    """Start all but the supervisor: until the service is ready, a dead process is a failure."""
    machine.host.start(spec, spec.processes[:-1])


def _await_client(
    machine: Machine, spec: SessionSpec, config: ClientConfig, on_wait: OnWait
) -> None:
    checks = (_check_trainer("trainer", spec.dir), _check_link(spec.dir, config.server))
    _finish_start(machine, spec, checks, config.start_deadline_s, on_wait)


def _finish_start(
    machine: Machine,
    spec: SessionSpec,
    checks: tuple[Check, ...],
    deadline_s: float,
    on_wait: OnWait,
) -> None:
    wait_until_ready(
        checks,
        lambda: machine.host.panes(spec.name),
        spec,
        deadline_s=deadline_s,
        on_wait=on_wait,
    )
    machine.host.start(spec, spec.processes[-1:])


@contextlib.contextmanager
def _undone_on_failure(machine: Machine) -> Iterator[list[SessionSpec]]:
    """Collects what the body starts; stops it when the body fails or is interrupted.

    Another signal does not disturb that, and a service that was meanwhile stopped and started
    again by somebody else is left alone.
    """
    begun: list[SessionSpec] = []
    try:
        yield begun
    except BaseException:
        with undisturbed(), exclusive(machine.paths.root):
            for spec in begun:
                if find_session(spec.dir) == spec:
                    _stop(machine, spec.dir, spec.name)
        raise


def _stop(machine: Machine, service_dir: Path, session: str) -> StopReport | None:
    """End every process of a service and its session; None when there was nothing."""
    panes = machine.host.panes(session)
    started = find_started(service_dir)
    if not panes and not started:
        _forget(service_dir)
        return None
    supervisors = [pane.pid for pane in panes if pane.name == "supervisor"]
    first = [process for process in started if process.pid in supervisors]
    rest = [process for process in started if process.pid not in supervisors]
    ended = [end(group, grace_s=STOP_GRACE_S) for group in (first, rest)]
    late = end(find_started(service_dir), grace_s=STOP_GRACE_S)  # children born in between
    machine.host.end(session)
    _forget(service_dir)
    parts = [*ended, late]
    return StopReport(
        session=session,
        processes=[pane.name for pane in panes if not pane.is_dead],
        pids=[pid for part in parts for pid in part.pids],
        killed=[pid for part in parts for pid in part.killed],
    )


def _forget(service_dir: Path) -> None:
    """What tells of a running service, and its tokens."""
    secrets_path(service_dir).unlink(missing_ok=True)
    session_path(service_dir).unlink(missing_ok=True)


def _clear_leftovers(service_dir: Path) -> None:
    """End what a lost tmux server or a power cut left behind."""
    end(find_started(service_dir), grace_s=STOP_GRACE_S)


def _check_trainer(process: str, private: Path) -> Check:
    """The warm process is ready; raises its own reason when it failed."""

    def look() -> str | None:
        state = find_trainer(private)
        if state is None:
            return f"the {process} to start"
        if state.state == "failed":
            raise TrainerError(
                state.error_message or f"the {process} failed",
                hint=state.error_hint,
                remote_code=state.error_code,
            )
        if state.state in ("ready", "working"):
            return None
        count = f" {state.done}/{state.total}" if state.total else ""
        return f"the {process}: {state.detail or 'loading'}{count}"

    return Check(process=process, look=look)


def _check_link(service_dir: Path, server: str) -> Check:
    """The SuperNode is registered with the server."""

    def look() -> str | None:
        link = find_link(service_dir)
        if link and link.node_id:
            return None
        reason = f" ({link.error})" if link and link.error else ""
        return f"a connection to {server}{reason}"

    return Check(process="supernode", look=look)
