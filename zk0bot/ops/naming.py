"""Short names of clients, and which client is meant."""

import contextlib
import re
from pathlib import Path

from zk0bot.config.models import ClientConfig
from zk0bot.errors import ConfigError, SessionAbsentError, UnknownNameError
from zk0bot.ops.machine import Machine
from zk0bot.ops.specs import client_session_name
from zk0bot.ops.state import get_client_status, list_client_slugs


def client_slug(config: ClientConfig) -> str:
    """Short name of a client's folder and session: from its name, else from its dataset."""
    return slug_of(config.name or config.dataset_uri)


def slug_of(text: str) -> str:
    """``text`` in lower-case letters, digits and single dashes; a URI loses its scheme."""
    scheme, colon, value = text.partition(":")
    if colon and scheme == "local":
        value = Path(value).name or value
    elif colon and scheme == "sim":
        value = f"sim-{value}"
    slug = re.sub(r"[^a-z0-9]+", "-", (value if colon else text).lower()).strip("-")[:48].strip("-")
    if not slug:
        raise ConfigError(f"cannot make a short name of {text!r}", hint="give one with --name")
    return slug


def find_client(machine: Machine, text: str | None) -> str:
    """The client meant by a short name, name or URI; without one, the only running client.

    Raises UnknownNameError or ConfigError listing the choices.
    """
    slugs = list_client_slugs(machine.paths)
    if text:
        names = [text]
        with contextlib.suppress(ConfigError):  # no short name can be made of it: unknown
            names.append(slug_of(text))
        slug = next((name for name in names if name in slugs), None)
        slug = slug or _find_by_uri(machine, text, slugs)
        if slug is None:
            raise UnknownNameError.of("client", text, slugs)
        return slug
    running = [slug for slug in slugs if machine.host.panes(client_session_name(slug))]
    if len(running) == 1:
        return running[0]
    if not running:
        raise SessionAbsentError(
            "no client runs here", hint="zk0bot client start DATASET_URI; zk0bot client list"
        )
    raise ConfigError(
        f"{len(running)} clients run here: {', '.join(running)}", hint="name one of them"
    )


def _find_by_uri(machine: Machine, text: str, slugs: list[str]) -> str | None:
    for slug in slugs:
        status = get_client_status(machine.paths, slug, machine.host)
        if text in (status.dataset_uri, status.name, status.dataset_uri.partition(":")[2]):
            return slug
    return None
