"""``zk0bot tune``."""

from pathlib import Path
from typing import Annotated

import typer

from zk0bot.cli.compare import INCOMPLETE, build_compare_machine
from zk0bot.cli.demo_view import DemoView
from zk0bot.cli.option import JsonFlag, build_command, get_show
from zk0bot.config.space import SpaceList, list_spaces, load_space
from zk0bot.errors import ConfigError
from zk0bot.ops.bench import BenchOptions
from zk0bot.ops.tune import read_tuning, tune
from zk0bot.ops.tune_plan import default_output

app = build_command()


@app.command("tune")
def tune_command(
    ctx: typer.Context,
    space: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped space.")] = "",
    seeds: Annotated[
        str, typer.Option("--seeds", help="Of the comparison at the end; default: the file's.")
    ] = "",
    output: Annotated[
        Path | None, typer.Option("--output", help="Default: outputs/tune-NAME.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Do failed cells anew.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Also when it takes hours.")] = False,
    read: Annotated[bool, typer.Option("--read", help="Only show what is done.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the shipped spaces.")] = False,
    json: JsonFlag = False,
) -> None:
    """Try a few settings on tuning scenes; hold the best against the default on others.

    Trains on simulated owners on this machine. The same command goes on where one was interrupted.
    """
    show = get_show(ctx)
    if list_:
        show.result(SpaceList(spaces=list_spaces()))
        return
    if not space:
        raise ConfigError("no space given", hint="zk0bot tune --list")
    loaded = load_space(space, seeds=seeds)
    folder = output.expanduser() if output else default_output(loaded)
    machine = build_compare_machine(show)
    if read:
        result = read_tuning(machine, loaded, folder)
    else:
        options = BenchOptions(output=folder, again=again, is_agreed=yes)
        with DemoView(show) as view:
            result = tune(machine, loaded, options, view)
    show.result(result)
    raise typer.Exit(0 if result.is_complete else INCOMPLETE)
