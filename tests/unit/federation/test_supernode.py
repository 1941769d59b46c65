from pathlib import Path

from flwr.common.constant import APP_DIR
from flwr.supercore.utils import get_flwr_home

from zk0bot.federation.supernode import empty_apps


def test_the_install_folder_is_private_and_empty_at_the_start() -> None:
    apps = get_flwr_home() / APP_DIR
    (apps / "zk0bot.x").mkdir(parents=True)
    (apps / "zk0bot.x" / "evil.py").write_text("1")
    apps.chmod(0o777)
    empty_apps()
    assert list(apps.iterdir()) == [] and apps.stat().st_mode & 0o777 == 0o700


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    get_flwr_home().mkdir(parents=True)
    (get_flwr_home() / APP_DIR).symlink_to(tmp_path)
    empty_apps()
    assert kept.read_text() == "mine"
    assert not (get_flwr_home() / APP_DIR).is_symlink()
