"""``zk0bot version``."""

import platform
from importlib.metadata import version as version_of

import typer

from zk0bot.cli.option import JsonFlag, build_command, get_show
from zk0bot.records import Record
from zk0bot.version import __version__

app = build_command()


class Versions(Record):
    """What a federation has to agree on."""

    zk0bot: str
    flwr: str
    lerobot: str
    torch: str
    python: str

    def to_text(self) -> str:
        return "\n".join(f"{name:<8} {value}" for name, value in self.model_dump().items())


@app.command()
def version(ctx: typer.Context, json: JsonFlag = False) -> None:
    """Show the versions in use."""
    found = {name: version_of(name) for name in ("flwr", "lerobot", "torch")}
    python = platform.python_version()
    get_show(ctx).result(Versions(zk0bot=__version__, python=python, **found))
