"""The token for the model and dataset hub: never in argv, never in a log."""

from pathlib import Path

import huggingface_hub

from zk0bot.errors import ConfigError

TOKEN_FILE = "hf_token"


def hub_token(root: Path) -> str | None:
    """``HF_TOKEN`` or the hub's own login, else the content of ``root/hf_token``, else None.

    Raises ConfigError when others can read that file.
    """
    return huggingface_hub.get_token() or _read_token(root / TOKEN_FILE)


def _read_token(path: Path) -> str | None:
    if not path.exists():
        return None
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} can be read by others", hint=f"chmod 600 {path}")
    return path.read_text().strip() or None
