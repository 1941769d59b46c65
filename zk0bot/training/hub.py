"""What is fetched from the model and dataset hub, and the token for it.

The token is never in argv and never in a log.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
import huggingface_hub
from huggingface_hub.errors import DryRunError

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
    max_bytes: int | None = None,
) -> Path:
    """A folder with the files of ``repo_id`` that match ``patterns``, downloaded where needed.

    An empty ``revision`` is the main branch. ``on_size`` hears every second, from another thread,
    how many MiB of it are on disk. Raises ModelError or DataError when the hub cannot
    be reached, has no such thing, refuses it, or would send more than ``max_bytes``.
    """
    cache = paths.cache_dir / "hub"
    download = partial(
        huggingface_hub.snapshot_download,
        repo_id,
        repo_type=kind,
        revision=revision or None,
        cache_dir=cache,
        allow_patterns=patterns,
        token=hub_token(paths.root),
    )
    wrong = ModelError if kind == "model" else DataError
    try:
        if max_bytes is not None and (size := _missing_bytes(download)) > max_bytes:
            raise wrong(
                f"{kind} {repo_id!r} is {size >> 30} GiB, more than {max_bytes >> 30} GiB",
                hint="download it yourself and give its folder, if you want it",
            )
        with reporting_size(cache / f"{kind}s--{repo_id.replace('/', '--')}", on_size):
            folder = download()
    except (httpx.HTTPError, ValueError, OSError) as error:  # a name or path that no hub has, too
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


def _missing_bytes(download: Callable[..., Any]) -> int:
    """What ``download`` would fetch; 0 where the hub cannot be asked."""
    with suppress(DryRunError):
        return sum(file.file_size for file in download(dry_run=True) if file.will_download)
    return 0


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
