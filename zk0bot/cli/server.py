"""``zk0bot server``."""

import typer

from zk0bot.cli.logs import show_logs
from zk0bot.cli.option import (
    ConfigFile,
    Follow,
    JsonFlag,
    Lines,
    ProcessName,
    Settings,
    attach_to,
    build_group,
    build_machine,
    get_show,
)
from zk0bot.config.load import Sources, load_paths, load_server
from zk0bot.ops.services import start_server, stop_server
from zk0bot.ops.specs import SERVER_SESSION
from zk0bot.ops.state import get_server_status

app = build_group("Start, stop and look at the server.")


@app.command()
def start(
    ctx: typer.Context, config: ConfigFile = None, set_: Settings = None, json: JsonFlag = False
) -> None:
    """Start the server and return when it answers."""
    show = get_show(ctx)
    loaded = load_server(Sources(file=config, pairs=tuple(set_ or ())))
    show.notices(loaded.notices)
    show.result(start_server(build_machine(show, with_secrets=True), loaded.config, show.waiting))


@app.command()
def stop(ctx: typer.Context, json: JsonFlag = False) -> None:
    """Stop all that server start started."""
    show = get_show(ctx)
    show.result(stop_server(build_machine(show)))


@app.command()
def status(ctx: typer.Context, json: JsonFlag = False) -> None:
    """Show the server's processes."""
    show = get_show(ctx)
    machine = build_machine(show)
    show.result(get_server_status(machine.paths, machine.host))


@app.command()
def logs(
    ctx: typer.Context,
    process: ProcessName = None,
    lines: Lines = 20,
    follow: Follow = False,
    json: JsonFlag = False,
) -> None:
    """Show the logs of the server's processes."""
    show = get_show(ctx)
    show_logs(show, load_paths().server_dir, process, lines, follow)


@app.command("log", hidden=True)
def log(
    ctx: typer.Context,
    process: ProcessName = None,
    lines: Lines = 20,
    follow: Follow = False,
    json: JsonFlag = False,
) -> None:
    """The same as logs."""
    logs(ctx, process, lines, follow, json)


@app.command()
def attach(ctx: typer.Context) -> None:
    """Look at the server's windows in tmux; Ctrl-b d leaves them."""
    attach_to(build_machine(get_show(ctx)), SERVER_SESSION)
