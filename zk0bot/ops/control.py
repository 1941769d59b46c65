"""Flower's Control API: submitting a run to the SuperLink of this machine, asking, stopping.

The only module of the terminal tower that loads Flower; imported by ``run`` and ``stop`` alone.
Flower has no public API for this, so the pinned version's own client is used.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StopRunRequest
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

import zk0bot
from zk0bot.errors import RunError, ServiceError
from zk0bot.records import Record

_FINISHED = "finished"


class FlowerRun(Record):
    """What the SuperLink knows of a run."""

    run_id: str
    status: str
    """``pending``, ``starting``, ``running`` or ``finished``."""
    outcome: str = ""
    """``completed``, ``failed`` or ``stopped``, once finished."""
    details: str = ""

    @property
    def is_finished(self) -> bool:
        return self.status == _FINISHED


def bundle_dir() -> Path:
    """The app that Flower ships: two modules of three lines."""
    return Path(zk0bot.__file__).parent / "federation" / "bundle"


def submit(superlink: str, run_id: str) -> str:
    """Start the bundle with ``zk0-run = run_id``; Flower's id of the run, as text."""
    content = build_fab_from_disk(bundle_dir())
    fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
    request = StartRunRequest(
        fab=fab_to_proto(fab), override_config=user_config_to_proto({"zk0-run": run_id})
    )
    with _connected(superlink) as client:
        answer = client.StartRun(request)
    if not answer.HasField("run_id"):
        raise RunError("the SuperLink did not accept the run", hint="zk0bot server logs")
    return str(answer.run_id)


def get_flower_run(superlink: str, flower_run_id: str) -> FlowerRun:
    """What became of a run. Raises ServiceError when the SuperLink does not answer."""
    with _connected(superlink) as client:
        answer = client.ListRuns(ListRunsRequest(run_id=int(flower_run_id)))
    run = answer.run_dict[int(flower_run_id)]
    return FlowerRun(
        run_id=flower_run_id,
        status=run.status.status,
        outcome=run.status.sub_status,
        details=run.status.details,
    )


def stop(superlink: str, flower_run_id: str) -> None:
    """Make Flower end a run at once. One that has ended already is left as it is."""
    if get_flower_run(superlink, flower_run_id).is_finished:
        return
    with _connected(superlink) as client:
        client.StopRun(StopRunRequest(run_id=int(flower_run_id)))


@contextmanager
def _connected(superlink: str) -> Iterator[ControlHttpClient]:
    client = ControlHttpClient.from_server_address(
        superlink,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="zk0bot")],
    )
    try:
        yield client
    except httpx.HTTPStatusError as error:
        raise RunError(f"the SuperLink refused: {error.response.text}") from error
    except httpx.TransportError as error:
        raise ServiceError(
            f"the SuperLink at {superlink} does not answer: {error}", hint="zk0bot server status"
        ) from error
    finally:
        client.close()
