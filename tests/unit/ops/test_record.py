"""Run records: listing, closing, and the watch for runs without a ServerApp."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from zk0bot.config.paths import Paths
from zk0bot.errors import UnknownNameError
from zk0bot.ops.record import (
    OrphanWatch,
    close_run,
    find_active_run,
    find_last_run,
    get_run,
    list_runs,
    save_run,
)
from zk0bot.records import RunRecord, RunState

FullDisk = Callable[[], AbstractContextManager[None]]
STARTED = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)


def save(paths: Paths, run_id: str, state: RunState) -> RunRecord:
    run = RunRecord(run_id=run_id, state=state, num_rounds=5, started_at=STARTED, loss=0.25)
    save_run(paths, run)
    return run


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    assert list_runs(paths).to_text() == "no runs yet; zk0bot run starts one"
    assert find_last_run(paths) is None
    save(paths, "20260101-000000-aaaa", "completed")
    last = save(paths, "20260102-000000-bbbb", "running")
    assert list_runs(paths).to_text() == (
        "RUN                   STATE                       ROUNDS     LOSS  STARTED\n"
        "20260102-000000-bbbb  running                        0/5   0.2500  01-02 03:04\n"
        "20260101-000000-aaaa  completed                      0/5   0.2500  01-02 03:04"
    )
    assert find_last_run(paths) == find_active_run(paths) == last


def test_an_unknown_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError):
        get_run(Paths(tmp_path), "20260101-000000-aaaa")


def test_closing_keeps_a_verdict_that_is_there(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    save(paths, "a", "completed")
    assert close_run(paths, "a", "failed", "late").state == "completed"
    save(paths, "b", "running")
    closed = close_run(paths, "b", "failed", "the server went away")
    assert closed == get_run(paths, "b")
    assert closed.verdict is not None
    assert (closed.state, closed.verdict.reasons) == ("failed", ["the server went away"])


def test_a_run_without_serverapp_is_closed_after_a_while(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    save(paths, "a", "running")
    watch = OrphanWatch(paths)
    for at in (100.0, 106.0, 112.0, 118.0):
        watch.look(at)
        assert get_run(paths, "a").state == "running"
    watch.look(124.0)
    assert get_run(paths, "a").state == "failed"


def test_a_full_disk_does_not_end_the_watch(
    tmp_path: Path, full_disk: FullDisk, caplog: pytest.LogCaptureFixture
) -> None:
    paths = Paths(tmp_path)
    save(paths, "a", "running")
    watch = OrphanWatch(paths)
    watch.look(100.0)
    with full_disk():
        watch.look(200.0)
    assert "cannot close run a" in caplog.text
    watch.look(300.0)
    assert get_run(paths, "a").state == "failed"
