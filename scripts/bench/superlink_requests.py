"""Processor time of a request in Flower's layers: as they are, and as the SuperLink here has them.

    python scripts/bench/superlink_requests.py [--requests 100] [--mib 1.25]

The handler only reads its body. In turns, three times each, in processes of their own; one line of
JSON: milliseconds of CPU for a small and a large request to the Fleet and the Runtime API, medians,
and how many times more Flower's take.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time

from flwr.superlink import main as flower
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message

from zk0bot.federation.http_layers import skip_idle_layers, with_whole_bodies

PIECE = 64 * 1024
"""What uvicorn hands over at a time."""
PATHS = {"fleet": "/v1/fleet/bench", "runtime": "/v1/runtime/bench"}
REPEATS = 3
Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--mib", type=float, default=1.25)
    parser.add_argument("--one", choices=["stock", "ours"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        figures = asyncio.run(measure(build(asked.one), asked.requests, asked.mib))
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    runs: dict[str, list[Figures]] = {"stock": [], "ours": []}
    for _ in range(REPEATS):
        for kind, found in runs.items():
            found.append(run_one(kind))
    told = {kind: find_medians(found) for kind, found in runs.items()}
    ratio = {key: round(told["stock"][key] / told["ours"][key], 1) for key in told["stock"]}
    line = {"bench": "superlink_requests", "mib": asked.mib, "cpu_ms": told, "ratio": ratio}
    sys.stdout.write(json.dumps(line) + "\n")


def run_one(kind: str) -> Figures:
    command = [sys.executable, __file__, *sys.argv[1:], "--one", kind]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: Figures = json.loads(told.stdout)
    return figures


def find_medians(found: list[Figures]) -> Figures:
    return {key: round(statistics.median(one[key] for one in found), 2) for key in found[0]}


def build(kind: str) -> ASGIApp:
    if kind == "ours":
        skip_idle_layers()
    routes = [Route(path, answer, methods=["POST"]) for path in PATHS.values()]
    app = Starlette(routes=routes, middleware=flower._get_middleware())
    return with_whole_bodies(app) if kind == "ours" else app


async def answer(request: Request) -> Response:
    await request.body()
    return Response(b"done")


async def measure(app: ASGIApp, requests: int, mib: float) -> Figures:
    figures: Figures = {}
    for name, path in PATHS.items():
        for size, body in (("small", 200), ("large", int(mib * 2**20))):
            await ask(app, path, body)
            begun = time.process_time()
            for _ in range(requests):
                await ask(app, path, body)
            figures[f"{name}_{size}"] = (time.process_time() - begun) / requests * 1e3
    return figures


async def ask(app: ASGIApp, path: str, size: int) -> None:
    body = b"x" * size
    pieces = [body[start : start + PIECE] for start in range(0, size, PIECE)]
    waiting: list[Message] = [
        {"type": "http.request", "body": piece, "more_body": place < len(pieces) - 1}
        for place, piece in enumerate(pieces)
    ]

    async def receive() -> Message:
        if waiting:
            return waiting.pop(0)
        await asyncio.Event().wait()
        raise AssertionError("nothing sets it")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200

    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"host", b"bench")], "server": ("bench", 80), "client": ("bench", 1),
    }  # fmt: skip
    await app(scope, receive, send)


if __name__ == "__main__":
    main()
