import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from zk0bot.config.paths import trainer_socket, trainer_state
from zk0bot.errors import DeadlineError, TrainerError
from zk0bot.files import write_json
from zk0bot.records import TrainerState
from zk0bot.training.client import ask
from zk0bot.training.protocol import StatusRequest, TrainerStatus


@contextmanager
def answering(folder: Path, answer: bytes | None) -> Iterator[list[bytes]]:
    """A trainer that says ``answer`` to one request, or only listens for None."""
    asked: list[bytes] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(trainer_socket(folder)))
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as lines:
            asked.append(lines.readline())
            if answer is not None:
                connection.sendall(answer)
            else:
                lines.readline()  # until the caller hangs up

    thread = threading.Thread(target=serve)
    thread.start()
    yield asked
    thread.join(10)
    listener.close()


def ask_status(folder: Path, deadline_s: float = 5.0) -> TrainerStatus:
    return ask(folder, StatusRequest(), TrainerStatus, deadline_s=deadline_s)


def test_an_answer_is_read(home: Path) -> None:
    with answering(home, b'{"ok": {"state": "ready", "pid": 7}}\n') as asked:
        assert ask_status(home) == TrainerStatus(state="ready", pid=7)
    assert json.loads(asked[0]) == {"op": "status"}


def test_a_failure_keeps_code_and_hint(home: Path) -> None:
    failure = b'{"error": {"code": "bad_data", "message": "torn", "hint": "mend it"}}\n'
    with answering(home, failure), pytest.raises(TrainerError, match="torn") as caught:
        ask_status(home)
    assert (caught.value.remote_code, caught.value.hint) == ("bad_data", "mend it")


@pytest.mark.parametrize("answer", [b"", b'{"ok": {"sta'])
def test_a_trainer_that_ends_is_told(home: Path, answer: bytes) -> None:
    with (
        answering(home, answer),
        pytest.raises(TrainerError, match="ended before it answered 'status'"),
    ):
        ask_status(home)


def test_another_answer_is_told(home: Path) -> None:
    with answering(home, b'{"ok": {"loss": 1}}\n'), pytest.raises(TrainerError, match="is no Tra"):
        ask_status(home)


def test_a_deadline_says_what_the_trainer_does(home: Path) -> None:
    state = TrainerState(state="working", detail="making data", done=3, total=60)
    write_json(trainer_state(home), state)
    told: list[TrainerState | None] = []
    with (
        answering(home, None),
        pytest.raises(DeadlineError, match=r"working making data \(3 of 60\)"),
    ):
        ask(home, StatusRequest(), TrainerStatus, deadline_s=0.2, on_wait=told.append)
    assert told and told[0] == state


def test_a_trainer_that_never_comes_is_told(home: Path) -> None:
    with pytest.raises(DeadlineError, match=r"no trainer listens at .*trainer\.sock"):
        ask_status(home, deadline_s=0.15)
