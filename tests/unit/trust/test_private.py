"""Secrets that others can reach are refused."""

import os
from pathlib import Path

import pytest

from zk0bot.errors import ConfigError
from zk0bot.trust.private import make_private_dir, refuse_exposed


def test_private_files_and_folders_pass(tmp_path: Path) -> None:
    folder = make_private_dir(tmp_path / "identity")
    secret = folder / "node.key"
    secret.touch(mode=0o600)
    refuse_exposed(folder, secret, folder / "absent")
    secret.chmod(0o400)
    refuse_exposed(secret)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o601, 0o777])
def test_a_file_that_others_can_reach_is_named_with_its_mode(tmp_path: Path, mode: int) -> None:
    secret = tmp_path / "node key"
    secret.touch()
    secret.chmod(mode)
    with pytest.raises(ConfigError, match=f"node key has mode {mode:04o}") as caught:
        refuse_exposed(secret)
    assert caught.value.hint == f"chmod 600 '{secret}'"


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o711])
def test_a_folder_that_others_can_enter_is_refused_and_not_silently_mended(
    tmp_path: Path, mode: int
) -> None:
    folder = tmp_path / "identity"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        refuse_exposed(make_private_dir(folder))
    assert caught.value.hint == f"chmod 700 {folder}"


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.touch(mode=0o600)
    link = tmp_path / "node.key"
    link.symlink_to(target)
    with pytest.raises(ConfigError, match=r"symbolic link to .*elsewhere"):
        refuse_exposed(link)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_account_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "node.key"
    secret.touch(mode=0o600)
    os.chown(secret, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        refuse_exposed(secret)
