"""The federation of ``node_attack``, once for all modules that name this plugin."""

import shutil
from collections.abc import Iterator

import pytest
from node_attack import Federation, Operator, hostile_federation


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A server, the owner's node behind a recorder, and another node."""
    if shutil.which("tmux") is None:
        pytest.skip("needs tmux")
    with hostile_federation(tmp_path_factory.mktemp("hostile")) as federation:
        yield federation


@pytest.fixture(scope="module")
def operator(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> Operator:
    """The server's operator, and a folder for what they get."""
    return Operator(federation, tmp_path_factory.mktemp("operator"))
