"""Dataset URIs: which kind, and the rest."""

from dataclasses import dataclass
from typing import Literal

from zk0bot.errors import ConfigError, UnknownNameError

Kind = Literal["hf", "local", "sim"]
KINDS: tuple[Kind, ...] = ("hf", "local", "sim")


@dataclass(frozen=True, kw_only=True)
class DatasetUri:
    """``hf:owner/name``, ``local:/path`` or ``sim:TASK[?key=value&...]``."""

    kind: Kind
    value: str
    """Everything after the first colon."""

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}"


def parse_dataset_uri(text: str) -> DatasetUri:
    """Read a URI; a bare ``owner/name`` is a hub id.

    Raises ConfigError naming the text when it has no value or no owner, UnknownNameError for an
    unknown scheme.
    """
    scheme, colon, value = text.strip().partition(":")
    if not colon:
        scheme, value = "hf", scheme
    if scheme not in KINDS:
        raise UnknownNameError.of("dataset scheme", scheme, KINDS)
    if not value:
        raise ConfigError(
            f"dataset URI {text!r} names nothing",
            hint="use hf:owner/name, local:/path or sim:touch-red",
        )
    if scheme == "hf":
        _refuse_bad_repo_id(text, value)
    return DatasetUri(kind=next(kind for kind in KINDS if kind == scheme), value=value)


def _refuse_bad_repo_id(text: str, value: str) -> None:
    owner, slash, name = value.partition("/")
    if not (owner and slash and name) or "/" in name or any(c.isspace() for c in value):
        raise ConfigError(
            f"dataset URI {text!r} is not owner/name",
            hint="for a folder on this machine use local:/path",
        )
