"""Files that are whole or absent: atomic writes, private folders, JSON checked on reading."""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from zk0bot.errors import DataError

_HINT = "restore it; a file below the state root can be deleted, zk0bot writes it again"


@contextmanager
def replacing(path: Path, *, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary sibling of ``path``; on success it becomes ``path`` in one step.

    A reader sees the old content or the new, never a part, also when the writer is killed.
    On an exception the temporary file is removed and ``path`` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write ``text`` to ``path`` atomically."""
    with replacing(path, mode=mode) as temporary:
        temporary.write_text(text)


def write_json(
    path: Path, value: BaseModel | Mapping[str, Any] | list[Any], *, mode: int = 0o644
) -> None:
    """Write a record, mapping or list as indented JSON, atomically. NaN is refused."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    write_text(path, json.dumps(plain, indent=2, allow_nan=False) + "\n", mode=mode)


def read_json(path: Path) -> Any:
    """The value in ``path``.

    Raises FileNotFoundError when absent, DataError naming the file when it is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON: {error}", hint=_HINT) from error


def read_record[R: BaseModel](path: Path, kind: type[R]) -> R:
    """The record in ``path``; DataError naming the file when it does not fit ``kind``."""
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        raise DataError(f"{path} does not hold a {kind.__name__}: {error}", hint=_HINT) from error


class Flag:
    """A file whose touches another process notices: cheaper than asking it over and over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._touched_at()

    def raise_(self) -> None:
        """Touch the file.

        The time is set in nanoseconds: the kernel's own would be the same for two touches within
        one tick of 4 ms, and the second would not be noticed.
        """
        self._path.touch()
        moment = time.time_ns()
        os.utime(self._path, ns=(moment, moment))

    def was_raised(self) -> bool:
        """Whether the file was touched since the last time this was asked."""
        seen, self._seen = self._seen, self._touched_at()
        return self._seen != seen

    def _touched_at(self) -> int:
        with suppress(FileNotFoundError):
            return self._path.stat().st_mtime_ns
        return 0


def private_dir(path: Path) -> Path:
    """Create ``path`` (and parents) if needed, readable by its owner only, and return it."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    return path
