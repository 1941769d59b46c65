"""Watching a run whose end nobody reports; the ordinary life of one is in tests/integration."""

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_host import FakeHost, build_fake_machine

from zk0bot.config.models import RunConfig, ServerConfig
from zk0bot.config.paths import loopback_dir
from zk0bot.errors import RunError, ServiceError, SessionAbsentError
from zk0bot.files import write_json
from zk0bot.ops.machine import Machine
from zk0bot.ops.overview import get_status
from zk0bot.ops.record import get_run, save_run
from zk0bot.ops.runs import stop_run, submit_run, watch
from zk0bot.ops.specs import server_session, session_path
from zk0bot.records import RunRecord
from zk0bot.trust.certificates import make_loopback


def open_server(machine: Machine, superlink_port: int) -> None:
    """A server whose processes are idle, but for what listens on this port."""
    config = ServerConfig(superlink_port=superlink_port)
    spec = server_session(machine.paths, config, machine.surroundings)
    write_json(session_path(spec.dir), spec)
    make_loopback(loopback_dir(spec.dir))
    machine.host.start(spec, spec.processes)


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    monkeypatch.setattr("zk0bot.ops.runs.STOP_GRACE_S", 0.3)
    machine = build_fake_machine(tmp_path, FakeHost())
    open_server(machine, free_port())
    save_run(machine.paths, RunRecord(run_id="a", num_rounds=1, state="running"))
    write_json(machine.paths.run_dir("a") / "flower.json", {"flower_run_id": "7"})
    run = stop_run(machine, lambda text: None)
    assert (run.state, machine.paths.stop_request("a").is_file()) == ("stopped", True)


def test_a_run_without_server_is_stopped_at_once(tmp_path: Path) -> None:
    machine = build_fake_machine(tmp_path, FakeHost())
    save_run(machine.paths, RunRecord(run_id="a", num_rounds=1, state="running"))
    write_json(machine.paths.run_dir("a") / "flower.json", {"flower_run_id": "7"})
    begun = time.monotonic()
    run = stop_run(machine, lambda text: None)
    assert time.monotonic() - begun < 5
    assert (run.state, run.reason) == ("stopped", "stopped by request; its server is gone")
    assert get_run(machine.paths, "a") == run


def test_status_shows_no_running_run_beside_a_server_that_is_gone(tmp_path: Path) -> None:
    machine = build_fake_machine(tmp_path, FakeHost())
    save_run(machine.paths, RunRecord(run_id="a", num_rounds=1, state="running"))
    run = get_status(machine).run
    assert run is not None
    assert (run.state, run.reason) == ("failed", "the server went away")


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's packager
def test_of_runs_submitted_at_once_one_is_taken(tmp_path: Path) -> None:
    """The SuperLink is a socket that accepts and says nothing, until it closes."""
    machine = build_fake_machine(tmp_path, FakeHost())
    together = threading.Barrier(8)
    refusals: list[str] = []

    def submit() -> None:
        together.wait()
        try:
            submit_run(machine, RunConfig(output_dir=str(tmp_path / "out")))
        except ServiceError:
            return
        except RunError as error:
            refusals.append(error.message)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        open_server(machine, silent.getsockname()[1])
        threads = [threading.Thread(target=submit) for _ in range(8)]
        for thread in threads:
            thread.start()
        end_at = time.monotonic() + 20
        while len(refusals) < 7 and time.monotonic() < end_at:
            time.sleep(0.02)
    for thread in threads:
        thread.join(20)
    assert len(refusals) == 7
    assert all(text.endswith(" is waiting") for text in refusals)
    assert len(list(machine.paths.runs_dir.iterdir())) == 1
