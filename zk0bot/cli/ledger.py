"""Showing what left a client and what reached it."""

from pathlib import Path

from zk0bot.cli.show import Show
from zk0bot.ops.ledger import export_messages, list_messages, sum_messages


def show_ledger(
    show: Show, service_dir: Path, *, lines: int, sum_by: str | None, export: Path | None
) -> None:
    """Print the last messages, their sums, or where the whole ledger was written to."""
    if export is not None:
        show.result(export_messages(service_dir, export))
    elif sum_by is not None:
        show.result(sum_messages(service_dir, sum_by))
    else:
        show.result(list_messages(service_dir, lines))
