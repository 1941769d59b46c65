"""A small real server that enrols nodes over TLS, with the registry and certificates of zk0bot."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from zk0bot.errors import TrustError
from zk0bot.trust import certificates
from zk0bot.trust.join_code import JoinCode
from zk0bot.trust.keys import fingerprint, verify_headers
from zk0bot.trust.registry import EnrolRequest, Registry


@dataclass(kw_only=True)
class JoinServer:
    """What answers at ``address``; ``clock`` and ``lose_answers`` may be changed while it runs."""

    address: str
    tls_dir: Path
    registry: Registry
    clock: timedelta = timedelta()
    lose_answers: int = 0
    """Answers to enrolments that are to be lost: the next so many are a 502."""
    bodies: list[bytes] = field(default_factory=list)
    """Of the enrolments that came."""

    def invite_code(self, *, name: str = "", uses: int = 1, expires_s: float = 600.0) -> JoinCode:
        """A code of this server."""
        invite, secret = self.registry.invite(name, uses, expires_s)
        return JoinCode(
            server=self.address,
            trust="pinned",
            ca_fingerprint=certificates.ca_fingerprint(self.authority),
            invite_id=invite.invite_id,
            secret=secret,
        )

    @property
    def authority(self) -> bytes:
        return (self.tls_dir / "ca.crt").read_bytes()

    def build_app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/zk0/ca", self._authority),
                Route("/v1/zk0/enrol", self._enrol, methods=["POST"]),
                Route("/v1/zk0/leave", self._leave, methods=["POST"]),
            ]
        )

    async def _authority(self, request: Request) -> Response:
        return Response(self.authority, media_type="application/x-pem-file")

    async def _enrol(self, request: Request) -> Response:
        body = await request.body()
        self.bodies.append(body)
        enrolment = EnrolRequest.model_validate_json(body)
        try:
            if enrolment.invite_id:
                node = self.registry.enrol(enrolment, datetime.now(UTC) + self.clock)
            else:
                key = enrolment.public_key.encode()
                node = self.registry.enrol_local(enrolment.name, key)
        except TrustError as error:
            return JSONResponse({"error": error.to_dict()}, status_code=403)
        if self.lose_answers:
            self.lose_answers -= 1
            return Response(status_code=502)
        return JSONResponse({"node": node.name, "fingerprint": node.fingerprint})

    async def _leave(self, request: Request) -> Response:
        public_pem = verify_headers(request.headers, datetime.now(UTC))
        if self.registry.find_active(public_pem) is None:
            error = {"code": "node_unknown", "message": "no such node"}
            return JSONResponse({"error": error}, status_code=401)
        self.registry.leave(fingerprint(public_pem))
        return Response(status_code=204)


@contextmanager
def serving(server: JoinServer, *, with_tls: bool = True) -> Iterator[JoinServer]:
    """``server`` answers at its address until the end of the block."""
    config = uvicorn.Config(
        server.build_app(),
        host="127.0.0.1",
        port=int(server.address.rpartition(":")[2]),
        log_level="error",
        ws="none",
        ssl_certfile=server.tls_dir / "server.key" if with_tls else None,
        timeout_graceful_shutdown=1,
    )
    uvicorn_server = uvicorn.Server(config)
    thread = threading.Thread(target=uvicorn_server.run)
    thread.start()
    while not uvicorn_server.started and thread.is_alive():
        time.sleep(0.005)
    try:
        yield server
    finally:
        uvicorn_server.should_exit = True
        thread.join()


def make_server(folder: Path, port: int) -> JoinServer:
    """One with a CA, certificate and registry of its own; not answering yet."""
    tls_dir = folder / "tls"
    certificates.ensure_authority(tls_dir)
    certificates.ensure_certificate(tls_dir, ())
    return JoinServer(
        address=f"127.0.0.1:{port}", tls_dir=tls_dir, registry=Registry(folder / "enrolment")
    )
