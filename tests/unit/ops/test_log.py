"""Logs: last lines, without terminal codes."""

from pathlib import Path

import pytest

from zk0bot.errors import SessionAbsentError, UnknownNameError
from zk0bot.ops.log import LogFile, clean, find_logs, read_logs


def write_log(service_dir: Path, process: str, content: bytes) -> None:
    folder = service_dir / "logs"
    folder.mkdir(exist_ok=True)
    (folder / f"{process}.log").write_bytes(content)


def test_last_lines_of_each_log_without_colours(tmp_path: Path) -> None:
    write_log(tmp_path, "gateway", b"one\r\ntwo\r\n\x1b[92mthree\x1b[0m\r\n")
    write_log(tmp_path, "superlink", b"")
    logs = read_logs(find_logs(tmp_path), 2)
    assert [log.lines for log in logs.logs] == [["two", "three"], []]
    folder = tmp_path / "logs"
    assert logs.to_text() == (
        f"== gateway ({folder}/gateway.log)\ntwo\nthree\n== superlink ({folder}/superlink.log)"
    )


def test_an_unknown_process_is_named(tmp_path: Path) -> None:
    with pytest.raises(SessionAbsentError) as absent:
        find_logs(tmp_path)
    assert "zk0bot server start" in (absent.value.hint or "")
    write_log(tmp_path, "gateway", b"")
    with pytest.raises(UnknownNameError) as caught:
        find_logs(tmp_path, "gatewey")
    assert caught.value.hint == "did you mean 'gateway'?"


def test_following_gives_whole_lines_once(tmp_path: Path) -> None:
    write_log(tmp_path, "gateway", b"one\ntw")
    file = LogFile(process="gateway", path=tmp_path / "logs" / "gateway.log")
    text, offset = file.read_from(0)
    assert text == "one\n"
    with file.path.open("ab") as log:
        log.write(b"o\n")
    assert file.read_from(offset) == ("two\n", 8)


def test_following_goes_on_with_the_log_of_the_next_start(tmp_path: Path) -> None:
    write_log(tmp_path, "gateway", b"one\ntwo\n")
    file = LogFile(process="gateway", path=tmp_path / "logs" / "gateway.log")
    offset = file.size()
    file.path.rename(file.path.with_suffix(".log.1"))
    assert (file.size(), file.read_from(offset)) == (0, ("", 0))
    write_log(tmp_path, "gateway", b"new\n")
    assert file.read_from(offset) == ("new\n", 4)


@pytest.mark.parametrize(
    "evil",
    [
        "\x1b[2J", "\x1b]0;owned\x07", "\x1b]52;c;cm0gLXJm\x1b\\", "\x1bPq\x1b\\", "\x1bc",
        "\x1b(0", "\x9b2J", "\r", "\x08\x08", "\x1b[38;2;1;2;3m", "\x1b[?1049h", "\x07",
    ],
)  # fmt: skip
def test_nothing_in_a_log_moves_the_terminal(evil: str) -> None:
    assert clean(f"a\tb{evil}c\n") == "a\tbc\n"


def test_an_endless_escape_ends_with_its_line() -> None:
    assert clean("a\x1b]0;never closed\nnext\n") == "a\nnext\n"
