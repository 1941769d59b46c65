"""A host without tmux: remembers what was started and lets a test end processes."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

from zk0bot.config.paths import Paths, link_state, trainer_state
from zk0bot.files import write_json
from zk0bot.ops.host import Pane
from zk0bot.ops.services import Machine
from zk0bot.ops.specs import ProcessSpec, SessionSpec, Surroundings
from zk0bot.records import GatewayHealth, LinkState, TrainerState
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
        if process.name in ("gateway", "superlink"):
            self.listen(int(_option(process, "--port")))
        elif process.name in ("trainer", "evaluator"):
            state = TrainerState(state="ready", pid=os.getpid())
            write_json(trainer_state(Path(_option(process, "--dir"))), state)
        elif process.name == "egress":
            link = LinkState(node_id="7", upstream=_option(process, "--upstream"))
            write_json(link_state(process.cwd), link)

    def listen(self, port: int) -> None:
        """Answer every GET on ``port`` with the gateway's health."""
        body = self._health.model_dump_json().encode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                return

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self._servers.append(server)

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


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
