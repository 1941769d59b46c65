"""One HTTP hop: pass a request on and stream the answer back, holding neither in memory."""

import logging
from collections.abc import AsyncIterator

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

logger = logging.getLogger(__name__)

HOP_BY_HOP = frozenset(
    {"connection", "host", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade"}
)
"""Headers that belong to one connection (RFC 9110 section 7.6.1), plus the host."""
FLEET_OPERATIONS = frozenset(
    {
        "activate-node",
        "confirm-message-received",
        "deactivate-node",
        "get-fab",
        "get-run",
        "pull-messages",
        "pull-object",
        "push-messages",
        "push-object",
        "register-node",
        "send-node-heartbeat",
        "unregister-node",
    }
)
"""Everything that a SuperNode asks of a SuperLink (flwr.supernode.fleet_http_client, 1.41.0)."""
LONG_POLL_S = 10.0
"""How long an empty ``pull-messages`` is held; SuperNodes give up a request after 30 s."""


def passed_on(headers: httpx.Headers | Request) -> list[tuple[str, str]]:
    """The headers that go on to the next hop."""
    items = headers.headers.items() if isinstance(headers, Request) else headers.items()
    return [(name, value) for name, value in items if name.lower() not in HOP_BY_HOP]


async def forward(client: httpx.AsyncClient, request: Request) -> Response:
    """Send ``request`` to the same path upstream and stream the answer; 502 if unreachable."""
    upstream = client.build_request(
        request.method,
        request.url.path,
        headers=passed_on(request),
        content=request.stream(),
    )
    try:
        answer = await client.send(upstream, stream=True)
    except httpx.TransportError as error:
        logger.warning("%s: %s", request.url.path, error or type(error).__name__)
        return Response(status_code=502)
    return StreamingResponse(
        _body(answer), status_code=answer.status_code, headers=dict(passed_on(answer.headers))
    )


async def forward_bytes(client: httpx.AsyncClient, request: Request, body: bytes) -> httpx.Response:
    """Send a small request whose body is at hand and read the whole answer.

    Raises httpx.TransportError when the next hop cannot be reached.
    """
    return await client.request(
        request.method, request.url.path, headers=passed_on(request), content=body
    )


def answer_with(response: httpx.Response) -> Response:
    """The whole upstream answer as our own."""
    return Response(
        response.content,
        status_code=response.status_code,
        media_type=response.headers.get("content-type"),
    )


def build_client(base_url: str) -> httpx.AsyncClient:
    """A pooled client without proxies from the environment: hops are explicit."""
    return httpx.AsyncClient(base_url=base_url, timeout=120.0, trust_env=False)


def serve(app: Starlette, *, host: str, port: int) -> None:
    """Serve until SIGTERM; held requests are cut after a second."""
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
    )


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()
