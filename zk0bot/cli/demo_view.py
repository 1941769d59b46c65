"""What a person sees while the demonstration runs: bars in a terminal, plain lines in a pipe."""

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from zk0bot.cli.live import render
from zk0bot.cli.show import Show
from zk0bot.cli.view import describe_round
from zk0bot.ops.demo import Bar
from zk0bot.ops.state import wrap_line
from zk0bot.records import RunRecord

_PLAIN_STEP = 20
"""In a pipe, a countable thing gets a line each time it has come this much further."""


class DemoView:
    """Writes to stderr; the result goes to stdout when all is over."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._live: Live | None = None
        if sys.stderr.isatty():
            console = Console(stderr=True)
            self._live = Live(console=console, refresh_per_second=5, transient=True)
        self._said: dict[str, tuple[str, int]] = {}

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def phase(self, text: str) -> None:
        """A line that stays."""
        self._said.clear()
        if self._live:
            self._live.update(Group())
            self._live.console.print(text, style="bold", highlight=False)
        else:
            self._show.note(text)

    def bars(self, bars: Sequence[Bar]) -> None:
        """One bar for each thing under way."""
        if self._live:
            self._live.update(build_bars(bars))
            return
        for bar in bars:
            self._say(bar.name, bar.detail, bar.done // _PLAIN_STEP, describe_bar(bar))

    def run(self, run: RunRecord) -> None:
        """The rounds and what each client does."""
        if self._live:
            self._live.update(render(run))
            return
        self._say("run", run.state, run.rounds_done, describe_round(run))

    def _say(self, name: str, state: str, count: int, text: str) -> None:
        """A line, unless the last one about ``name`` said the same."""
        if self._said.get(name) != (state, count):
            self._said[name] = (state, count)
            self._show.note(wrap_line(text, indent="  "))


def build_bars(bars: Sequence[Bar]) -> RenderableType:
    """Name, bar, count and detail, one line each."""
    table = Table.grid(padding=(0, 2))
    for bar in bars:
        is_counted = bar.total > 0
        table.add_row(
            f"  {bar.name}",
            ProgressBar(total=bar.total, completed=bar.done, width=28) if is_counted else "",
            f"{bar.done}/{bar.total}" if is_counted else "",
            bar.detail,
        )
    return table


def describe_bar(bar: Bar) -> str:
    """One line for a pipe."""
    count = f" {bar.done}/{bar.total}" if bar.total else ""
    return f"{bar.name}: {bar.detail}{count}"
