from pathlib import Path

from fake_host import FakeHost

from zk0bot.config.paths import Paths
from zk0bot.ops.machine import Machine
from zk0bot.ops.specs import Surroundings


def test_a_traceback_that_shows_the_machine_shows_no_token(tmp_path: Path) -> None:
    machine = Machine(
        paths=Paths(tmp_path),
        host=FakeHost(),
        surroundings=Surroundings(python=Path("/usr/bin/python3"), env={}),
        secrets={"HF_TOKEN": "hf_canary"},
    )
    assert "canary" not in f"{machine!r} {machine}"
