"""Names of settings: fields in Python, keys in files, on the command line and in messages."""

from collections.abc import Mapping
from typing import Any


def kebab(field: str) -> str:
    """A field's name as files and people write it: ``cosine-warm-restarts-T-0``."""
    return field.replace("_t_", "_T_").replace("_", "-")


def snake_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys as fields are named, however they are spelt."""
    return {key.replace("-", "_").lower(): value for key, value in values.items()}
