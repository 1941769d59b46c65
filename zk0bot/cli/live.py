"""The view of ``run --stream``: one live picture in a terminal, plain lines in a pipe."""

import sys
from collections.abc import Iterable

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zk0bot.cli.show import Show
from zk0bot.cli.view import describe_client, describe_round, list_changes
from zk0bot.records import RunRecord

_PHASE_STYLES = {"training": "cyan", "done": "green", "late": "yellow", "failed": "red"}


def follow(show: Show, records: Iterable[RunRecord]) -> RunRecord:
    """Show each record as it comes; the last one, which is final."""
    if sys.stdout.isatty() and not show.is_json:
        return _follow_live(records)
    return _follow_plainly(show, records)


def render(run: RunRecord) -> Group:
    """The picture of one record."""
    head = Text(f"run {run.run_id}  {run.state}", style="bold")
    bar = Table.grid()
    bar.add_row(ProgressBar(total=run.num_rounds, completed=run.rounds_done, width=60))
    return Group(head, bar, Text(describe_round(run)), _client_table(run))


def _follow_live(records: Iterable[RunRecord]) -> RunRecord:
    last: RunRecord | None = None
    with Live(console=Console(), refresh_per_second=8, transient=True) as live:
        for run in records:
            last = run
            live.update(render(run))
    assert last is not None, "watch yields at least one record"
    return last


def _follow_plainly(show: Show, records: Iterable[RunRecord]) -> RunRecord:
    last: RunRecord | None = None
    for run in records:
        for line in list_changes(last, run):
            show.line(line)
        last = run
    assert last is not None, "watch yields at least one record"
    return last


def _client_table(run: RunRecord) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for client in run.clients:
        share = client.step / client.steps if client.steps else 0.0
        table.add_row(
            client.name,
            ProgressBar(total=1.0, completed=share, width=16),
            Text(describe_client(client), style=_PHASE_STYLES.get(client.phase, "")),
        )
    return table
