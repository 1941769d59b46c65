"""Waiting for a service: what it reports, and how it fails."""

import time
from pathlib import Path

import pytest
from fake_host import FakeHost

from zk0bot.config.models import ServerConfig
from zk0bot.config.paths import Paths
from zk0bot.errors import ServiceError
from zk0bot.ops.health import Check, wait_until_ready
from zk0bot.ops.specs import SessionSpec, Surroundings, server_session


def start_fake(tmp_path: Path) -> tuple[FakeHost, SessionSpec]:
    machine = Surroundings(python=Path("/venv/bin/python"), env={})
    spec = server_session(Paths(tmp_path), ServerConfig(), machine)
    host = FakeHost()
    host.start(spec, spec.processes)
    return host, spec


def test_it_says_what_it_waits_for_once_per_change(tmp_path: Path) -> None:
    host, spec = start_fake(tmp_path)
    answers = iter(["the gateway", "the gateway", "more", None])
    said: list[str] = []
    check = Check(process="gateway", look=lambda: next(answers))
    wait_until_ready(
        [check], lambda: host.panes(spec.name), spec, deadline_s=5, on_wait=said.append
    )
    assert said == ["the gateway", "more"]


def test_a_process_that_ended_is_named_with_status_and_log(tmp_path: Path) -> None:
    host, spec = start_fake(tmp_path)
    host.die(spec.name, "superlink", 3)
    log = tmp_path / "server" / "logs" / "superlink.log"
    log.parent.mkdir(parents=True)
    log.write_text("first\naddress already in use\n")
    with pytest.raises(ServiceError) as caught:
        wait_until_ready(
            [], lambda: host.panes(spec.name), spec, deadline_s=5, on_wait=lambda text: None
        )
    assert caught.value.message == (
        "superlink ended with exit status 3 while starting; last lines of its log:\n"
        "first\naddress already in use"
    )
    assert caught.value.hint == f"full log: {log}"


def test_a_deadline_names_the_process_and_what_was_missing(tmp_path: Path) -> None:
    host, spec = start_fake(tmp_path)
    check = Check(process="gateway", look=lambda: "the gateway on port 9092")
    with pytest.raises(ServiceError) as caught:
        wait_until_ready(
            [check],
            lambda: host.panes(spec.name),
            spec,
            deadline_s=0.2,
            on_wait=lambda text: None,
        )
    assert caught.value.message == (
        "gateway is not ready: waited 0.2 s for the gateway on port 9092; its log is empty"
    )


def test_a_session_closed_from_outside_is_noticed(tmp_path: Path) -> None:
    host, spec = start_fake(tmp_path)
    host.end(spec.name)
    with pytest.raises(ServiceError, match="closed from outside"):
        wait_until_ready(
            [], lambda: host.panes(spec.name), spec, deadline_s=5, on_wait=lambda text: None
        )


def test_a_download_that_moves_outlasts_the_deadline(tmp_path: Path) -> None:
    host, spec = start_fake(tmp_path)
    sizes = iter(range(20))

    def look() -> str | None:
        size = next(sizes, None)
        return None if size is None else f"the trainer: downloading owner/name: {size // 2} MiB"

    begun = time.monotonic()
    wait_until_ready(
        [Check(process="gateway", look=look)],
        lambda: host.panes(spec.name),
        spec,
        deadline_s=0.5,
        on_wait=lambda text: None,
    )
    assert time.monotonic() - begun > 1
