"""``zk0bot audit``."""

from typing import Annotated

import typer

from zk0bot.cli.option import JsonFlag, build_group, build_machine, get_show
from zk0bot.ops.audit import check_logs, list_events

app = build_group("Look at and check the logs of who did what.")

ClientName = Annotated[
    str | None, typer.Option("--client", metavar="NAME", help="This client's log only.")
]


@app.command()
def show(
    ctx: typer.Context,
    client: ClientName = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Last events.")] = 20,
    event: Annotated[
        str | None, typer.Option(metavar="EVENT", help="Only events of this kind.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Show the last events of the server, or of one client."""
    terminal = get_show(ctx)
    terminal.result(list_events(build_machine(terminal), client, lines, event))


@app.command()
def verify(
    ctx: typer.Context,
    client: ClientName = None,
    head: Annotated[
        str | None,
        typer.Option(metavar="SEQ:HASH", help="A head noted earlier that must be in the log."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Check that no log of this machine was changed; exit status 1 if one was.

    Prints the head of each log. Note it elsewhere: whoever can write to this disk can put back an
    older log as a whole, and only --head finds that.
    """
    terminal = get_show(ctx)
    check = check_logs(build_machine(terminal), client, head)
    terminal.result(check)
    if not check.ok:
        raise typer.Exit(1)
