"""``zk0bot demo``."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from zk0bot.cli.demo_view import DemoView
from zk0bot.cli.option import JsonFlag, build_command, build_machine, get_show
from zk0bot.cli.show import Show
from zk0bot.config.paths import Paths
from zk0bot.ops.demo import build_kept_notice, demo_root, run_demo, stop_all
from zk0bot.ops.demo_plan import DemoOptions
from zk0bot.ops.host import TmuxHost
from zk0bot.ops.machine import Machine
from zk0bot.records import RUN_EXIT_CODES

app = build_command()


@app.command()
def demo(
    ctx: typer.Context,
    hard: Annotated[bool, typer.Option("--hard", help="Owners' parts do not overlap.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the federation running.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop one that was kept.")] = False,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Default: 20.")] = None,
    clients: Annotated[int, typer.Option("--clients", help="Robot owners: 2 or 3.")] = 3,
    seed: Annotated[int, typer.Option("--seed", min=0, max=999, help="Of everything.")] = 0,
    output: Annotated[Path, typer.Option("--output", help="Folder for results.")] = Path("outputs"),
    no_local: Annotated[
        bool, typer.Option("--no-local", help="Do not let each owner train alone.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Three robot owners on this machine: alone each policy fails, federated one works."""
    show = get_show(ctx)
    machine = _build_demo_machine(show)
    if stop:
        show.result(stop_all(machine))
        return
    options = DemoOptions(
        hard=hard,
        keep=keep,
        rounds=rounds,
        clients=clients,
        seed=seed,
        output=output.expanduser(),
        with_local=not no_local,
    )
    with DemoView(show) as view:
        result = run_demo(machine, options, view)
    show.result(result)
    if keep:
        show.note(build_kept_notice(machine))
    raise typer.Exit(RUN_EXIT_CODES[result.verdict])


def _build_demo_machine(show: Show) -> Machine:
    """This machine with a state root and a tmux socket of the demonstration's own."""
    machine = build_machine(show)
    paths = Paths(demo_root(machine.paths.root))
    host = show.host or TmuxHost(paths.tmux_socket, machine.surroundings.env)
    return dataclasses.replace(machine, paths=paths, host=host, secrets={})
