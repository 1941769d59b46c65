"""A host without tmux: remembers what was started and lets a test end processes."""

import contextlib
import json
import os
import ssl
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

from zk0bot.config.paths import Paths, identity_dir, link_state, trainer_state
from zk0bot.errors import ServiceError
from zk0bot.files import read_record, write_json
from zk0bot.ops.demo import Bar
from zk0bot.ops.host import Pane
from zk0bot.ops.machine import Machine
from zk0bot.ops.specs import ProcessSpec, SessionSpec, Surroundings
from zk0bot.records import GatewayHealth, LinkState, Membership, RunRecord, TrainerState, now
from zk0bot.trust.keys import fingerprint, verify_headers
from zk0bot.trust.registry import EnrolRequest, Registry
from zk0bot.version import __version__

FIRST_PID = 4_000_000
"""Above the kernel's largest pid: no real process is ever meant."""


class FakeHost:
    """Sessions in memory."""

    def __init__(self, on_start: Callable[[ProcessSpec], None] = lambda process: None) -> None:
        self._on_start = on_start
        """Plays the part of each process that is started."""
        self.running: dict[str, dict[str, Pane]] = {}
        self.started: list[str] = []
        """``session:process`` in start order, restarts included."""

    def play(self, on_start: Callable[[ProcessSpec], None]) -> None:
        """From now on ``on_start`` plays the processes."""
        self._on_start = on_start

    def sessions(self) -> list[str]:
        return list(self.running)

    def panes(self, session: str) -> list[Pane]:
        return list(self.running.get(session, {}).values())

    def start(self, session: SessionSpec, processes: Sequence[ProcessSpec]) -> None:
        self.running.setdefault(session.name, {})
        for process in processes:
            self.restart(session.name, process)

    def restart(self, session: str, process: ProcessSpec) -> None:
        self.started.append(f"{session}:{process.name}")
        pid = FIRST_PID + len(self.started)
        self.running[session][process.name] = Pane(name=process.name, pid=pid)
        self._on_start(process)

    def close(self, session: str, process: str) -> None:
        self.running.get(session, {}).pop(process, None)

    def end(self, session: str) -> None:
        self.running.pop(session, None)

    def attach_command(self, session: str) -> list[str]:
        return ["tmux", "attach-session", "-t", f"={session}:"]

    def die(self, session: str, process: str, exit_status: int) -> None:
        """What a host shows after a process ended."""
        pid = self.running[session][process].pid
        self.running[session][process] = Pane(
            name=process, pid=pid, is_dead=True, exit_status=exit_status
        )


def build_fake_machine(root: Path, host: FakeHost) -> Machine:
    """A machine below ``root`` with a fixed interpreter and environment."""
    return Machine(
        paths=Paths(root),
        host=host,
        surroundings=Surroundings(python=Path("/venv/bin/python"), env={"PATH": "/usr/bin"}),
        secrets={"HF_TOKEN": "hf_secret"},
    )


class FakeProcesses:
    """Plays gateway, SuperLink, trainer and egress hop: they are ready at once."""

    def __init__(self, zk0bot_version: str, flwr_version: str) -> None:
        self._health = GatewayHealth(
            zk0bot_version=zk0bot_version, flwr_version=flwr_version, superlink_ok=True
        )
        self._servers: list[ThreadingHTTPServer] = []

    def __call__(self, process: ProcessSpec) -> None:
        if process.name == "superlink":
            loopback = Path(_option(process, "--ssl-certfile")).parent
            self._serve(int(_option(process, "--port")), _build_tls(loopback), None)
        elif process.name == "gateway":
            server_dir = Path(_option(process, "--dir"))
            is_plain = "--insecure" in process.argv
            tls = None if is_plain else _build_tls(server_dir / "tls")
            self._serve(int(_option(process, "--port")), tls, server_dir)
        elif process.name in ("trainer", "evaluator"):
            state = TrainerState(state="ready", pid=os.getpid())
            write_json(trainer_state(Path(_option(process, "--dir"))), state)
        elif process.name == "egress":
            membership = read_record(identity_dir(process.cwd) / "membership.json", Membership)
            link = LinkState(node_id="7", upstream=membership.server)
            write_json(link_state(process.cwd), link)

    def listen(self, port: int, server_dir: Path) -> None:
        """Play the gateway of a server with ``insecure`` on ``port``."""
        self._serve(port, None, server_dir)

    def _serve(self, port: int, tls: ssl.SSLContext | None, server_dir: Path | None) -> None:
        """Answer every GET with the gateway's health or its CA; let nodes join and leave."""
        health = self._health.model_dump_json().encode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/v1/zk0/ca" and server_dir:
                    self._answer(200, (server_dir / "tls" / "ca.crt").read_bytes())
                else:
                    self._answer(200, health)

            def do_POST(self) -> None:
                assert server_dir is not None
                body = self.rfile.read(int(self.headers["content-length"]))
                registry = Registry(server_dir / "enrolment")
                if self.path == "/v1/zk0/leave":
                    pem = verify_headers(dict(self.headers), now())
                    registry.leave(fingerprint(pem))
                    return self._answer(204, b"")
                request = EnrolRequest.model_validate_json(body)
                node = (
                    registry.enrol(request, now())
                    if request.invite_id
                    else registry.enrol_local(request.name, request.public_key.encode())
                )
                answer = {"node": node.name, "fingerprint": node.fingerprint}
                self._answer(200, json.dumps(answer).encode())

            def _answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                return

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self._servers.append(server)

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


def _build_tls(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    return context


@contextlib.contextmanager
def fake_processes(
    zk0bot_version: str = __version__, flwr_version: str = version("flwr")
) -> Iterator[FakeProcesses]:
    """Processes that are gone at the end."""
    processes = FakeProcesses(zk0bot_version, flwr_version)
    try:
        yield processes
    finally:
        processes.close()


def _option(process: ProcessSpec, name: str) -> str:
    return process.argv[process.argv.index(name) + 1]


class NoHost:
    """Sessions that never start; ``open_sessions`` were there before."""

    def __init__(self, *open_sessions: str) -> None:
        self.open_sessions = list(open_sessions)

    def sessions(self) -> list[str]:
        return self.open_sessions

    def panes(self, session: str) -> list[Pane]:
        return []

    def start(self, session: SessionSpec, processes: Sequence[ProcessSpec]) -> None:
        raise ServiceError("tmux has gone fishing")

    def restart(self, session: str, process: ProcessSpec) -> None:
        raise AssertionError("nothing to restart")

    def close(self, session: str, process: str) -> None:
        pass

    def end(self, session: str) -> None:
        pass

    def attach_command(self, session: str) -> list[str]:
        return ["tmux", "attach"]


class Watcher:
    """Keeps what stays on the screen."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def phase(self, text: str) -> None:
        self.lines.append(text)

    def bars(self, bars: Sequence[Bar]) -> None: ...

    def run(self, run: RunRecord) -> None: ...


def build_hostless_machine(root: Path) -> Machine:
    """A machine whose state is below ``root`` and where no session starts."""
    surroundings = Surroundings(python=Path(sys.executable), env={"PATH": os.environ["PATH"]})
    return Machine(paths=Paths(root), host=NoHost(), surroundings=surroundings, secrets={})
