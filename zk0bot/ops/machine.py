"""This machine, as every operation gets it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from zk0bot.config.paths import Paths
from zk0bot.ops.host import Host
from zk0bot.ops.specs import Surroundings


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where services are started: paths, sessions, environment."""

    paths: Paths
    host: Host
    surroundings: Surroundings
    secrets: Mapping[str, str] = field(repr=False)
    """Tokens for the trainers."""
