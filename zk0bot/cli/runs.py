"""``zk0bot runs``."""

import typer

from zk0bot.cli.option import JsonFlag, build_command, get_show
from zk0bot.config.load import load_paths
from zk0bot.ops.record import list_runs

app = build_command()


@app.command()
def runs(ctx: typer.Context, json: JsonFlag = False) -> None:
    """List the runs of this server, newest first."""
    get_show(ctx).result(list_runs(load_paths()))
