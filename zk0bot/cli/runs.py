"""``zk0bot runs``."""

import typer

from zk0bot.cli.option import JsonFlag, get_show
from zk0bot.config.load import load_paths
from zk0bot.ops.record import list_runs

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def runs(ctx: typer.Context, json: JsonFlag = False) -> None:
    """List the runs of this server, newest first."""
    get_show(ctx).result(list_runs(load_paths()))
