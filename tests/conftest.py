"""What every test gets: a private home, no colours, one thread, and no network but loopback.

Set while pytest collects, before anything reads them: huggingface_hub and torch look only once.
"""

import contextlib
import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
_CALLERS_ZK0BOT = Path(os.environ.get("ZK0BOT_HOME") or Path.home() / ".zk0bot")
_CALLERS_UV_CACHE = Path(os.environ.get("UV_CACHE_DIR") or _CALLERS_ZK0BOT / "cache" / "uv")
_LEAKS = ("ZK0BOT_", "ZK0_", "DATASET_", "HF_", "FLWR_", "WANDB_", "TMUX")
_LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


def pytest_configure() -> None:
    for name in [name for name in os.environ if name.startswith(_LEAKS)]:
        del os.environ[name]
    session_home = _make_home()
    os.environ.update(_environment(session_home))
    sys.addaudithook(_refuse_network)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HOME"], ignore_errors=True)  # of this session: set above


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This test's own HOME; ``.zk0bot``, ``flwr`` and ``hf`` lie in it. Gone afterwards."""
    path = _make_home()
    for name, value in _environment(path).items():
        monkeypatch.setenv(name, value)
    yield path
    shutil.rmtree(path, ignore_errors=True)  # a process that is ending may still write


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def uv_environment(tmp_path: Path) -> dict[str, str]:
    """PATH with the uv and the cache of scripts/setup.sh: installs what .venv has, offline.

    Where only the uv that came with Flower is found, whose cache is another, online.
    """
    venv_bin = Path(sys.prefix) / "bin"
    others = os.pathsep.join(
        part for part in os.environ["PATH"].split(os.pathsep) if Path(part) != venv_bin
    )
    private = _CALLERS_ZK0BOT / "tools" / "uv" / "bin"
    found = shutil.which("uv", path=f"{private}{os.pathsep}{others}")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "uv").symlink_to(found or venv_bin / "uv")
    way_out = ("SSL_CERT_FILE", "SSL_CERT_DIR", "HTTPS_PROXY", "https_proxy", "UV_DEFAULT_INDEX")
    environment = {name: os.environ[name] for name in way_out if name in os.environ} | {
        "PATH": f"{tools}:{Path(sys.executable).resolve().parent}:/usr/bin:/bin",
        "UV_CACHE_DIR": str(_CALLERS_UV_CACHE),
        "UV_COMPILE_BYTECODE": "0",
    }
    return environment | ({"UV_OFFLINE": "1"} if found else {})


@pytest.fixture
def full_disk() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context in which this process cannot write a byte to any file: OSError, as on a full disk.

    pytest's own capture cannot write either: print and log nothing to a stream inside.
    """

    @contextlib.contextmanager
    def fill() -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return fill


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Gives a TCP port that nothing listens on at this moment; never the same one twice."""
    given: set[int] = set()

    def give() -> int:
        while True:
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                port = int(listener.getsockname()[1])
            if port not in given:
                given.add(port)
                return port

    return give


class NetworkUsedError(RuntimeError):
    """A test tried to reach another machine. No OSError, which libraries would retry and hide."""


def _make_home() -> Path:
    """A new folder with a short path: a Unix socket's name has 107 bytes."""
    return Path(tempfile.mkdtemp(prefix="zk0-", dir="/tmp"))


def _environment(home: Path) -> dict[str, str]:
    return {
        "HOME": str(home),
        "ZK0BOT_HOME": str(home / ".zk0bot"),
        "FLWR_HOME": str(home / "flwr"),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "DO_NOT_TRACK": "1",
        "NO_COLOR": "1",
        "TERM": "dumb",
        "COLUMNS": "100",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        _refuse_remote(arguments[1][0])
    elif event == "socket.getaddrinfo" and arguments[0]:
        _refuse_remote(arguments[0])


def _refuse_remote(host: str | bytes) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if not name.startswith(_LOOPBACK) and name != socket.gethostname():
        raise NetworkUsedError(f"a test may not reach {name}; only loopback is open")
