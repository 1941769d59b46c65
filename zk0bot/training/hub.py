"""What is fetched from the model and dataset hub, and the token for it.

The token is never in argv and never in a log.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import httpx
import huggingface_hub
from huggingface_hub.errors import HFValidationError

from zk0bot.config.paths import Paths
from zk0bot.errors import ConfigError, DataError, ModelError

TOKEN_FILE = "hf_token"


def fetch(
    repo_id: str,
    kind: Literal["model", "dataset"],
    paths: Paths,
    *,
    revision: str,
    patterns: list[str],
    on_size: Callable[[int], None] = lambda mib: None,
) -> Path:
    """A folder with the files of ``repo_id`` that match ``patterns``, downloaded where needed.

    An empty ``revision`` is the main branch. ``on_size`` hears every second, from another thread,
    how many MiB of it are on disk. Raises ModelError or DataError when the hub cannot
    be reached, has no such thing, or refuses it.
    """
    cache = paths.cache_dir / "hub"
    try:
        with reporting_size(cache / f"{kind}s--{repo_id.replace('/', '--')}", on_size):
            folder = huggingface_hub.snapshot_download(
                repo_id,
                repo_type=kind,
                revision=revision or None,
                cache_dir=cache,
                allow_patterns=patterns,
                token=hub_token(paths.root),
            )
    except (httpx.HTTPError, HFValidationError, OSError) as error:
        wrong = ModelError if kind == "model" else DataError
        raise wrong(
            f"{kind} {repo_id!r} cannot be had from the hub: {error}",
            hint="check name, revision and network; for what is private set HF_TOKEN",
        ) from error
    return Path(folder)


@contextmanager
def reporting_size(
    folder: Path, on_size: Callable[[int], None], interval_s: float = 1.0
) -> Iterator[None]:
    """While the body runs, tell ``on_size`` the MiB of files below ``folder`` at each interval."""
    is_over = threading.Event()

    def report() -> None:
        while not is_over.wait(interval_s):
            on_size(_size_mib(folder))

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def hub_token(root: Path) -> str | None:
    """``HF_TOKEN`` or the hub's own login, else the content of ``root/hf_token``, else None.

    Raises ConfigError when others can read that file.
    """
    return huggingface_hub.get_token() or _read_token(root / TOKEN_FILE)


def _size_mib(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # renamed when it is whole
            total += 0 if path.is_symlink() else path.stat().st_size
    return total >> 20


def _read_token(path: Path) -> str | None:
    if not path.exists():
        return None
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} can be read by others", hint=f"chmod 600 {path}")
    return path.read_text().strip() or None
