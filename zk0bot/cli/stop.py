"""``zk0bot stop``."""

import typer

from zk0bot.cli.option import JsonFlag, build_command, build_machine, get_show
from zk0bot.cli.view import RunView
from zk0bot.ops.runs import stop_run

app = build_command()


@app.command()
def stop(ctx: typer.Context, json: JsonFlag = False) -> None:
    """Stop the run under way; server and clients stay."""
    show = get_show(ctx)
    show.result(RunView(stop_run(build_machine(show), show.waiting)))
