"""Acting without a key, with another's, as another node, again, or after revocation."""

import threading
import time
from base64 import b64encode
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from attack import Answer, Node, Target, build_head, new_address
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Metadata,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.message_pb2 import Message as FlowerMessage
from flwr.proto.node_pb2 import Node as FlowerNode
from flwr.proto.run_pb2 import GetRunRequest
from google.protobuf.message import Message

from zk0bot.trust.keys import (
    PUBLIC_KEY_HEADER,
    SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    NodeKey,
    make_node_key,
)
from zk0bot.trust.registry import build_request

pytestmark = pytest.mark.integration

FOR_NODES = ("/v1/fleet/send-node-heartbeat", "/v1/zk0/progress", "/v1/zk0/leave")
AT_ONCE_S = 1.5
"""A revocation takes effect within 0.05 s; the rest is for a busy machine."""


@pytest.fixture(scope="module")
def insider(running: Target, tmp_path_factory: pytest.TempPathFactory) -> Node:
    """A node that has joined and now tries for more than a node may."""
    return running.enrol(tmp_path_factory.mktemp("keys"), "insider of keys")


@pytest.fixture
def stranger(folder: Path) -> NodeKey:
    """A key that never joined."""
    return make_node_key(folder / "stranger")


def beat(target: Target, headers: dict[str, str], address: str, path: str = FOR_NODES[0]) -> Answer:
    """A heartbeat of the honest node, with these headers."""
    body = target.honest.heartbeat()
    sizes = {"content-type": "application/protobuf", "content-length": str(len(body))}
    return target.ask(build_head("POST", path, sizes | headers) + body, address)


@pytest.mark.parametrize("path", FOR_NODES)
def test_without_a_key_nothing_is_answered(target: Target, address: str, path: str) -> None:
    answer = beat(target, {}, address, path)
    assert (answer.status, answer.code) == (401, "node_unknown")
    target.wait_for_refusal(address, "node_unknown")


@pytest.mark.parametrize("path", FOR_NODES)
def test_a_key_that_never_joined_is_unknown(
    target: Target, stranger: NodeKey, address: str, path: str
) -> None:
    answer = beat(target, stranger.sign_headers(), address, path)
    assert (answer.status, answer.code) == (401, "node_unknown")
    target.wait_for_refusal(address, "node_unknown")


def forge(honest: NodeKey, stranger: NodeKey) -> dict[str, dict[str, str]]:
    """Headers that claim the honest node's key without its private half."""
    mine, foreign = honest.sign_headers(), stranger.sign_headers()
    now = datetime.now(UTC).isoformat()
    signature = mine[SIGNATURE_HEADER]
    return {
        "another's signature": foreign | {PUBLIC_KEY_HEADER: mine[PUBLIC_KEY_HEADER]},
        "an older signature for this moment": mine | {TIMESTAMP_HEADER: now},
        "no signature": {k: v for k, v in mine.items() if k != SIGNATURE_HEADER},
        "an empty signature": mine | {SIGNATURE_HEADER: ""},
        "zeros": mine | {SIGNATURE_HEADER: b64encode(bytes.fromhex("3006020100020100")).decode()},
        "a flipped bit": mine | {SIGNATURE_HEADER: signature[:20] + "AA" + signature[22:]},
        "no base64": mine | {SIGNATURE_HEADER: "%%%"},
        "a long signature": mine | {SIGNATURE_HEADER: "A" * 8000},
        "no time": {k: v for k, v in mine.items() if k != TIMESTAMP_HEADER},
        "no zone": mine | {TIMESTAMP_HEADER: datetime.now().isoformat()},
        "no date": mine | {TIMESTAMP_HEADER: "now"},
        "ten minutes old": honest.sign_headers(datetime.now(UTC) - timedelta(minutes=10)),
        "just too old": honest.sign_headers(datetime.now(UTC) - timedelta(seconds=122)),
        "of the future": honest.sign_headers(datetime.now(UTC) + timedelta(seconds=70)),
        "of year 9999": honest.sign_headers(datetime(9999, 12, 31, tzinfo=UTC)),
    }


def test_no_forged_or_old_signature_is_accepted(
    target: Target, stranger: NodeKey, address: str
) -> None:
    for what, headers in forge(target.honest.key, stranger).items():
        answer = beat(target, headers, address)
        assert (answer.status, answer.code) == (401, "signature_refused"), what
    target.wait_for_refusal(address, "signature_refused")


@pytest.mark.parametrize("again", [FOR_NODES[0], "/v1/fleet/deactivate-node", "/v1/zk0/leave"])
def test_what_was_overheard_is_good_for_nothing(target: Target, address: str, again: str) -> None:
    """Neither for the same call nor for another, though Flower signs no more than the time."""
    overheard = target.honest.key.sign_headers()
    assert beat(target, overheard, address).status == 200
    answer = beat(target, overheard, address, again)
    assert (answer.status, answer.code) == (401, "request_repeated")
    target.wait_for_refusal(address, "request_repeated")


def as_other(other: Node) -> dict[str, Message]:
    """Every call in another node's name."""
    node = FlowerNode(node_id=other.node_id)
    return {
        "activate-node": ActivateNodeRequest(
            public_key=other.key.public_pem, heartbeat_interval=30
        ),
        "deactivate-node": DeactivateNodeRequest(node_id=other.node_id),
        "send-node-heartbeat": SendNodeHeartbeatRequest(node=node, heartbeat_interval=1e6),
        "pull-messages": PullMessagesRequest(node=node),
        "get-run": GetRunRequest(node=node, run_id=1),
        "get-fab": GetFabRequest(node=node, run_id=1, hash_str="0" * 64),
        "pull-object": PullObjectRequest(node=node, run_id=1, object_id="0" * 64),
        "push-object": PushObjectRequest(node=node, run_id=1, object_id="0" * 64),
        "confirm-message-received": ConfirmMessageReceivedRequest(node=node, run_id=1),
    }


def test_a_node_cannot_act_for_another(target: Target, insider: Node) -> None:
    for operation, message in as_other(target.honest).items():
        answer = target.post(insider, operation, message)
        assert (answer.status, answer.code) == (401, "node_id_refused"), operation
    target.wait_for_refusal("127.0.0.1", "node_id_refused")
    noted = target.events("request-refused", "127.0.0.1")
    assert insider.name in {str(line.details.get("node")) for line in noted}


def test_a_node_cannot_reply_for_another(target: Target, insider: Node) -> None:
    """Flower itself takes any reply of which the sender knows the order's id."""
    pushes = [
        push(insider, target.honest.node_id),
        push(insider, insider.node_id, target.honest.node_id),
        push(insider),
    ]
    for message in pushes:
        answer = target.post(insider, "push-messages", message)
        assert (answer.status, answer.code) == (403, "foreign_reply")
    target.wait_for_refusal("127.0.0.1", "foreign_reply")
    own = target.post(insider, "push-messages", push(insider, insider.node_id))
    assert own.status == 502, "Flower stumbles over a run that there is not"


def push(sender: Node, *claimed: int) -> PushMessagesRequest:
    """A reply head with a message of each of the claimed senders."""
    return PushMessagesRequest(
        node=FlowerNode(node_id=sender.node_id),
        messages_list=[
            FlowerMessage(metadata=Metadata(run_id=1, src_node_id=node_id, message_type="train"))
            for node_id in claimed
        ],
        message_object_trees=[ObjectTree(object_id="0" * 64)],
    )


def test_a_node_learns_nothing_of_objects_and_runs_that_are_not_its_own(
    target: Target, insider: Node
) -> None:
    node = FlowerNode(node_id=insider.node_id)
    for operation, message in (
        ("get-run", GetRunRequest(node=node, run_id=1)),
        ("get-fab", GetFabRequest(node=node, run_id=1, hash_str="0" * 64)),
        ("pull-object", PullObjectRequest(node=node, run_id=1, object_id="0" * 64)),
    ):
        answer = target.post(insider, operation, message)
        assert answer.status >= 400, operation
        assert len(answer.body) < 200, operation


def timed(work: Callable[[], Answer]) -> tuple[threading.Thread, list[tuple[float, Answer]]]:
    """``work`` in the background; when it ended, and with what."""
    ended: list[tuple[float, Answer]] = []

    def run() -> None:
        answer = work()
        ended.append((time.monotonic(), answer))

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ended


def test_revocation_ends_a_held_pull(target: Target, folder: Path) -> None:
    node = target.enrol(folder, "puller")
    thread, ended = timed(lambda: target.post(node, "pull-messages", node.pull()))
    time.sleep(0.5)
    assert not ended, "an empty pull is held"
    revoked_at = time.monotonic()
    target.revoke(node)
    thread.join()
    ended_at, answer = ended[0]
    assert (answer.status, answer.code) == (403, "node_revoked")
    assert ended_at - revoked_at < AT_ONCE_S


def test_revocation_ends_an_upload(target: Target, folder: Path) -> None:
    node = target.enrol(folder, "uploader")
    size = 5 * 2**20
    with target.connect() as wire:
        wire.send(node.heads("/v1/fleet/push-object", size) + bytes(size // 2))
        time.sleep(0.3)
        assert wire.is_open()
        revoked_at = time.monotonic()
        target.revoke(node)
        assert wire.read() == Answer(status=0)
        assert time.monotonic() - revoked_at < AT_ONCE_S
    again = target.post(node, "push-object", bytes(10))
    assert (again.status, again.code) == (403, "node_revoked")


@pytest.mark.parametrize("end", ["revoke", "leave"])
def test_who_has_gone_stays_out(target: Target, folder: Path, end: str) -> None:
    node = target.enrol(folder, f"gone by {end}")
    if end == "revoke":
        target.revoke(node)
    else:
        assert target.ask(node.heads("/v1/zk0/leave", 0)).status == 204
    code = {"revoke": "node_revoked", "leave": "node_left"}[end]
    for operation in as_other(node):
        answer = target.post(node, operation, as_other(node)[operation])
        assert (answer.status, answer.code) == (403, code), operation
    for path in ("/v1/zk0/progress", "/v1/zk0/leave"):
        answer = target.ask(node.heads(path, 0))
        assert (answer.status, answer.code) == (403, code), path
    target.wait_for_refusal("127.0.0.1", code)
    wait_until(lambda: node.key.public_pem not in target.list_known_keys())
    request = build_request(target.invite("a new name"), node.key, "")
    assert target.send_enrol(request, new_address()).code == "key_known"


def test_who_never_joined_cannot_leave_for_another(
    target: Target, insider: Node, stranger: NodeKey, address: str
) -> None:
    head = build_head("POST", "/v1/zk0/leave", stranger.sign_headers() | {"content-length": "0"})
    assert target.ask(head, address).code == "node_unknown"
    assert target.post(insider, "send-node-heartbeat", insider.heartbeat()).status == 200


def test_the_revoked_stay_out_when_the_superlink_forgets(target: Target, folder: Path) -> None:
    """Each start of the server gives its SuperLink a new, empty database."""
    node = target.enrol(folder, "revoked for ever")
    target.revoke(node)
    known_as = target.honest.node_id
    target.restart()
    assert target.honest.node_id != known_as
    answer = target.post(node, "send-node-heartbeat", node.heartbeat())
    assert (answer.status, answer.code) == (403, "node_revoked")
    wanted = ActivateNodeRequest(public_key=node.key.public_pem, heartbeat_interval=30)
    assert target.post(node, "activate-node", wanted).status == 403
    assert node.key.public_pem not in target.list_known_keys()


def wait_until(look: Callable[[], bool], timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while not look():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
