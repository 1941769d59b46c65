"""Joining and leaving, against a real server over TLS."""

import re
import socket
import ssl
import stat
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from fake_gateway import JoinServer, make_server, serving

from zk0bot.errors import ConfigError, TrustError
from zk0bot.trust import certificates
from zk0bot.trust.join_code import JoinCode
from zk0bot.trust.keys import load_node_key
from zk0bot.trust.membership import (
    build_ssl_context,
    join,
    join_local,
    leave,
    load_membership,
    refresh_authority,
)
from zk0bot.trust.refusal import (
    ClockError,
    JoinExpiredError,
    JoinRefusedError,
    JoinReplayedError,
    JoinUsedUpError,
    JoinWithdrawnError,
    NameTakenError,
    Refusal,
)
from zk0bot.trust.registry import EnrolRequest, Registry


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JoinServer]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with serving(make_server(tmp_path_factory.mktemp("server"), port)) as server:
        yield server


@pytest.fixture
def server(running: JoinServer, tmp_path: Path) -> JoinServer:
    """A running server that nobody has joined yet; its CA is that of all tests."""
    running.registry = Registry(tmp_path / "enrolment")
    running.clock, running.lose_answers = timedelta(), 0
    running.bodies.clear()
    return running


@pytest.fixture
def client_dir(tmp_path: Path) -> Path:
    return tmp_path / "client"


def test_a_node_joins(server: JoinServer, client_dir: Path) -> None:
    membership = join(client_dir, server.invite_code(), "left arm")
    assert load_membership(client_dir) == membership
    assert (membership.node, membership.trust) == ("left arm", "pinned")
    identity = client_dir / "identity"
    assert sorted(path.name for path in identity.iterdir()) == [
        "ca.crt", "invite", "membership.json", "node.key", "node.pub",
    ]  # fmt: skip
    assert stat.S_IMODE(identity.stat().st_mode) == 0o700
    assert stat.S_IMODE((identity / "node.key").stat().st_mode) == 0o600
    node = server.registry.find_active(load_node_key(identity).public_pem)
    assert node
    assert node.fingerprint == membership.fingerprint


def test_the_private_key_and_the_secret_stay_at_home(server: JoinServer, client_dir: Path) -> None:
    code = server.invite_code()
    join(client_dir, code, "a")
    sent = b"".join(server.bodies)
    assert b"PRIVATE" not in sent
    assert code.secret.hex().encode() not in sent
    held = b"".join(path.read_bytes() for path in client_dir.rglob("*") if path.is_file())
    assert code.secret not in held
    assert code.encode().encode() not in held


def test_the_same_command_again_sends_nothing(server: JoinServer, client_dir: Path) -> None:
    code = server.invite_code()
    membership = join(client_dir, code, "a")
    assert join(client_dir, code, "a") == membership
    assert len(server.bodies) == 1


def test_after_a_lost_answer_the_next_attempt_is_the_same_node(
    server: JoinServer, client_dir: Path
) -> None:
    code = server.invite_code()
    server.lose_answers = 1
    with pytest.raises(TrustError, match="cannot take nodes in now"):
        join(client_dir, code, "a")
    assert load_membership(client_dir) is None
    assert join(client_dir, code, "a").node == "a"
    assert len(server.registry.nodes()) == 1


def test_a_server_with_another_ca_is_refused(
    server: JoinServer, client_dir: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    code = replace(server.invite_code(), server=f"127.0.0.1:{free_port()}")
    impostor = make_server(tmp_path / "impostor", int(code.server.rpartition(":")[2]))
    with serving(impostor), pytest.raises(TrustError, match="not the one that made this code"):
        join(client_dir, code, "a")
    assert impostor.bodies == []
    assert load_membership(client_dir) is None


def test_a_server_that_shows_the_right_ca_without_its_key_is_refused(
    server: JoinServer, client_dir: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    code = replace(server.invite_code(), server=f"127.0.0.1:{free_port()}")
    impostor = make_server(tmp_path / "impostor", int(code.server.rpartition(":")[2]))
    (impostor.tls_dir / "ca.crt").write_bytes(server.authority)
    with serving(impostor), pytest.raises(TrustError, match="not of a CA that this node trusts"):
        join(client_dir, code, "a")
    assert impostor.bodies == []


def test_an_address_the_certificate_is_not_for_is_refused(
    server: JoinServer, client_dir: Path
) -> None:
    host = "127.0.0.2"
    with answering(server, lambda c: c.sendall(server_authority(server)), host) as address:
        code = replace(server.invite_code(), server=address)
        with pytest.raises(TrustError, match=rf"{address} is not for {host}") as caught:
            join(client_dir, code, "a")
    assert caught.value.hint == f"zk0bot server start --public-host {host} on the server machine"


def test_a_system_that_does_not_know_the_ca_refuses(server: JoinServer, client_dir: Path) -> None:
    code = replace(server.invite_code(), trust="system", ca_fingerprint=b"")
    with pytest.raises(TrustError, match="not of a CA that this node trusts"):
        join(client_dir, code, "a")
    assert server.bodies == []


REFUSED = {
    "expired": JoinExpiredError,
    "used up": JoinUsedUpError,
    "withdrawn": JoinWithdrawnError,
    "guessed secret": JoinRefusedError,
    "guessed invite": JoinRefusedError,
    "clock": ClockError,
    "name": NameTakenError,
}


@pytest.mark.parametrize("how", REFUSED)
def test_every_refusal_has_its_own_words_and_next_step(
    server: JoinServer, client_dir: Path, tmp_path: Path, how: str
) -> None:
    code = spoil(server, tmp_path, how)
    with pytest.raises(REFUSED[how]) as caught:
        join(client_dir, code, "arm")
    assert caught.value.message.startswith(server.address)
    assert caught.value.hint
    assert load_membership(client_dir) is None
    said = "".join(traceback.format_exception(caught.value))
    assert code.encode() not in said
    assert code.secret.hex() not in said
    assert repr(code.secret) not in said


def spoil(server: JoinServer, tmp_path: Path, how: str) -> JoinCode:
    """A code that the server refuses for this reason."""
    code = server.invite_code(expires_s=200.0)
    if how == "expired":
        server.clock = timedelta(seconds=201)
    elif how == "clock":
        server.clock = timedelta(seconds=-400)
    elif how == "used up":
        join(tmp_path / "first", code, "first")
    elif how == "withdrawn":
        server.registry.withdraw(code.invite_id)
    elif how == "guessed secret":
        code = replace(code, secret=b"0123456789abcdef")
    elif how == "guessed invite":
        code = replace(code, invite_id="0" * 12)
    else:
        join(tmp_path / "first", server.invite_code(), "ARM")
    return code


def test_guesses_of_secret_and_invite_get_the_same_words(
    server: JoinServer, client_dir: Path, tmp_path: Path
) -> None:
    said = []
    for how in ("guessed secret", "guessed invite"):
        with pytest.raises(JoinRefusedError) as caught:
            join(client_dir, spoil(server, tmp_path, how), "arm")
        said.append(caught.value.to_dict())
    assert said[0] == said[1]


def test_a_recorded_request_is_worthless(server: JoinServer, client_dir: Path) -> None:
    join(client_dir, server.invite_code(uses=3), "a")
    request = EnrolRequest.model_validate_json(server.bodies[0])
    with pytest.raises(JoinReplayedError):
        server.registry.enrol(request, request.at)


def test_two_nodes_race_for_one_use(server: JoinServer, tmp_path: Path) -> None:
    code = server.invite_code()

    def attempt(index: int) -> str:
        try:
            return join(tmp_path / f"client-{index}", code, f"arm {index}").node[:3]
        except Refusal as refusal:
            return refusal.code

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(attempt, range(2))) == ["arm", "join_used_up"]


def test_another_code_makes_another_identity(server: JoinServer, client_dir: Path) -> None:
    first = join(client_dir, server.invite_code(), "a")
    server.registry.revoke("a")
    second = join(client_dir, server.invite_code(), "a")
    assert first.fingerprint != second.fingerprint
    assert load_membership(client_dir) == second


def test_a_refused_code_leaves_the_identity_in_use_alone(
    server: JoinServer, client_dir: Path
) -> None:
    membership = join(client_dir, server.invite_code(), "a")
    with pytest.raises(NameTakenError):
        join(client_dir, server.invite_code(), "a")
    assert load_membership(client_dir) == membership
    assert load_node_key(client_dir / "identity").fingerprint == membership.fingerprint


def test_an_identity_that_was_complete_at_a_crash_is_taken_into_use(
    server: JoinServer, client_dir: Path
) -> None:
    membership = join(client_dir, server.invite_code(), "a")
    (client_dir / "identity").rename(client_dir / "identity.joining")
    assert load_membership(client_dir) == membership
    assert (client_dir / "identity" / "node.key").exists()


def test_a_code_from_before_a_rotation_still_works(
    tmp_path: Path, client_dir: Path, free_port: Callable[[], int]
) -> None:
    server = make_server(tmp_path / "server", free_port())
    code = server.invite_code()
    old = server.authority
    certificates.rotate_authority(server.tls_dir)
    with serving(server):
        join(client_dir, code, "a")
        assert (client_dir / "identity" / "ca.crt").read_bytes() == old
        assert refresh_authority(client_dir)
        pinned = (client_dir / "identity" / "ca.crt").read_bytes()
        assert pinned == certificates.pick_certificate(server.authority, 0)
        assert not refresh_authority(client_dir)
        leave(client_dir)


def test_a_new_ca_is_not_pinned_before_the_server_shows_a_certificate_of_it(
    tmp_path: Path, client_dir: Path, free_port: Callable[[], int]
) -> None:
    server = make_server(tmp_path / "server", free_port())
    old = server.authority
    with serving(server):
        join(client_dir, server.invite_code(), "a")
        certificates.rotate_authority(server.tls_dir)  # it answers with the old certificate yet
        with pytest.raises(TrustError, match="not of a CA"):
            refresh_authority(client_dir)
    assert (client_dir / "identity" / "ca.crt").read_bytes() == old


def test_a_node_leaves(server: JoinServer, client_dir: Path) -> None:
    join(client_dir, server.invite_code(), "a")
    leave(client_dir)
    assert load_membership(client_dir) is None
    assert not (client_dir / "identity").exists()
    assert [node.state for node in server.registry.nodes()] == ["left"]
    leave(client_dir)


def test_a_revoked_node_can_leave(server: JoinServer, client_dir: Path) -> None:
    join(client_dir, server.invite_code(), "a")
    server.registry.revoke("a")
    leave(client_dir)
    assert load_membership(client_dir) is None


def test_a_server_that_is_gone_keeps_the_membership(
    tmp_path: Path, client_dir: Path, free_port: Callable[[], int]
) -> None:
    server = make_server(tmp_path / "server", free_port())
    with serving(server):
        membership = join(client_dir, server.invite_code(), "a")
    with pytest.raises(TrustError, match="is not reached"):
        leave(client_dir)
    assert load_membership(client_dir) == membership


def test_a_missing_ca_is_named(server: JoinServer, client_dir: Path) -> None:
    membership = join(client_dir, server.invite_code(), "a")
    (client_dir / "identity" / "ca.crt").write_text("rubbish")
    with pytest.raises(ConfigError, match=r"ca\.crt is missing or damaged"):
        build_ssl_context(client_dir, membership)


def test_local_nodes_join_without_code_over_plain_http(
    tmp_path: Path, client_dir: Path, free_port: Callable[[], int]
) -> None:
    server = make_server(tmp_path / "server", free_port())
    with serving(server, with_tls=False):
        membership = join_local(client_dir, server.address, "a")
        assert join_local(client_dir, server.address, "a").fingerprint == membership.fingerprint
        assert membership.trust == "loopback"
        assert load_membership(client_dir)
        leave(client_dir)
    assert [node.state for node in server.registry.nodes()] == ["left"]


@pytest.mark.parametrize("address", ["192.0.2.1:9092", "example.org:9092", "127.0.0.1", "::1:9"])
def test_nothing_is_sent_unencrypted_to_another_machine(client_dir: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="not an address of this machine"):
        join_local(client_dir, address, "a")


def test_insecure_does_not_make_a_client_forget_its_server(
    server: JoinServer, client_dir: Path
) -> None:
    membership = join(client_dir, server.invite_code(), "a")
    with pytest.raises(ConfigError, match="has joined"):
        join_local(client_dir, "127.0.0.1:9092", "a")
    assert load_membership(client_dir) == membership


def test_a_server_without_tls_is_told_as_such(
    tmp_path: Path, client_dir: Path, free_port: Callable[[], int]
) -> None:
    server = make_server(tmp_path / "server", free_port())
    with serving(server, with_tls=False), pytest.raises(TrustError, match="does not speak TLS"):
        join(client_dir, server.invite_code(), "a")


OK = b"HTTP/1.1 200 OK\r\n"
RUBBISH = {
    "text": OK + b"content-length: 5\r\n\r\nhello",
    "not http": b"\x00\xff" * 99,
    "nothing": b"",
    "a huge length": OK + b"content-length: 999999999999\r\n\r\n" + b"x" * 100_000,
    "gzip bomb": OK
    + b"content-encoding: gzip\r\ncontent-length: 9\r\n\r\n\x1f\x8b\x08"
    + b"\0" * 6,
    "redirect": b"HTTP/1.1 302 Found\r\nlocation: http://192.0.2.1/\r\ncontent-length: 0\r\n\r\n",
    "endless headers": OK + b"x: y\r\n" * 50_000,
}


@pytest.mark.parametrize("kind", RUBBISH)
def test_a_server_that_answers_rubbish_is_no_zk0bot_server(
    server: JoinServer, tmp_path: Path, client_dir: Path, kind: str
) -> None:
    with (
        answering(server, lambda connection: connection.sendall(RUBBISH[kind])) as address,
        pytest.raises(TrustError) as caught,
    ):
        join(client_dir, replace(server.invite_code(), server=address), "a", deadline_s=2.0)
    assert caught.value.hint
    assert address in caught.value.message
    assert load_membership(client_dir) is None


def drip(connection: socket.socket) -> None:
    """An answer that never ends, byte by byte: no single read takes long."""
    connection.sendall(OK)
    while True:
        connection.sendall(b"x")
        time.sleep(0.05)


def pour(connection: socket.socket) -> None:
    """An answer that never ends, as fast as it is taken."""
    connection.sendall(OK + b"transfer-encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"8000\r\n" + b"x" * 0x8000 + b"\r\n")


@pytest.mark.parametrize(("behave", "words"), [(drip, "within 1 s"), (pour, "has no end")])
def test_an_endless_answer_is_given_up(
    server: JoinServer, client_dir: Path, behave: Callable[[socket.socket], None], words: str
) -> None:
    with answering(server, behave) as address:
        begun = time.monotonic()
        with pytest.raises(TrustError, match=words):
            join(client_dir, replace(server.invite_code(), server=address), "a", deadline_s=1.0)
        assert time.monotonic() - begun < 3


def test_the_words_of_a_server_cannot_command_a_terminal(
    server: JoinServer, client_dir: Path
) -> None:
    body = (
        b'{"error": {"code": "join_refused", "message": "\\u001b[2Jbad\\nline' + b"x" * 999 + b'"}}'
    )
    head = b"HTTP/1.1 403 Forbidden\r\ncontent-length: %d\r\n\r\n" % len(body)
    answers = iter([server_authority(server), head + body])
    with (
        answering(server, lambda connection: connection.sendall(next(answers))) as address,
        pytest.raises(JoinRefusedError) as caught,
    ):
        join(client_dir, replace(server.invite_code(), server=address), "a")
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 300


def server_authority(server: JoinServer) -> bytes:
    pem = server.authority
    return OK + b"content-length: %d\r\n\r\n" % len(pem) + pem


def read_request(connection: socket.socket) -> None:
    """Read to the end of head and body: closing before would cut the answer off."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: ([0-9]+)", head.lower())
    missing = int(length[1]) - len(body) if length else 0
    while missing > 0:
        missing -= len(connection.recv(65536))


@contextmanager
def answering(
    server: JoinServer, behave: Callable[[socket.socket], None], host: str = "127.0.0.1"
) -> Iterator[str]:
    """A TLS listener with the certificate of ``server``: it reads a request, then behaves so."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.tls_dir / "server.key")
    listener = socket.create_server((host, 0))

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            answer(plain)

    def answer(plain: socket.socket) -> None:
        with plain:
            plain.settimeout(5)
            try:
                with context.wrap_socket(plain, server_side=True) as connection:
                    read_request(connection)
                    behave(connection)
            except OSError:
                return

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"{host}:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
