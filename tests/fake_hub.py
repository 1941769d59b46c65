"""A model and dataset hub on loopback: folders served as repositories, to those with the token."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(kw_only=True)
class Hub:
    """What it has, and what was asked of it."""

    repositories: Mapping[str, Path]
    """Folder by ``datasets/owner/name`` or ``models/owner/name``."""
    token: str = ""
    """Asked for when not empty."""
    asked: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """``hub`` at its ``url`` for as long as the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _answer(self, hub)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _answer(request: BaseHTTPRequestHandler, hub: Hub) -> None:
    path = unquote(urlsplit(request.path).path).strip("/")
    hub.asked.append(path)
    if hub.token and request.headers.get("Authorization") != f"Bearer {hub.token}":
        _send(request, 401, b"{}")
        return
    status, body = _find(path, hub)
    _send(request, status, body)


def _find(path: str, hub: Hub) -> tuple[int, bytes]:
    words = path.split("/")
    if words[0] == "api":
        return _describe(hub.repositories.get("/".join(words[1:4])), words[4:])
    kind, rest = ("datasets", words[1:]) if words[0] == "datasets" else ("models", words)
    folder = hub.repositories.get(f"{kind}/{rest[0]}/{rest[1]}")
    file = folder / "/".join(rest[4:]) if folder else None
    return (200, file.read_bytes()) if file and file.is_file() else (404, b"{}")


def _describe(folder: Path | None, words: list[str]) -> tuple[int, bytes]:
    if folder is None:
        return 404, b"{}"
    if words and words[0] == "tree":
        entries = [
            {
                "type": "file",
                "path": str(path.relative_to(folder)),
                "size": path.stat().st_size,
                "oid": "0" * 40,
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        return 200, json.dumps(entries).encode()
    return 200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode()


def _send(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(len(body)))
    request.send_header("ETag", f'"{abs(hash(request.path)):040x}"')
    request.send_header("X-Repo-Commit", COMMIT)
    if status == 401:
        request.send_header("X-Error-Code", "GatedRepo")
    elif status == 404:
        request.send_header("X-Error-Code", "RepoNotFound")
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
