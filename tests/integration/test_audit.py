"""The audit log with real processes: killed while they write, and several at once."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zk0bot.trust.audit import RECOVERED, AuditLog, read_events, verify
from zk0bot.trust.chain import AuditEvent

pytestmark = pytest.mark.integration
KILLS = 25
WRITER = """
import sys
from pathlib import Path
from zk0bot.trust.audit import AuditLog

log = AuditLog(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for index in range(int(sys.argv[2])):
    log.append("round-closed", sys.argv[3], round=index)
    print(index, flush=True)
"""


@pytest.fixture
def writers() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start(folder: Path, count: int, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(count), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def release(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


def events(folder: Path) -> list[AuditEvent]:
    return [event for event in read_events(folder) if isinstance(event, AuditEvent)]


def test_a_killed_writer_leaves_a_log_that_the_next_event_mends(
    tmp_path: Path, writers: list[subprocess.Popen[str]]
) -> None:
    promised: set[tuple[str, int]] = set()
    interrupted = 0
    for turn in range(KILLS):
        process = start(tmp_path, 100_000, f"writer-{turn}")
        writers.append(process)
        release(process)
        time.sleep(0.02 + 0.0007 * turn)  # so that each is killed at another point of an append
        process.send_signal(signal.SIGKILL)
        answers, _ = process.communicate()
        promised |= {(f"writer-{turn}", int(number)) for number in answers.split()}
        interrupted += not verify(tmp_path).ok
        AuditLog(tmp_path).append("server-started", "me", turn=turn)
        report = verify(tmp_path)
        assert report.ok, report
    found = events(tmp_path)
    written = {(event.actor, event.details["round"]) for event in found if "round" in event.details}
    assert promised <= written
    assert sum(event.event == RECOVERED for event in found) == interrupted
    assert interrupted > 0
    assert len(promised) > KILLS
    assert list(tmp_path.glob(".*")) == []


def test_processes_append_one_after_the_other(
    tmp_path: Path, writers: list[subprocess.Popen[str]]
) -> None:
    writers += [start(tmp_path, 50, f"writer-{index}") for index in range(4)]
    for process in writers:
        release(process)
    assert [process.wait(60) for process in writers] == [0] * 4
    report = verify(tmp_path)
    assert (report.ok, report.lines) == (True, 200)
    for index in range(4):
        mine = [
            event.details["round"] for event in events(tmp_path) if event.actor[-1] == str(index)
        ]
        assert mine == list(range(50))
