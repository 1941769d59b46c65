"""``zk0bot client``."""

from typing import Annotated

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
from zk0bot.config.load import Sources, load_client
from zk0bot.errors import ConfigError
from zk0bot.ops.services import find_client, start_client, stop_client
from zk0bot.ops.specs import client_session_name
from zk0bot.ops.state import get_client_status, list_clients

app = build_group("Start, stop and look at clients, each on its own dataset.")

Which = Annotated[
    str | None,
    typer.Argument(metavar="[CLIENT]", help="Name or dataset URI; not needed when one runs."),
]


@app.command()
def start(
    ctx: typer.Context,
    dataset_uri: Annotated[
        str | None,
        typer.Argument(
            help="hf:owner/name, owner/name, local:/path, sim:TASK, or a name of "
            "configs/datasets.toml."
        ),
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Default: 127.0.0.1:9092.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the server calls this client.")] = None,
    episodes: Annotated[str | None, typer.Option(help="Such as 0-39,45.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision pin of a hub dataset.")] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(metavar="A=B", help="Camera A of the dataset is the policy's B."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cuda or cpu.")] = None,
    config: ConfigFile = None,
    set_: Settings = None,
    json: JsonFlag = False,
) -> None:
    """Start a client and return when its data is loaded and the server answers."""
    show = get_show(ctx)
    flags = {
        "dataset_uri": dataset_uri,
        "server": server,
        "name": name,
        "episodes": episodes,
        "revision": revision,
        "rename_cameras": _parse_renames(rename),
        "device": device,
    }
    loaded = load_client(Sources(file=config, flags=flags, pairs=tuple(set_ or ())))
    show.notices(loaded.notices)
    machine = build_machine(show, with_secrets=True)
    show.result(start_client(machine, loaded.config, show.waiting))


@app.command()
def stop(ctx: typer.Context, client: Which = None, json: JsonFlag = False) -> None:
    """Stop all that client start started."""
    show = get_show(ctx)
    machine = build_machine(show)
    show.result(stop_client(machine, find_client(machine, client)))


@app.command()
def status(ctx: typer.Context, client: Which = None, json: JsonFlag = False) -> None:
    """Show a client: its data, its link to the server, its processes."""
    show = get_show(ctx)
    machine = build_machine(show)
    show.result(get_client_status(machine.paths, find_client(machine, client), machine.host))


@app.command()
def logs(
    ctx: typer.Context,
    client: Which = None,
    process: ProcessName = None,
    lines: Lines = 20,
    follow: Follow = False,
    json: JsonFlag = False,
) -> None:
    """Show the logs of a client's processes."""
    show = get_show(ctx)
    machine = build_machine(show)
    service_dir = machine.paths.client_dir(find_client(machine, client))
    show_logs(show, service_dir, process, lines, follow)


@app.command("log", hidden=True)
def log(
    ctx: typer.Context,
    client: Which = None,
    process: ProcessName = None,
    lines: Lines = 20,
    follow: Follow = False,
    json: JsonFlag = False,
) -> None:
    """The same as logs."""
    logs(ctx, client, process, lines, follow, json)


@app.command()
def attach(ctx: typer.Context, client: Which = None) -> None:
    """Look at a client's windows in tmux; Ctrl-b d leaves them."""
    machine = build_machine(get_show(ctx))
    attach_to(machine, client_session_name(find_client(machine, client)))


@app.command("list")
def list_(ctx: typer.Context, json: JsonFlag = False) -> None:
    """List the clients of this machine."""
    show = get_show(ctx)
    machine = build_machine(show)
    show.result(list_clients(machine.paths, machine.host))


def _parse_renames(pairs: list[str] | None) -> dict[str, str] | None:
    if not pairs:
        return None
    renames = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if len(renames) != len(pairs) or not all(a and b for a, b in renames.items()):
        raise ConfigError(f"--rename {' '.join(pairs)} is not A=B", hint="--rename top=front")
    return renames
