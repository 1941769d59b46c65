"""The logs of one service's processes."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zk0bot.errors import SessionAbsentError, UnknownNameError
from zk0bot.ops.specs import logs_dir
from zk0bot.records import Record

_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, cursor
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)"  # titles, clipboard and other texts to the terminal
    r"|\x1b[ -/]*[0-~]"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]",
    re.MULTILINE,
)
"""Whatever a terminal would obey: a log also repeats what strangers say."""


class ProcessLog(Record):
    """The last lines of one log."""

    process: str
    path: str
    lines: list[str]


class Logs(Record):
    """The last lines of a service's logs."""

    logs: list[ProcessLog]

    def to_text(self) -> str:
        if len(self.logs) == 1:
            return "\n".join(self.logs[0].lines)
        return "\n".join(
            "\n".join([f"== {log.process} ({log.path})", *log.lines]) for log in self.logs
        )


@dataclass(frozen=True, kw_only=True)
class LogFile:
    """One process's log."""

    process: str
    path: Path

    def read_from(self, offset: int) -> tuple[str, int]:
        """What was written after ``offset``, up to its last whole line, and the new offset.

        A log that is shorter is a new one, from its beginning; one that is absent comes back.
        """
        try:
            with self.path.open("rb") as file:
                offset = offset if offset <= file.seek(0, os.SEEK_END) else 0
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:
            return "", 0
        whole = data[: data.rfind(b"\n") + 1]
        return clean(whole.decode(errors="replace")), offset + len(whole)

    def size(self) -> int:
        """Bytes of it; 0 while it is absent."""
        return self.path.stat().st_size if self.path.exists() else 0


def find_logs(service_dir: Path, process: str | None = None) -> list[LogFile]:
    """The logs of a service, also of one that is stopped.

    Raises SessionAbsentError when it was never started, UnknownNameError for another process.
    """
    files = [
        LogFile(process=path.stem, path=path)
        for path in sorted(logs_dir(service_dir).glob("*.log"))
    ]
    if not files:
        raise SessionAbsentError(
            f"there are no logs in {logs_dir(service_dir)}",
            hint="they come with the first zk0bot server start or client start",
        )
    if process is None:
        return files
    chosen = [file for file in files if file.process == process]
    if not chosen:
        raise UnknownNameError.of("process", process, [file.process for file in files])
    return chosen


def read_logs(files: Sequence[LogFile], lines: int) -> Logs:
    """The last ``lines`` lines of each log."""
    return Logs(
        logs=[
            ProcessLog(process=file.process, path=str(file.path), lines=read_tail(file.path, lines))
            for file in files
        ]
    )


def read_tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log, without terminal codes; none when there is no file."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 400 * lines - 4000))
        text = file.read().decode(errors="replace")
    return clean(text).splitlines()[-lines:]


def clean(text: str) -> str:
    """``text`` without anything that a terminal obeys, but for tabs and ends of lines."""
    return _ESCAPES.sub("", text)
