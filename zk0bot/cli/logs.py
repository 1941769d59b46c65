"""Showing the logs of one service."""

import time
from collections.abc import Sequence
from pathlib import Path

from zk0bot.cli.show import Show
from zk0bot.ops.log import LogFile, find_logs, read_logs

_POLL_S = 0.3


def show_logs(show: Show, service_dir: Path, process: str | None, lines: int, follow: bool) -> None:
    """Print the last lines of each log; with ``follow``, what is added until Ctrl-C."""
    files = find_logs(service_dir, process)
    logs = read_logs(files, lines)
    show.result(logs)
    if follow and not show.is_json:
        _follow(show, files)


def _follow(show: Show, files: Sequence[LogFile]) -> None:
    offsets = {file.process: file.size() for file in files}
    while True:
        for file in files:
            text, offsets[file.process] = file.read_from(offsets[file.process])
            for line in text.splitlines():
                show.line(f"{file.process}: {line}" if len(files) > 1 else line)
        time.sleep(_POLL_S)
