"""Real processes: found by their marker, ended exactly, ports told apart."""

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from zk0bot.errors import PortInUseError
from zk0bot.ops.process import command_of, end, find_started, free_ports, is_alive, refuse_taken

SLEEP = "import time; time.sleep(60)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print(flush=True); time.sleep(60)"
)
PARENT = (
    f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); "
    "print(flush=True)"
)


def spawn(code: str, marker: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code],
        env={"ZK0BOT_SESSION": str(marker)},
        stdout=subprocess.PIPE,
    )


def test_children_whose_parent_is_gone_are_found_and_ended(tmp_path: Path) -> None:
    with spawn(PARENT, tmp_path) as parent, spawn(SLEEP, tmp_path / "other") as other:
        parent.wait()
        found = find_started(tmp_path)
        assert len(found) == 1
        assert found[0].pid not in (parent.pid, other.pid)
        ended = end(found, grace_s=5)
        assert (ended.killed, find_started(tmp_path)) == ((), [])
        assert is_alive(other.pid)
        other.kill()


def test_a_process_that_is_gone_has_no_command(tmp_path: Path) -> None:
    with spawn(STUBBORN, tmp_path) as stubborn:
        assert stubborn.stdout is not None
        stubborn.stdout.readline()
        process = psutil.Process(stubborn.pid)
        command = command_of(process)
        stubborn.kill()
    assert command[-1] == STUBBORN
    assert command_of(process) == []


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    with spawn(STUBBORN, tmp_path) as stubborn:
        assert stubborn.stdout is not None
        stubborn.stdout.readline()
        ended = end(find_started(tmp_path), grace_s=0.3)
        assert ended.killed == ended.pids == (stubborn.pid,)


def test_a_port_in_use_is_refused_with_its_holder(free_port: Callable[[], int]) -> None:
    port = free_port()
    refuse_taken([port], hint="")
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(PortInUseError, match=rf"port {port} is in use by pid \d+ \(.*pytest"):
            refuse_taken([port], hint="")
        assert port not in free_ports(port, 2, [])


def test_promised_ports_are_not_given_again(free_port: Callable[[], int]) -> None:
    first, second = free_ports(free_port(), 2, [])
    assert free_ports(first, 1, [first]) != [first]
    assert second > first
