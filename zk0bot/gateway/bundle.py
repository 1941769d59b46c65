"""The app bundle of this version: what a server ships, and all that a node runs."""

import hashlib
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flwr.cli.build import build_fab_from_disk
from flwr.proto.fab_pb2 import Fab
from flwr.proto.run_pb2 import Run

import zk0bot

RUN_KEY = "zk0-run"
"""The one key of a run's configuration: zk0bot's id of the run."""
TASK_TYPE = "flwr-serverapp"
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")


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


def find_run_fault(run: Run, run_id: int) -> str:
    """Why the run that a server describes is not one of this version's; empty: it is."""
    bundle = build_bundle()
    if run.run_id != run_id:
        return "the server answered with another run"
    if run.primary_task_type != TASK_TYPE:
        return f"its task is {run.primary_task_type!r}"
    if (run.fab_id, run.fab_version) != (bundle.fab_id, bundle.fab_version):
        return f"its bundle is {run.fab_id!r} {run.fab_version!r}"
    if run.fab_hash != bundle.hash:
        return f"its bundle has the hash {run.fab_hash[:16]!r}"
    config = run.override_config
    value = config[RUN_KEY].string if RUN_KEY in config else ""
    if set(config) != {RUN_KEY} or not _RUN_ID.fullmatch(value):
        return f"it is configured with {sorted(config)}"
    return ""


def find_fab_fault(requested: str, fab: Fab) -> str:
    """Why the bundle that a server sends is not this version's; empty: it is."""
    own = build_bundle().hash
    found = hashlib.sha256(fab.content).hexdigest()
    if found != own:
        return f"its bundle has the hash {found[:16]!r}"
    if (requested, fab.hash_str) != (own, own):
        return "its bundle goes by another hash"
    return ""
