"""A host without tmux: remembers what was started and lets a test end processes."""

from collections.abc import Sequence
from pathlib import Path

from zk0bot.config.paths import Paths
from zk0bot.ops.host import Pane
from zk0bot.ops.services import Machine
from zk0bot.ops.specs import ProcessSpec, SessionSpec, Surroundings

FIRST_PID = 4_000_000
"""Above the kernel's largest pid: no real process is ever meant."""


class FakeHost:
    """Sessions in memory."""

    def __init__(self) -> None:
        self.running: dict[str, dict[str, Pane]] = {}
        self.started: list[str] = []
        """``session:process`` in start order, restarts included."""

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

    def end(self, session: str) -> None:
        self.running.pop(session, None)

    def attach_command(self, session: str) -> list[str]:
        return ["tmux", "attach-session", "-t", session]

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
