"""Nodes by the name under which they are enrolled; what a node calls itself counts for nothing."""

from dataclasses import dataclass
from pathlib import Path

from zk0bot.files import read_record
from zk0bot.records import PresenceList
from zk0bot.training.protocol import NodeDescription


@dataclass(frozen=True, kw_only=True)
class Member:
    """A node that takes part."""

    name: str
    """Under which it is enrolled; no other active node has it."""
    description: NodeDescription

    @property
    def slug(self) -> str:
        """Folder name of this client: its name, reduced to safe characters."""
        safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in self.name)[:40]
        return safe or f"client-{self.description.dataset_id[:8]}"


def find_enrolled_name(presence: Path, node_id: int) -> str | None:
    """The name under which a node is enrolled; None when it is not.

    ``presence`` is the PresenceList that the server's gateway keeps. It is read at each call: a
    node may have been enrolled or revoked since the last one.
    """
    try:
        nodes = read_record(presence, PresenceList).nodes
    except FileNotFoundError:  # no gateway has admitted anybody yet
        return None
    return next((node.name for node in nodes if node.node_id == str(node_id)), None)
