"""Private folders and atomic files where somebody else was first."""

import os
from pathlib import Path

import pytest

from zk0bot.config.load import load_paths
from zk0bot.config.paths import trainer_socket
from zk0bot.errors import DataError, ServiceError
from zk0bot.files import private_dir, read_json, write_text

NOBODY = 65534


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder of another account."""
    if os.geteuid() != 0:
        return Path("/usr")
    folder = tmp_path / "foreign"
    folder.mkdir(mode=0o777)
    os.chown(folder, NOBODY, NOBODY)
    return folder


def test_a_private_folder_is_private_like_its_new_parents(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir(mode=0o755)
    path = private_dir(old / "a" / "b")
    assert [(p.stat().st_mode & 0o777) for p in (old, old / "a", path)] == [0o755, 0o700, 0o700]
    path.chmod(0o777)
    assert private_dir(path).stat().st_mode & 0o777 == 0o700


def test_a_private_folder_is_no_link_and_nobody_else_s(tmp_path: Path, foreign: Path) -> None:
    before = foreign.stat().st_mode
    with pytest.raises(ServiceError, match=f"{foreign} belongs to user"):
        private_dir(foreign)
    (tmp_path / "target").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(ServiceError, match="link is a symbolic link to"):
        private_dir(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(ServiceError, match="is no folder"):
        private_dir(tmp_path / "file")
    assert foreign.stat().st_mode == before
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o755


def test_a_planted_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "file").symlink_to(victim)
    write_text(tmp_path / "file", "new", mode=0o600)
    assert victim.read_text() == "precious"
    assert (tmp_path / "file").read_text() == "new" and not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("text", ["[" * 10**5, "9" * 10**5, "{", "\x00"])
def test_what_is_no_json_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_json_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(DataError, match="larger than 16 MiB"):
        read_json(path)


def test_a_state_root_may_be_a_link_of_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("ZK0BOT_HOME", str(tmp_path / "root"))
    assert private_dir(load_paths().root) == tmp_path / "disk"


def test_a_socket_folder_in_tmp_that_somebody_else_made_is_refused(
    tmp_path: Path, foreign: Path
) -> None:
    folder = trainer_socket(tmp_path / ("deep" * 30)).parent
    assert folder.parent == Path("/tmp")
    folder.symlink_to(foreign)
    try:
        with pytest.raises(ServiceError, match=str(folder)):
            private_dir(folder)
    finally:
        folder.unlink()


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "waits.json")
    for name in ("endless", "folder", "waits"):
        with pytest.raises(DataError, match="is no file"):
            read_json(tmp_path / f"{name}.json")
