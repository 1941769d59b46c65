"""The connections of a hop's HTTP client: asyncio alone, read in large pieces.

httpx's own way through anyio reads 16 KiB at a time, one TLS record, and every piece costs half a
millisecond on its way through a hop.
"""

import asyncio
import itertools
import socket
import ssl
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpcore
import httpx

READ_AHEAD = 256 * 1024
"""Bytes that a connection takes in before they are asked for."""
NEXT_ADDRESS_S = 0.25
"""A host's next address is tried beside the first after that: it may be one that leads nowhere."""


class Transport(httpx.AsyncHTTPTransport):
    """httpx's own, over our connections; httpx 0.28.1 has no argument for them."""

    def __init__(self, tls: ssl.SSLContext | None, limits: httpx.Limits) -> None:
        """``tls`` says whom an https hop must be; without it, by the certificates of the system."""
        context = tls or httpx.create_ssl_context(trust_env=False)
        super().__init__(verify=context)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
            network_backend=Backend(),
        )


class Backend(httpcore.AsyncNetworkBackend):
    """Opens TCP connections."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises httpcore.ConnectError or ConnectTimeout."""
        with _translating(httpcore.ConnectTimeout, httpcore.ConnectError):
            async with asyncio.timeout(timeout):
                link = await _connect(host, port)
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_connection(_Connection, sock=link)
        return connection

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Connection(asyncio.Protocol, httpcore.AsyncNetworkStream):
    """One connection, plain at first; what has come waits here until it is read."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._pieces: list[bytes] = []
        self._size = 0
        self._is_paused = False
        self._is_over = False
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._may_write = asyncio.Event()
        self._may_write.set()

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """All that is there, which may be more than ``max_bytes``; empty at the end."""
        if not self._is_ready():
            self._news.clear()
            with _translating(httpcore.ReadTimeout, httpcore.ReadError):
                async with asyncio.timeout(timeout):
                    await self._news.wait()
        if not self._pieces and self._error is not None:
            raise httpcore.ReadError(str(self._error)) from self._error
        content = b"".join(self._pieces)
        self._pieces, self._size = [], 0
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
        return content

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Return when ``buffer`` is on its way, but for a little."""
        with _translating(httpcore.WriteTimeout, httpcore.WriteError):
            self._transport.write(buffer)
            if not self._may_write.is_set():
                async with asyncio.timeout(timeout):
                    await self._may_write.wait()
            if self._is_over or self._transport.is_closing():
                raise ConnectionResetError("the peer has closed the connection")

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises httpcore.ConnectError when the peer is not the one that it should be."""
        loop = asyncio.get_running_loop()
        try:
            with _translating(httpcore.ConnectTimeout, httpcore.ConnectError):
                async with asyncio.timeout(timeout):
                    secured = await loop.start_tls(
                        self._transport, self, ssl_context, server_hostname=server_hostname
                    )
                if secured is None:
                    raise ConnectionResetError("the peer has closed the connection")
        except BaseException:
            self._transport.abort()
            raise
        self._transport = secured
        return self

    async def aclose(self) -> None:
        self._transport.close()

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":  # on an idle connection: it has been closed, or is out of step
            return self._is_ready() or self._transport.is_closing()
        return self._transport.get_extra_info(info)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._pieces.append(data)
        self._size += len(data)
        self._news.set()
        if self._size >= READ_AHEAD and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def eof_received(self) -> None:
        self._is_over = True
        self._news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_over = True
        self._error = exc
        self._news.set()
        self._may_write.set()

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def _is_ready(self) -> bool:
        return bool(self._pieces) or self._is_over


async def _connect(host: str, port: int) -> socket.socket:
    """A connected socket: the first of the host's addresses that answers. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    tries: set[asyncio.Task[socket.socket]] = set()
    errors: list[BaseException] = []
    try:
        for family, kind, protocol, _, address in _in_turn(found):
            tries.add(asyncio.create_task(_try(socket.socket(family, kind, protocol), address)))
            if link := await _first(tries, errors, NEXT_ADDRESS_S):
                return link
        while tries:
            if link := await _first(tries, errors, None):
                return link
    finally:
        for one in tries:
            one.cancel()
    raise errors[0]


def _in_turn(found: Sequence[Any]) -> list[Any]:
    """The resolver's answers with the families of addresses taking turns."""
    families: dict[int, list[Any]] = {}
    for one in found:
        families.setdefault(one[0], []).append(one)
    turns = itertools.zip_longest(*families.values())
    return [one for turn in turns for one in turn if one is not None]


async def _try(link: socket.socket, address: Any) -> socket.socket:
    link.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(link, address)
    except BaseException:
        link.close()
        raise
    return link


async def _first(
    tries: set[asyncio.Task[socket.socket]], errors: list[BaseException], timeout: float | None
) -> socket.socket | None:
    """One that has connected by then; what has ended goes out of ``tries``."""
    done, _ = await asyncio.wait(tries, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    tries -= done
    errors += [error for one in done if (error := one.exception())]
    links = [one.result() for one in done if not one.exception()]
    for spare in links[1:]:
        spare.close()
    return links[0] if links else None


@contextmanager
def _translating(on_timeout: type[Exception], on_error: type[Exception]) -> Iterator[None]:
    """Raise httpcore's exceptions for those of asyncio; ssl.SSLError is an OSError."""
    try:
        yield
    except TimeoutError as error:
        raise on_timeout(str(error)) from error
    except OSError as error:
        raise on_error(str(error)) from error
