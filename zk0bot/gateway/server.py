"""The server's hop: forwards what SuperNodes ask of the SuperLink, and nothing else of Flower.

An empty ``pull-messages`` is held here and asked again when the ServerApp says that it has sent
something, so that an order reaches a node at once instead of after Flower's three seconds.
"""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import httpx
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest
from google.protobuf.message import DecodeError
from pydantic import Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from zk0bot.config.paths import orders_flag, reply_flag
from zk0bot.files import Flag, write_json
from zk0bot.gateway.forward import (
    FLEET_OPERATIONS,
    LONG_POLL_S,
    answer_with,
    build_client,
    forward,
    forward_bytes,
    serve,
)
from zk0bot.records import GatewayHealth, NodeProgress, Record
from zk0bot.version import __version__

REASK_S = 2.0
"""An empty pull is asked again this often, and whenever orders are sent."""
FLAG_POLL_S = 0.02
MAX_PROGRESS_BYTES = 4096
MAX_PULL_BYTES = 65536
MAX_PUSH_BYTES = 2**20
"""A reply without its tensors: metadata and the ids of its pieces."""


class ProgressReport(Record):
    """What an egress hop posts while its node works."""

    node_id: str = Field(pattern=r"^[0-9]{1,20}$")
    progress: NodeProgress


class Bell:
    """Wakes the held pulls when the ServerApp raises a flag."""

    def __init__(self, flag: Flag) -> None:
        self._flag = flag
        self._rung = asyncio.Event()
        self.is_closed = False

    def close(self) -> None:
        """End all waits within FLAG_POLL_S: the process is about to end."""
        self.is_closed = True

    async def watch(self) -> None:
        """Notice the flag within FLAG_POLL_S, until cancelled."""
        while True:
            await asyncio.sleep(FLAG_POLL_S)
            if self.is_closed or self._flag.was_raised():
                self._rung.set()
                self._rung = asyncio.Event()

    async def wait(self, timeout_s: float) -> None:
        """Return when the flag is raised, or after ``timeout_s``."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._rung.wait(), timeout_s)


class Gateway:
    """Handlers over one upstream client; remembers which nodes have asked for messages."""

    def __init__(self, client: httpx.AsyncClient, progress_dir: Path, bell: Bell) -> None:
        self._client = client
        self._progress_dir = progress_dir
        self._bell = bell
        self._nodes: set[str] = set()

    async def fleet(self, request: Request) -> Response:
        """Forward one fleet operation; 404 for anything else."""
        operation = request.path_params["operation"]
        if operation not in FLEET_OPERATIONS:
            return Response(status_code=404)
        if operation == "pull-messages":
            return await self._pull(request)
        if operation == "push-messages":
            return await self._push(request)
        return await forward(self._client, request)

    async def health(self, request: Request) -> Response:
        """Versions, and whether the SuperLink behind answers."""
        try:
            superlink_ok = (await self._client.get("/health", timeout=3.0)).status_code == 200
        except httpx.TransportError:
            superlink_ok = False
        health = GatewayHealth(
            zk0bot_version=__version__, flwr_version=version("flwr"), superlink_ok=superlink_ok
        )
        return JSONResponse(health.model_dump())

    async def progress(self, request: Request) -> Response:
        """Keep a node's newest progress; only of nodes that have asked for messages."""
        body = await _read_at_most(request, MAX_PROGRESS_BYTES)
        if body is None:
            return Response(status_code=413)
        try:
            report = ProgressReport.model_validate_json(body)
        except ValidationError:
            return Response(status_code=400)
        if report.node_id not in self._nodes:
            return Response(status_code=404)
        write_json(self._progress_dir / f"{report.node_id}.json", report.progress)
        return Response(status_code=204)

    async def _push(self, request: Request) -> Response:
        """Forward a reply's head, and tell the ServerApp whose it is: the tensors follow."""
        body = await _read_at_most(request, MAX_PUSH_BYTES)
        if body is None:
            return Response(status_code=413)
        try:
            answer = await forward_bytes(self._client, request, body)
        except httpx.TransportError:
            return Response(status_code=502)
        if answer.status_code == 200:
            node_id = str(PushMessagesRequest.FromString(body).node.node_id)
            Flag(reply_flag(self._progress_dir, node_id)).raise_()
        return answer_with(answer)

    async def _pull(self, request: Request) -> Response:
        body = await _read_at_most(request, MAX_PULL_BYTES)
        if body is None:
            return Response(status_code=413)
        deadline = time.monotonic() + LONG_POLL_S
        try:
            answer = await forward_bytes(self._client, request, body)
            if answer.status_code == 200:
                self._nodes.add(str(PullMessagesRequest.FromString(body).node.node_id))
            while _is_empty(answer) and time.monotonic() < deadline and not self._bell.is_closed:
                if await request.is_disconnected():
                    break
                await self._bell.wait(min(REASK_S, deadline - time.monotonic()))
                answer = await forward_bytes(self._client, request, body)
        except httpx.TransportError:
            return Response(status_code=502)
        return answer_with(answer)


def build_app(superlink: str, progress_dir: Path) -> Starlette:
    """The gateway in front of the SuperLink at ``superlink`` (HOST:PORT).

    ``app.state.bell.close()`` answers held pulls, empty, before the process ends.
    """
    client = build_client(f"http://{superlink}")
    bell = Bell(Flag(orders_flag(progress_dir)))
    gateway = Gateway(client, progress_dir, bell)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        watcher = asyncio.create_task(bell.watch())
        yield
        watcher.cancel()
        await client.aclose()

    routes = [
        Route("/v1/fleet/{operation}", gateway.fleet, methods=["POST"]),
        Route("/v1/zk0/health", gateway.health, methods=["GET"]),
        Route("/v1/zk0/progress", gateway.progress, methods=["POST"]),
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.bell = bell
    return app


def _is_empty(answer: httpx.Response) -> bool:
    if answer.status_code != 200:
        return False
    try:
        return not PullMessagesResponse.FromString(answer.content).messages_list
    except DecodeError:
        return False


async def _read_at_most(request: Request, limit: int) -> bytes | None:
    """The body, or None when it is longer than ``limit`` bytes."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            return None
    return bytes(body)


def main() -> None:
    """Run the gateway until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--superlink", required=True, help="HOST:PORT of the SuperLink")
    parser.add_argument("--progress-dir", type=Path, required=True)
    args = parser.parse_args()
    args.progress_dir.mkdir(parents=True, exist_ok=True)
    app = build_app(args.superlink, args.progress_dir)
    serve(app, host=args.host, port=args.port, on_exit=app.state.bell.close)


if __name__ == "__main__":
    main()
