"""``zk0bot status``."""

import typer

from zk0bot.cli.option import JsonFlag, build_command, build_machine, get_show
from zk0bot.ops.overview import get_status

app = build_command()


@app.command()
def status(ctx: typer.Context, json: JsonFlag = False) -> None:
    """Show what runs on this machine: the server, clients, the run."""
    show = get_show(ctx)
    show.result(get_status(build_machine(show)))
