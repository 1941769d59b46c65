"""How other processes ask a warm trainer. Imports no torch."""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from zk0bot.config.paths import trainer_socket, trainer_state
from zk0bot.errors import DataError, DeadlineError, ServiceError, TrainerError
from zk0bot.files import read_record
from zk0bot.records import TrainerState
from zk0bot.training.peer import is_same_user
from zk0bot.training.protocol import Failure, Message, Request

POLL_S = 0.1
WAIT_TELL_S = 0.5
OnWait = Callable[[TrainerState | None], None]
"""Told what the trainer does while its answer is waited for; None: it has said nothing yet."""


def ask[A: Message](
    owner_dir: Path,
    request: Request,
    answer_type: type[A],
    *,
    deadline_s: float,
    on_wait: OnWait = lambda state: None,
) -> A:
    """The answer of the trainer that owns ``owner_dir``.

    Waits for a trainer that is not there yet, loads or works for others. Raises DeadlineError that
    says what it waited for, TrainerError with the code and hint of a failure there.
    """
    deadline = time.monotonic() + deadline_s
    with _connected(owner_dir, request.op, deadline, deadline_s, on_wait) as connection:
        connection.sendall(request.model_dump_json().encode() + b"\n")
        line = _read_line(connection, owner_dir, request.op, deadline, deadline_s, on_wait)
    return _open_answer(line, answer_type, request.op)


def _connected(
    owner_dir: Path, op: str, deadline: float, deadline_s: float, on_wait: OnWait
) -> socket.socket:
    """A connection to the trainer, as soon as it listens."""
    path = trainer_socket(owner_dir)
    while True:
        connection = socket.socket(socket.AF_UNIX)
        if connection.connect_ex(str(path)) == 0:
            _refuse_stranger(connection, path)
            return connection
        connection.close()
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"no trainer listens at {path} after {deadline_s:g} s, asked for {op!r}",
                hint="look at its log: zk0bot client logs, or zk0bot server logs",
            )
        on_wait(_find_state(owner_dir))
        time.sleep(POLL_S)


def _refuse_stranger(connection: socket.socket, path: Path) -> None:
    if not is_same_user(connection):
        connection.close()
        raise ServiceError(
            f"another account listens at {path}", hint=f"remove {path.parent} and start again"
        )


def _read_line(
    connection: socket.socket,
    owner_dir: Path,
    op: str,
    deadline: float,
    deadline_s: float,
    on_wait: OnWait,
) -> bytes:
    received = bytearray()
    connection.settimeout(WAIT_TELL_S)
    while not received.endswith(b"\n"):
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"the trainer did not answer {op!r} within {deadline_s:g} s; it is "
                f"{_describe(_find_state(owner_dir))}",
                hint="raise the deadline, or look at its log",
            )
        try:
            part = connection.recv(65536)
        except TimeoutError:
            on_wait(_find_state(owner_dir))
            continue
        except ConnectionError:
            part = b""
        if not part:
            raise TrainerError(
                f"the trainer ended before it answered {op!r}",
                hint="look at its log: zk0bot client logs, or zk0bot server logs",
            )
        received += part
    return bytes(received)


def _open_answer[A: Message](line: bytes, answer_type: type[A], op: str) -> A:
    answer = json.loads(line)
    if "error" in answer:
        failure = Failure.model_validate(answer["error"])
        raise TrainerError(failure.message, hint=failure.hint, remote_code=failure.code)
    try:
        return answer_type.model_validate(answer["ok"])
    except ValidationError as error:
        raise TrainerError(
            f"the trainer's answer to {op!r} is no {answer_type.__name__}: {error}",
            hint="caller and trainer need the same zk0bot version",
        ) from error


def _find_state(owner_dir: Path) -> TrainerState | None:
    try:
        return read_record(trainer_state(owner_dir), TrainerState)
    except (FileNotFoundError, DataError):
        return None


def _describe(state: TrainerState | None) -> str:
    if state is None:
        return "silent"
    count = f" ({state.done} of {state.total})" if state.total else ""
    return f"{state.state} {state.detail}{count}".strip()
