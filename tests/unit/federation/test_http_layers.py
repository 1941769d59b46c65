"""Requests to Flower's own layers, in a process that has not changed them, and then has."""

import subprocess
import sys

import anyio
import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from zk0bot.federation.http_layers import with_whole_bodies

ANSWERS = """
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.superlink import main

entered = []
for layer in main._get_middleware():
    kind = layer.cls
    def note(self, request, call_next, kind=kind, dispatch=kind.dispatch):
        entered.append(kind.__name__)
        return dispatch(self, request, call_next)
    if kind.__name__ != "BaseHTTPMiddleware":
        kind.dispatch = note
{change}

async def answer(request: Request) -> Response:
    return PlainTextResponse(request.url.path)

app = Starlette(
    routes=[Route("/{{path:path}}", answer, methods=["POST"])], middleware=main._get_middleware()
)
with TestClient(app, raise_server_exceptions=False) as client:
    for path, message in (
        ("/v1/fleet/pull-messages", PullMessagesRequest()),
        ("/v1/control/list-runs", ListRunsRequest()),
        ("/v1/runtime/other", ListRunsRequest()),
        ("/health", ListRunsRequest()),
    ):
        entered.clear()
        told = client.post(
            path,
            content=message.SerializeToString(),
            headers={{"content-type": "application/protobuf", "accept": "application/protobuf"}},
        )
        print(path, told.status_code, told.content, *entered, sep="|")
"""
CHANGE = "from zk0bot.federation.http_layers import skip_idle_layers; skip_idle_layers()"


def ask(change: str) -> dict[str, tuple[list[str], set[str]]]:
    """Status and body, and the layers that were entered, by path."""
    told = subprocess.run(
        [sys.executable, "-c", ANSWERS.format(change=change)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = [line.split("|") for line in told.stdout.splitlines()]
    return {path: ([status, body], set(layers)) for path, status, body, *layers in lines}


@pytest.mark.slow
def test_answers_are_flowers_with_fewer_layers() -> None:
    stock, ours = ask(""), ask(CHANGE)
    assert {path: answer for path, (answer, _) in ours.items()} == {
        path: answer for path, (answer, _) in stock.items()
    }
    everywhere = {"ProtobufTranslationMiddleware", "RuntimeTracingMiddleware"}
    fleet = {"NodeAuthMiddleware", "FleetEventLogMiddleware"}
    assert stock["/health"][1] > everywhere | fleet
    assert ours["/health"][1] == ours["/v1/runtime/other"][1] == everywhere
    assert "NodeAuthMiddleware" in ours["/v1/fleet/pull-messages"][1] <= everywhere | fleet
    assert "ControlAuthenticationMiddleware" in ours["/v1/control/list-runs"][1]
    assert not ours["/v1/control/list-runs"][1] & fleet
    assert ours["/v1/fleet/pull-messages"][0][0] == "401", "who signs nothing is not let in"


def deliver(*messages: Message) -> tuple[list[bytes], list[str]]:
    """Pieces of a body that an application gets, and what it hears after the last."""
    pieces: list[bytes] = []
    after: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        while message["type"] == "http.request":
            pieces.append(message["body"])
            if not message["more_body"]:
                break
            message = await receive()
        else:
            after.append(message["type"])
            return
        after.append((await receive())["type"])

    waiting = [*messages, {"type": "http.disconnect"}]

    async def receive() -> Message:
        return waiting.pop(0)

    async def send(message: Message) -> None:
        raise AssertionError

    anyio.run(with_whole_bodies(app), {"type": "http"}, receive, send)
    return pieces, after


def piece(body: bytes, *, more: bool) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_comes_in_one_piece_and_then_what_follows() -> None:
    parts = piece(b"a", more=True), piece(b"", more=True), piece(b"bc", more=False)
    assert deliver(*parts) == ([b"abc"], ["http.disconnect"])
    assert deliver({"type": "http.request"}) == ([b""], ["http.disconnect"])


def test_a_body_that_breaks_off_is_none() -> None:
    assert deliver(piece(b"half", more=True)) == ([], ["http.disconnect"])


def test_flowers_way_to_read_sees_that_it_breaks_off() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(ClientDisconnect):
            await Request(scope, receive).body()

    waiting = [piece(b"half", more=True), {"type": "http.disconnect"}]

    async def receive() -> Message:
        return waiting.pop(0)

    async def send(message: Message) -> None:
        raise AssertionError

    anyio.run(with_whole_bodies(app), {"type": "http", "headers": []}, receive, send)
    assert not waiting
