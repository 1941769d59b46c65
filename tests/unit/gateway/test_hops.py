"""Both hops against a SuperLink in memory."""

import json
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import anyio
import httpx
import pytest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    PullMessagesRequest,
    PullMessagesResponse,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.node_pb2 import Node
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from zk0bot.config.paths import link_state, node_progress, orders_flag
from zk0bot.files import read_json, read_record, write_json
from zk0bot.gateway import egress, server
from zk0bot.records import LinkState, NodeProgress
from zk0bot.version import __version__


class SuperLink:
    """Counts what reaches it; has a message for a node after ``empty_pulls`` pulls."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.bodies: list[bytes] = []
        self.empty_pulls = 0
        self.status = 200

    def app(self) -> Starlette:
        everything = Route("/{path:path}", self.answer, methods=["GET", "POST", "PUT", "DELETE"])
        return Starlette(routes=[everything])

    async def answer(self, request: Request) -> Response:
        self.paths.append(request.url.path)
        self.bodies.append(await request.body())
        if self.status != 200 and request.url.path.startswith("/v1/fleet/"):
            return Response(b"no", status_code=self.status)
        if request.url.path.endswith("pull-messages"):
            self.empty_pulls -= 1
            messages = [] if self.empty_pulls >= 0 else [ProtoMessage()]
            return Response(PullMessagesResponse(messages_list=messages).SerializeToString())
        if request.url.path.endswith("activate-node"):
            return Response(ActivateNodeResponse(node_id=77).SerializeToString())
        if request.url.path == "/v1/zk0/health":
            health = {"zk0bot_version": __version__, "flwr_version": version("flwr")}
            return Response(json.dumps({**health, "superlink_ok": True}))
        return Response(b"answer", headers={"x-flower": "kept"})


@pytest.fixture
def superlink() -> SuperLink:
    return SuperLink()


@pytest.fixture
def gateway(
    superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TestClient]:
    monkeypatch.setattr(server, "build_client", lambda url: _in_memory(superlink, url))
    with TestClient(server.build_app("superlink:1", tmp_path)) as client:
        yield client


@pytest.fixture
def hop(
    superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TestClient]:
    monkeypatch.setattr(egress, "build_client", lambda url: _in_memory(superlink, url))
    monkeypatch.setattr(egress, "TICK_S", 0.01)
    with TestClient(egress.build_app("server:9092", tmp_path)) as client:
        yield client


def _in_memory(superlink: SuperLink, url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(superlink.app()), base_url=url)


PULL = PullMessagesRequest(node=Node(node_id=77)).SerializeToString()


def test_fleet_calls_reach_the_superlink_with_body_and_headers(
    gateway: TestClient, superlink: SuperLink
) -> None:
    answer = gateway.post("/v1/fleet/get-run", content=b"body", headers={"x-signature": "s"})
    assert (answer.status_code, answer.content) == (200, b"answer")
    assert answer.headers["x-flower"] == "kept"
    assert (superlink.paths, superlink.bodies) == (["/v1/fleet/get-run"], [b"body"])


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/push-messages",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e%2fcontrol%2fstart-run",
        "/v1/fleet/start-run",
        "/v1/fleet/pull-messages/extra",
        "//v1/control/list-runs",
        "/docs",
        "/openapi.json",
        "/health",
    ],
)
def test_nothing_else_passes_either_hop(
    gateway: TestClient, hop: TestClient, superlink: SuperLink, path: str
) -> None:
    superlink.paths.clear()
    for client in (gateway, hop):
        for method in ("GET", "POST", "PUT", "DELETE"):
            assert client.request(method, path).status_code in (404, 405)
    assert [p for p in superlink.paths if p != "/v1/zk0/health"] == []


def test_an_empty_pull_is_held_until_there_is_a_message(
    gateway: TestClient, superlink: SuperLink
) -> None:
    superlink.empty_pulls = 1
    started = time.monotonic()
    answer = gateway.post("/v1/fleet/pull-messages", content=PULL)
    assert len(PullMessagesResponse.FromString(answer.content).messages_list) == 1
    assert len(superlink.paths) == 2
    assert time.monotonic() - started >= server.REASK_S


def test_a_touch_of_the_orders_flag_ends_the_wait_at_once(
    gateway: TestClient, superlink: SuperLink, tmp_path: Path
) -> None:
    superlink.empty_pulls = 1
    threading.Timer(0.2, orders_flag(tmp_path).touch).start()
    started = time.monotonic()
    gateway.post("/v1/fleet/pull-messages", content=PULL)
    assert time.monotonic() - started < server.REASK_S


def test_an_empty_pull_ends_at_the_deadline(
    gateway: TestClient, superlink: SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LONG_POLL_S", 0.3)
    superlink.empty_pulls = 1000
    answer = gateway.post("/v1/fleet/pull-messages", content=PULL)
    assert (answer.status_code, answer.content) == (200, b"")


def test_a_gateway_that_ends_answers_held_pulls_empty(
    gateway: TestClient, superlink: SuperLink
) -> None:
    superlink.empty_pulls = 1000
    threading.Timer(0.3, gateway.app.state.bell.close).start()
    started = time.monotonic()
    answer = gateway.post("/v1/fleet/pull-messages", content=PULL)
    assert (answer.status_code, answer.content) == (200, b"")
    assert time.monotonic() - started < server.REASK_S


@pytest.mark.parametrize(("status", "passed_on"), [(500, 502), (503, 502), (404, 404), (200, 200)])
@pytest.mark.parametrize("operation", ["pull-messages", "get-run"])
def test_a_server_error_reaches_the_supernode_as_one_it_retries(
    hop: TestClient, superlink: SuperLink, operation: str, status: int, passed_on: int
) -> None:
    superlink.status = status
    answer = hop.post(f"/v1/fleet/{operation}", content=PULL)
    assert answer.status_code == passed_on


def test_a_restarted_hop_learns_its_node_from_a_pull(hop: TestClient, tmp_path: Path) -> None:
    hop.post("/v1/fleet/pull-messages", content=PULL)
    deadline = time.monotonic() + 5
    while read_record(link_state(tmp_path), LinkState).node_id != "77":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_progress_is_kept_for_nodes_that_have_pulled_only(
    gateway: TestClient, tmp_path: Path
) -> None:
    report = {"node_id": "77", "progress": {"round": 2, "phase": "training", "step": 3}}
    assert gateway.post("/v1/zk0/progress", json=report).status_code == 404
    gateway.post("/v1/fleet/pull-messages", content=PULL)
    assert gateway.post("/v1/zk0/progress", json=report).status_code == 204
    assert read_json(tmp_path / "77.json")["step"] == 3


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{}", 400),
        (b"not json", 400),
        (json.dumps({"node_id": "../../etc/x", "progress": {}}).encode(), 400),
        (json.dumps({"node_id": "77", "progress": {"path": "/home/me"}}).encode(), 400),
        (b"x" * 5000, 413),
    ],
)
def test_progress_is_numbers_of_a_node_and_nothing_else(
    gateway: TestClient, tmp_path: Path, body: bytes, status: int
) -> None:
    gateway.post("/v1/fleet/pull-messages", content=PULL)
    assert gateway.post("/v1/zk0/progress", content=body).status_code == status
    assert list(tmp_path.iterdir()) == []


def test_health_says_versions_and_whether_the_superlink_answers(gateway: TestClient) -> None:
    health = gateway.get("/v1/zk0/health").json()
    assert health["superlink_ok"] is True
    assert health["zk0bot_version"] == __version__


def test_the_owner_sees_the_link_and_the_server_the_progress(
    hop: TestClient, superlink: SuperLink, tmp_path: Path
) -> None:
    hop.post("/v1/fleet/activate-node", content=ActivateNodeRequest().SerializeToString())
    write_json(node_progress(tmp_path), NodeProgress(round=1, phase="training", step=5, steps=20))
    hop.portal.call(_wait_for, superlink, "/v1/zk0/progress")
    posted = json.loads(superlink.bodies[superlink.paths.index("/v1/zk0/progress")])
    assert posted["node_id"] == "77" and posted["progress"]["step"] == 5
    link = read_record(link_state(tmp_path), LinkState)
    assert (link.node_id, link.error) == ("77", "")


async def _wait_for(superlink: SuperLink, path: str) -> None:
    with anyio.fail_after(5):
        while path not in superlink.paths:
            await anyio.sleep(0.02)
