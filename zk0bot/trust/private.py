"""Secrets that others can reach are refused, with the command that mends it."""

import os
import shlex
import stat
from pathlib import Path

from zk0bot.errors import ConfigError


def make_private_dir(path: Path) -> Path:
    """Create ``path`` (0700) if needed and return it.

    The mode of one that is there stays, for ``refuse_exposed`` to find: what it held may be known.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def refuse_exposed(*paths: Path) -> None:
    """Raise ConfigError for the first of ``paths`` that another account could read or replace.

    A file must be 0600 or tighter and a folder 0700 or tighter, of this account, and no symbolic
    link. What is absent is not exposed.
    """
    for path in paths:
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        _refuse_link(path, status)
        _refuse_foreign(path, status)
        _refuse_open(path, status)


def _refuse_link(path: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise ConfigError(
            f"{path} is a symbolic link to {path.readlink()}; secrets are not followed",
            hint=f"put the file itself there, or remove the link: rm {shlex.quote(str(path))}",
        )


def _refuse_foreign(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.getuid():
        raise ConfigError(
            f"{path} belongs to user {status.st_uid}, not to this account ({os.getuid()})",
            hint=f"sudo chown {os.getuid()} {shlex.quote(str(path))}",
        )


def _refuse_open(path: Path, status: os.stat_result) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        wanted = "700" if stat.S_ISDIR(status.st_mode) else "600"
        raise ConfigError(
            f"{path} has mode {mode:04o} (owner {status.st_uid}): other accounts can reach it",
            hint=f"chmod {wanted} {shlex.quote(str(path))}",
        )
