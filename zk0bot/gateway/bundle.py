"""The app bundle of this version: what a server ships, and all that a node runs."""

import hashlib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flwr.cli.build import build_fab_from_disk

import zk0bot

RUN_KEY = "zk0-run"
"""The one key of a run's configuration: zk0bot's id of the run."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle's bytes and what Flower calls it."""

    content: bytes
    fab_id: str
    fab_version: str

    @property
    def hash(self) -> str:
        """SHA-256 of the content, in hex."""
        return hashlib.sha256(self.content).hexdigest()


def bundle_dir() -> Path:
    """The app that Flower ships: two modules of three lines."""
    return Path(zk0bot.__file__).parent / "federation" / "bundle"


@cache
def build_bundle() -> Bundle:
    """The bundle of the installed zk0bot; the same bytes on every machine."""
    folder = bundle_dir()
    settings = tomllib.loads((folder / "pyproject.toml").read_text())
    project, publisher = settings["project"], settings["tool"]["flwr"]["app"]["publisher"]
    return Bundle(
        content=build_fab_from_disk(folder),
        fab_id=f"{publisher}/{project['name']}",
        fab_version=project["version"],
    )


def bundle_hash() -> str:
    """SHA-256 of this version's bundle, in hex."""
    return build_bundle().hash
