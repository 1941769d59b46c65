"""``zk0bot compare``."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from zk0bot.cli.demo_view import DemoView
from zk0bot.cli.option import JsonFlag, build_command, build_machine, get_show
from zk0bot.cli.show import Show
from zk0bot.config.experiment import ExperimentList, list_experiments, load_experiment
from zk0bot.config.paths import Paths
from zk0bot.errors import ConfigError
from zk0bot.ops.bench import BenchOptions, compare_root
from zk0bot.ops.compare import compare, read_comparison
from zk0bot.ops.compare_plan import default_output
from zk0bot.ops.host import TmuxHost
from zk0bot.ops.machine import Machine

app = build_command()
INCOMPLETE = 1


@app.command("compare")
def compare_command(
    ctx: typer.Context,
    experiment: Annotated[
        str, typer.Argument(help="A TOML file, or the name of a shipped experiment.")
    ] = "",
    seeds: Annotated[str, typer.Option("--seeds", help="Such as 0-4; default: the file's.")] = "",
    output: Annotated[
        Path | None, typer.Option("--output", help="Default: outputs/compare-NAME.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Do failed cells anew.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Also when it takes hours.")] = False,
    read: Annotated[bool, typer.Option("--read", help="Only show what is done.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the shipped experiments.")] = False,
    json: JsonFlag = False,
) -> None:
    """Hold settings against each other: same seeds, steps and scenes; what differs for real.

    Trains on simulated owners on this machine. The same command goes on where one was interrupted.
    """
    show = get_show(ctx)
    if list_:
        show.result(ExperimentList(experiments=list_experiments()))
        return
    if not experiment:
        raise ConfigError("no experiment given", hint="zk0bot compare --list")
    loaded = load_experiment(experiment, seeds=seeds)
    folder = output.expanduser() if output else default_output(loaded)
    machine = build_compare_machine(show)
    if read:
        result = read_comparison(machine, loaded, folder)
    else:
        options = BenchOptions(output=folder, again=again, is_agreed=yes)
        with DemoView(show) as view:
            result = compare(machine, loaded, options, view)
    show.result(result)
    raise typer.Exit(0 if result.is_complete else INCOMPLETE)


def build_compare_machine(show: Show) -> Machine:
    """This machine with a state root and a tmux socket of the comparisons' own; tuning's, too."""
    machine = build_machine(show)
    paths = Paths(compare_root(machine.paths.root))
    host = show.host or TmuxHost(paths.tmux_socket, machine.surroundings.env)
    return dataclasses.replace(machine, paths=paths, host=host)
