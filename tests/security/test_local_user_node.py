"""Another account of a robot owner's machine: files, sockets, the node's ports, /proc, tmux."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from node_attack import HERE, OURS, Federation, read_argv, wait_until

from zk0bot.config.paths import Paths, trainer_socket
from zk0bot.ops.host import socket_path

pytest_plugins = ["node_fixture"]
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.getuid() != 0, reason="takes root to become another account"),
]
NOBODY = 65534
FILES = (
    "identity/node.key", "identity/membership.json", "loopback/secret", "loopback/server.key",
    "client.json", "secrets.json", "ledger.jsonl", "link.json", "session.json", "trainer.json",
    "logs/trainer.log", "logs/egress.log", "audit/audit.jsonl", "audit/signing.key",
)  # fmt: skip
RUNTIME = (
    "acquire-task", "pull-task-input", "pull-messages", "push-messages", "pull-object",
    "push-object", "push-task-output", "create-task", "get-nodes",
)  # fmt: skip
FLEET = ("pull-messages", "push-messages", "get-run", "activate-node", "deactivate-node", "x")

SCRIPT = """
import http.client, json, os, socket, ssl, sys
told = {}

def attempt(name, work):
    try:
        told[name] = work()
    except OSError as error:
        told[name] = type(error).__name__

def connect(path):
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
    return "connected"

def post(port, path, tls, **headers):
    context = ssl._create_unverified_context() if tls else None
    link = (http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=20) if tls
            else http.client.HTTPConnection("127.0.0.1", port, timeout=20))
    headers["content-type"] = "application/protobuf"
    link.request("POST", path, b"\\x08\\x01", headers)
    return link.getresponse().status

plan = json.load(sys.stdin)
for path in plan["files"]:
    attempt("read " + path, lambda: open(path).read() and "read")
    attempt("write " + path, lambda: open(path, "a") and "written")
for path in plan["folders"]:
    attempt("list " + path, lambda: len(os.listdir(path)))
    attempt("plant " + path, lambda: os.symlink("/etc/passwd", path + "/planted"))
for path in plan["sockets"]:
    attempt("socket " + path, lambda: connect(path))
for pid in plan["pids"]:
    attempt(f"environ {pid}", lambda: len(open(f"/proc/{pid}/environ", "rb").read()))
    attempt(f"memory {pid}", lambda: open(f"/proc/{pid}/mem", "rb") and "opened")
    attempt(f"kill {pid}", lambda: os.kill(pid, 0))
for port, path, tls, headers in plan["calls"]:
    attempt(f"call {port} {path} {sorted(headers)}", lambda: post(port, path, tls, **headers))
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(federation: Federation) -> Iterator[dict[str, Any]]:
    """What an account without any rights achieves, by attempt."""
    home, node = federation.owner.home, federation.node_dir
    before = stat.S_IMODE(home.stat().st_mode)
    home.chmod(0o755)  # as homes are on many machines
    egress_port, runtime_port = json.loads((node / "session.json").read_text())["ports"]
    tmux = socket_path(Paths(federation.owner.root).tmux_socket, {})
    names = ("egress", "supernode", "trainer", "clientapp")
    signed = {"flwr-public-key": "x", "flwr-signature": "x", "flwr-timestamp": "x"}
    tokens = {"flwr-task-token": "x" * 64}
    calls = [
        *((egress_port, f"/v1/fleet/{name}", True, {}) for name in FLEET),
        (egress_port, "/v1/fleet/pull-messages", True, signed),
        *((runtime_port, f"/v1/runtime/{name}", False, {}) for name in RUNTIME),
        *((runtime_port, f"/v1/runtime/{name}", False, tokens) for name in RUNTIME),
    ]
    plan = {
        "files": [str(node / name) for name in FILES],
        "folders": [str(p) for p in (node, node / "flwr", node / "outbox", federation.owner.root)],
        "sockets": [str(trainer_socket(node)), str(tmux)],
        "pids": [federation.pid(name) for name in names],
        "calls": calls,
    }
    done = subprocess.run(
        ["/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable, "-c", SCRIPT],
        input=json.dumps(plan), capture_output=True, text=True, check=False, cwd="/",
        user=NOBODY, group=NOBODY, extra_groups=[],
    )  # fmt: skip
    home.chmod(before)
    assert done.returncode == 0, done.stderr
    yield json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["read", "write", "list", "plant", "socket", "environ", "memory"])
def test_files_sockets_and_memory_are_closed(told: dict[str, Any], kind: str) -> None:
    found = {name: result for name, result in told.items() if name.startswith(f"{kind} ")}
    assert found
    assert set(found.values()) <= {"PermissionError"}, found


def test_no_process_can_be_ended(told: dict[str, Any]) -> None:
    found = [result for name, result in told.items() if name.startswith("kill ")]
    assert found == ["PermissionError"] * 4


def test_the_ports_serve_nobody_else(told: dict[str, Any]) -> None:
    calls = {name: result for name, result in told.items() if name.startswith("call ")}
    assert len(calls) == len(FLEET) + 1 + 2 * len(RUNTIME)
    for name, status in calls.items():
        assert status in (401, 403, 404), (name, status)


def test_the_owner_is_told_who_asked(told: dict[str, Any], federation: Federation) -> None:
    def is_noted() -> bool:
        return any(event.actor == HERE for event in federation.events("request-refused"))

    wait_until(is_noted, "a line in the audit log")


def test_no_folder_of_the_node_is_open(federation: Federation) -> None:
    for path in [federation.owner.root, *federation.node_dir.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            inside_install = "flwr" in path.relative_to(federation.owner.root).parts
            assert inside_install or path.stat().st_mode & 0o077 == 0, (
                path,
                oct(path.stat().st_mode),
            )


def test_command_lines_hold_no_secret_and_no_data(federation: Federation) -> None:
    for name in ("egress", "supernode", "trainer", "clientapp", "supervisor"):
        assert federation.canaries.find(read_argv(federation.pid(name)).encode()) == []


def test_the_node_is_unharmed(told: dict[str, Any], federation: Federation) -> None:
    status = federation.status()
    assert status["connected"] and status["client"] == OURS, status
    assert all(service["state"] == "running" for service in status["services"]), status
