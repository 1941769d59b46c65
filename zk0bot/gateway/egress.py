"""A node's hop: everything its SuperNode says to the server passes here, on loopback.

Beside forwarding it tells the server how far training is (numbers only) and keeps ``link.json``
for the owner: whether the server answers, this node's id, bytes each way.
"""

import argparse
import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path

import httpx
from flwr.proto.fleet_pb2 import ActivateNodeResponse, PullMessagesRequest
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from zk0bot.config.paths import link_state, node_progress, order_flag
from zk0bot.errors import DataError
from zk0bot.files import Flag, read_record, write_json
from zk0bot.gateway.forward import (
    FLEET_OPERATIONS,
    answer_with,
    build_client,
    forward,
    forward_bytes,
    serve,
)
from zk0bot.records import GatewayHealth, LinkState, NodeProgress, now
from zk0bot.version import __version__

logger = logging.getLogger(__name__)

TICK_S = 0.5
GREET_S = 10.0


class Egress:
    """Handlers over one upstream client, and the state of the link."""

    def __init__(self, client: httpx.AsyncClient, client_dir: Path, upstream: str) -> None:
        self._client = client
        self._client_dir = client_dir
        self._link = LinkState(upstream=upstream)
        self._written: LinkState | None = None
        self._reported: NodeProgress | None = None
        self._greeted_at = -GREET_S
        self._order_flag = Flag(order_flag(client_dir))

    async def fleet(self, request: Request) -> Response:
        """Forward one fleet operation; 404 for anything else."""
        operation = request.path_params["operation"]
        if operation not in FLEET_OPERATIONS:
            return Response(status_code=404)
        self._note(bytes_up=self._link.bytes_up + _length(request.headers))
        if operation == "activate-node":
            return await self._activate(request)
        if operation == "pull-messages":
            return await self._pull(request)
        answer = await forward(self._client, request)
        self._note_answer(answer.status_code, _length(answer.headers))
        return answer

    async def keep_state(self) -> None:
        """Write ``link.json`` and report progress, until cancelled."""
        while True:
            await self._greet()
            await self._report_progress()
            self._save_link()
            await asyncio.sleep(TICK_S)

    def _save_link(self) -> None:
        if self._link == self._written:
            return
        try:
            write_json(link_state(self._client_dir), self._link)
        except OSError as error:  # a full disk must not cut the node off
            logger.warning("link state not written: %s", error)
        self._written = self._link

    async def _activate(self, request: Request) -> Response:
        try:
            answer = await forward_bytes(self._client, request, await request.body())
        except httpx.TransportError as error:
            self._note(error=f"server not reached: {error or type(error).__name__}")
            return Response(status_code=502)
        if answer.status_code == 200:
            node_id = str(ActivateNodeResponse.FromString(answer.content).node_id)
            self._note(node_id=node_id, last_answer_at=now(), error="")
        return answer_with(answer)

    async def _pull(self, request: Request) -> Response:
        """Ask for orders; an answer shows that the server knows this node."""
        body = await request.body()
        try:
            answer = await forward_bytes(self._client, request, body)
        except httpx.TransportError as error:
            self._note(error=f"server not reached: {error or type(error).__name__}", node_id="")
            return Response(status_code=502)
        if answer.status_code == 200:
            node_id = str(PullMessagesRequest.FromString(body).node.node_id)
            self._note(node_id=node_id, last_answer_at=now(), error="")
            if answer.content:
                self._order_flag.raise_()
        else:
            self._note(error=f"the server answered {answer.status_code}", node_id="")
        return answer_with(answer)

    async def _greet(self) -> None:
        """Every ten seconds, check that the server is there and runs the same versions."""
        if time.monotonic() - self._greeted_at < GREET_S:
            return
        self._greeted_at = time.monotonic()
        try:
            answer = await self._client.get("/v1/zk0/health", timeout=5.0)
            health = GatewayHealth.model_validate_json(answer.content)
        except httpx.TransportError as error:
            self._note(error=f"server not reached: {error or type(error).__name__}")
        except ValidationError:
            self._note(error="what answers there is no zk0bot server of this version")
        else:
            self._note(error=_version_difference(health), last_answer_at=now())

    async def _report_progress(self) -> None:
        if not self._link.node_id:
            return
        try:
            progress = read_record(node_progress(self._client_dir), NodeProgress)
        except (FileNotFoundError, DataError):
            return
        if progress == self._reported:
            return
        report = {"node_id": self._link.node_id, "progress": progress.model_dump()}
        try:
            await self._client.post("/v1/zk0/progress", json=report, timeout=5.0)
        except httpx.TransportError:
            return  # the next tick tries again; fleet calls tell of the outage
        self._reported = progress

    def _note_answer(self, status: int, length: int) -> None:
        if status == 502:
            self._note(error="server not reached")
        else:
            self._note(last_answer_at=now(), bytes_down=self._link.bytes_down + length)

    def _note(self, **changes: object) -> None:
        self._link = self._link.model_copy(update=changes)


def build_app(upstream: str, client_dir: Path) -> Starlette:
    """The hop to the gateway at ``upstream`` (HOST:PORT)."""
    client = build_client(f"http://{upstream}")
    egress = Egress(client, client_dir, upstream)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        keeper = asyncio.create_task(egress.keep_state())
        yield
        keeper.cancel()
        await client.aclose()

    route = Route("/v1/fleet/{operation}", egress.fleet, methods=["POST"])
    return Starlette(routes=[route], lifespan=lifespan)


def _version_difference(health: GatewayHealth) -> str:
    """Why this node and the server cannot work together; empty when they can."""
    if health.zk0bot_version != __version__:
        return f"the server runs zk0bot {health.zk0bot_version}, this node {__version__}"
    if health.flwr_version != version("flwr"):
        return f"the server runs Flower {health.flwr_version}, this node {version('flwr')}"
    return "" if health.superlink_ok else "the server's SuperLink does not answer"


def _length(headers: Mapping[str, str]) -> int:
    value = headers.get("content-length", "0")
    return int(value) if value.isdigit() else 0


def main() -> None:
    """Run the hop until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="the client's private folder")
    parser.add_argument("--port", type=int, required=True, help="loopback port to listen on")
    parser.add_argument("--upstream", required=True, help="HOST:PORT of the server's gateway")
    args = parser.parse_args()
    serve(build_app(args.upstream, args.dir), host="127.0.0.1", port=args.port)


if __name__ == "__main__":
    main()
