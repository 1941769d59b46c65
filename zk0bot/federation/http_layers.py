"""Fewer layers between a request and Flower's handlers; flwr.superlink.main of 1.41.0.

Flower's SuperLink wraps every request into nine of Starlette's ``BaseHTTPMiddleware``, most of
which look at the path and do nothing, and each of them starts a task group for every 64 KiB of the
body. What that costs: ``scripts/bench/superlink_requests.py``.
"""

from flwr.superlink.routers.control import middlewares as control
from flwr.superlink.routers.fleet.middlewares import FleetEventLogMiddleware
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTROL_PREFIX = "/v1/control/"
FLEET_PREFIX = "/v1/fleet/"
LAYERS: dict[type[BaseHTTPMiddleware], str] = {
    control.ControlSensitiveResponseMiddleware: CONTROL_PREFIX,
    control.ControlAuthenticationMiddleware: CONTROL_PREFIX,
    control.ControlLicenseMiddleware: CONTROL_PREFIX,
    control.ControlEventLogMiddleware: CONTROL_PREFIX,
    NodeAuthMiddleware: FLEET_PREFIX,
    FleetEventLogMiddleware: FLEET_PREFIX,
}
"""The only paths that a layer does anything with."""


def skip_idle_layers() -> None:
    """Requests go past the layers that have nothing to do with their path."""
    for layer, prefix in LAYERS.items():
        _narrow(layer, prefix)


def with_whole_bodies(app: ASGIApp) -> ASGIApp:
    """``app``, that gets each body in one piece; Flower's handlers ask for all of it anyway."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, _read_whole(receive), send)

    return call


def _read_whole(receive: Receive) -> Receive:
    is_read = False

    async def whole() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        pieces: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message
            pieces.append(message.get("body", b""))
            if not message.get("more_body", False):
                return {**message, "body": b"".join(pieces), "more_body": False}

    return whole


def _narrow(layer: type[BaseHTTPMiddleware], prefix: str) -> None:
    through = layer.__call__

    async def call(self: BaseHTTPMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        concerns = scope["type"] != "http" or scope["path"].startswith(prefix)
        await (through(self, scope, receive, send) if concerns else self.app(scope, receive, send))

    layer.__call__ = call  # type: ignore[method-assign]
