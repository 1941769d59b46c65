"""Watching a run whose end nobody reports; the ordinary life of one is in tests/integration."""

from pathlib import Path

import pytest
from fake_host import FakeHost, build_fake_machine

from zk0bot.config.models import RunConfig
from zk0bot.errors import RunError, SessionAbsentError
from zk0bot.ops.record import get_run, save_run
from zk0bot.ops.runs import stop_run, submit_run, watch
from zk0bot.records import RunRecord


def test_a_final_run_is_shown_once(tmp_path: Path) -> None:
    machine = build_fake_machine(tmp_path, FakeHost())
    run = RunRecord(run_id="a", num_rounds=1, state="completed")
    save_run(machine.paths, run)
    assert list(watch(machine, "a")) == [run]


def test_a_run_whose_server_is_gone_fails(tmp_path: Path) -> None:
    machine = build_fake_machine(tmp_path, FakeHost())
    save_run(machine.paths, RunRecord(run_id="a", num_rounds=1, state="running"))
    last = list(watch(machine, "a"))[-1]
    assert (last.state, last.reason) == ("failed", "the server is not running any more")
    assert get_run(machine.paths, "a") == last


def test_nothing_is_submitted_without_a_server(tmp_path: Path) -> None:
    machine = build_fake_machine(tmp_path, FakeHost())
    with pytest.raises(SessionAbsentError):
        submit_run(machine, RunConfig(output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_stopping_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run is under way"):
        stop_run(build_fake_machine(tmp_path, FakeHost()), lambda text: None)


def test_a_stop_is_requested_and_the_run_closed_when_nobody_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zk0bot.ops.runs.STOP_GRACE_S", 0.3)
    machine = build_fake_machine(tmp_path, FakeHost())
    save_run(machine.paths, RunRecord(run_id="a", num_rounds=1, state="running"))
    run = stop_run(machine, lambda text: None)
    assert (run.state, machine.paths.stop_request("a").is_file()) == ("stopped", True)
