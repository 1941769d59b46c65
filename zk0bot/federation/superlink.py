"""Flower's SuperLink behind a secret; same flags as ``flower-superlink``, and ``--secret-file``.

Open-source Flower knows no user accounts: whoever reaches its port may start runs. On loopback that
is every account of the machine. Here all but the Runtime API (which has secrets of its own) and
``/health`` is closed to requests without the loopback secret.
"""

import argparse
import hmac
import importlib
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import uvicorn
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zk0bot.config.paths import audit_dir
from zk0bot.federation.allocator import keep_little
from zk0bot.federation.http_layers import skip_idle_layers, with_whole_bodies
from zk0bot.federation.superlink_database import adjust_database, set_aside_ruined
from zk0bot.gateway.server.refusals import RefusalDesk
from zk0bot.gateway.server.registrar import SECRET_HEADER
from zk0bot.trust.audit import AuditLog, RefusalLog

logger = logging.getLogger(__name__)

PROGRAM = importlib.import_module("flwr.superlink.cli.flower_superlink")
"""The package exports a function of this name, which hides the module from ``import``."""
OPEN_PREFIX = "/v1/runtime/"
HEALTH = "/health"
KEEP_ALIVE_S = 75
"""Longer than the gateway keeps an idle connection, which must not be closed as it is used."""
GRACE_S = 2
"""Open connections are cut this long after SIGTERM."""
LOG_EVERY_S = 1.0
WITHOUT_SECRET = "SuperLink without the secret"
WITHOUT_TOKEN = "Runtime API without its secret"

OnRefused = Callable[[str, str], None]
"""Gets a peer's address and the reason."""


class SecretGate:
    """Answers 404 to whoever does not know the secret; ASGI."""

    def __init__(self, app: ASGIApp, secret: str, on_refused: OnRefused) -> None:
        self._app = app
        self._secret = secret.encode("ascii")
        self._on_refused = on_refused
        self._logged_at = -LOG_EVERY_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if self._may_pass(scope):
            await self._app(scope, receive, self._watch(scope, send))
            return
        self._on_refused(_peer_of(scope), WITHOUT_SECRET)
        self._log(scope)
        await Response(status_code=404, headers={"connection": "close"})(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if scope["type"] != "http":
            return False
        path = scope["path"]
        if path == HEALTH or (path.startswith(OPEN_PREFIX) and ".." not in path):
            return True
        given = Headers(scope=scope).getlist(SECRET_HEADER)
        return len(given) == 1 and hmac.compare_digest(given[0].encode("latin-1"), self._secret)

    def _watch(self, scope: Scope, send: Send) -> Send:
        """Notes what Flower itself refuses of the Runtime API."""
        if not scope["path"].startswith(OPEN_PREFIX):
            return send

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (401, 403):
                self._on_refused(_peer_of(scope), WITHOUT_TOKEN)
            await send(message)

        return watched

    def _log(self, scope: Scope) -> None:
        """At most one line a second: who is refused must not fill the disk."""
        if time.monotonic() - self._logged_at >= LOG_EVERY_S:
            self._logged_at = time.monotonic()
            logger.warning("refused without the secret: %.100r", scope.get("path", ""))


def _peer_of(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def guard_superlink(secret: str, on_refused: OnRefused) -> None:
    """Put the gate before the application that Flower runs (flwr.superlink.cli, 1.41.0)."""
    module = vars(PROGRAM)
    assert module["uvicorn"] is uvicorn

    def run(app: ASGIApp, **settings: object) -> None:
        settings |= {
            "access_log": False,
            "timeout_keep_alive": KEEP_ALIVE_S,
            "timeout_graceful_shutdown": GRACE_S,
        }
        gate = SecretGate(with_whole_bodies(app), secret, on_refused)
        uvicorn.run(gate, **settings)  # type: ignore[arg-type]

    module["uvicorn"] = SimpleNamespace(run=run)


def main() -> None:
    """Run the SuperLink until SIGTERM; the secret lies in the server's ``loopback`` folder."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=False, allow_abbrev=False)
    parser.add_argument("--secret-file", type=Path, required=True)
    parser.add_argument("--database", type=Path, required=True)
    ours, flowers = parser.parse_known_args()
    desk = RefusalDesk(RefusalLog(AuditLog(audit_dir(ours.secret_file.parent.parent))))
    secret = ours.secret_file.read_text().strip()
    set_aside_ruined(ours.database)
    adjust_database()
    keep_little()
    skip_idle_layers()
    guard_superlink(secret, lambda peer, reason: desk.take(0, peer, reason))
    sys.argv[1:] = [*flowers, "--database", str(ours.database)]
    try:
        PROGRAM.flower_superlink()
    finally:
        desk.close()


if __name__ == "__main__":
    main()
