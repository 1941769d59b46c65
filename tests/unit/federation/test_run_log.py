"""What the round loop writes into the server's audit log."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from zk0bot.config.paths import Paths, audit_dir
from zk0bot.errors import DiskError
from zk0bot.federation.run_log import RunLog
from zk0bot.files import write_json
from zk0bot.records import RunRecord, Verdict
from zk0bot.trust.audit import read_events, verify
from zk0bot.trust.chain import AuditEvent, Value

STOPPED = Verdict(state="stopped", reasons=["stopped by request"])


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    paths = Paths(tmp_path)
    write_json(paths.run_record("r1"), RunRecord(run_id="r1", num_rounds=2))
    return RunLog(paths, "r1")


def audited(tmp_path: Path) -> list[tuple[str, dict[str, Value]]]:
    folder = audit_dir(Paths(tmp_path).server_dir)
    assert verify(folder).ok
    found = [event for event in read_events(folder) if isinstance(event, AuditEvent)]
    return [(event.event, event.details) for event in found]


def test_a_round_leaves_who_was_refused_and_why(tmp_path: Path, log: RunLog) -> None:
    log.close_round(1, asked=3, accepted=2, needed=2, refused={"blue": 'late"; red: NaN'})
    log.close_round(2, asked=3, accepted=1, needed=2, refused={"blue": "late", "red": "NaN"})
    first, second = (details for _, details in audited(tmp_path))
    assert first == {"run": "r1", "round": 1, "state": "accepted", "accepted": 2, "asked": 3,
                     "refused": '{"blue": "late\\"; red: NaN"}'}  # fmt: skip
    assert (second["state"], second["accepted"]) == ("too few", 1)


def test_one_long_reason_leaves_room_for_the_others(tmp_path: Path, log: RunLog) -> None:
    refused = {f"arm-{index}": "x" * 10_000 for index in range(8)}
    log.close_round(1, asked=8, accepted=0, needed=2, refused=refused)
    ((_, details),) = audited(tmp_path)
    assert list(json.loads(str(details["refused"]))) == list(refused)


def test_the_end_of_a_run_is_audited_once(tmp_path: Path, log: RunLog) -> None:
    log.finish(STOPPED)
    log.finish(STOPPED)
    end: dict[str, Value] = {"run": "r1", "state": "stopped", "reason": "stopped by request"}
    assert audited(tmp_path) == [("run-ended", end)]


def test_a_round_does_not_count_when_it_cannot_be_audited(
    log: RunLog, full_disk: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    with full_disk(), pytest.raises(DiskError):
        log.close_round(1, asked=2, accepted=2, needed=2, refused={})
