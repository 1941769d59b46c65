"""Listening in, changing traffic, posing as the server: what TLS and the pinned CA are for."""

import socket
import ssl
import threading
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from attack import HERE, Target, Wire, build_head

from zk0bot.errors import TrustError
from zk0bot.trust import certificates
from zk0bot.trust.join_code import JoinCode
from zk0bot.trust.membership import AUTHORITY_PATH, join, load_membership

pytestmark = pytest.mark.integration

HEALTH = build_head("GET", "/v1/zk0/health")


class Impostor:
    """Listens at an address of its own and keeps whatever it is sent; relays nothing."""

    def __init__(self, tls: ssl.SSLContext | None, answer: bytes = b"") -> None:
        self._tls = tls
        self._answer = answer
        self._listener = socket.create_server((HERE, 0))
        self.port = int(self._listener.getsockname()[1])
        self.received: list[bytes] = []
        """What came over each connection, in the clear."""

    def serve(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            with closing(plain):
                self._listen(plain)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _listen(self, plain: socket.socket) -> None:
        plain.settimeout(5)
        try:
            peer = self._tls.wrap_socket(plain, server_side=True) if self._tls else plain
        except OSError:
            self.received.append(b"")
            return
        with closing(peer):
            try:
                self.received.append(peer.recv(65536))
                peer.sendall(self._answer)
            except OSError:
                return


@contextmanager
def posing(tls: ssl.SSLContext | None, answer: bytes = b"") -> Iterator[Impostor]:
    """An impostor at work."""
    impostor = Impostor(tls, answer)
    thread = threading.Thread(target=impostor.serve)
    thread.start()
    try:
        yield impostor
    finally:
        impostor.close()
        thread.join()


@pytest.fixture
def false_tls(tmp_path: Path) -> tuple[ssl.SSLContext, bytes]:
    """What a server with another CA would show, and that CA."""
    certificates.ensure_authority(tmp_path / "false")
    certificates.ensure_certificate(tmp_path / "false", [HERE])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "false" / "server.key")
    return context, (tmp_path / "false" / "ca.crt").read_bytes()


def authority_answer(pem: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (len(pem), pem)


def elsewhere(code: JoinCode, port: int) -> JoinCode:
    """The same code for somebody whose name service or router lies."""
    return JoinCode(
        server=f"{HERE}:{port}",
        trust=code.trust,
        ca_fingerprint=code.ca_fingerprint,
        invite_id=code.invite_id,
        secret=code.secret,
    )


def assert_kept_silent(impostor: Impostor, code: JoinCode) -> None:
    """Nothing was told but the question for the CA, which holds nothing of the code."""
    told = b"".join(impostor.received)
    assert impostor.received, "the client did not come at all"
    assert code.invite_id.encode() not in told
    assert code.secret not in told
    assert code.secret.hex().encode() not in told
    for request in filter(None, impostor.received):
        assert request.startswith(f"GET {AUTHORITY_PATH} HTTP/1.1\r\n".encode())


def test_plain_http_at_the_tls_port_gets_no_answer(target: Target, address: str) -> None:
    with Wire(target.port, source=address) as wire:
        wire.send(HEALTH)
        told = wire.read_to_end()
    assert b"HTTP" not in told
    target.wait_for_refusal(address, "TLS handshake: http request")


@pytest.mark.parametrize("rubbish", [b"\0" * 600, b"\x16\x03\x01\xff\xff" + b"A" * 600, b"\n"])
def test_rubbish_at_the_tls_port_gets_no_answer(
    target: Target, address: str, rubbish: bytes
) -> None:
    with Wire(target.port, source=address) as wire:
        wire.send(rubbish)
        wire.socket.shutdown(socket.SHUT_WR)
        assert b"HTTP" not in wire.read_to_end()
    target.wait_for_refusal(address, "TLS handshake")


@pytest.mark.parametrize("name", ["TLSv1", "TLSv1_1"])
def test_old_versions_of_tls_are_refused(target: Target, address: str, name: str) -> None:
    old = weak_context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this is what is tried
        old.minimum_version = old.maximum_version = ssl.TLSVersion[name]
    with pytest.raises(ssl.SSLError):
        Wire(target.port, source=address, tls=old)
    target.wait_for_refusal(address, "TLS handshake: unsupported protocol")


@pytest.mark.parametrize("cipher", ["AES128-SHA", "AES128-GCM-SHA256", "NULL", "ECDHE+SHA"])
def test_ciphers_without_forward_secrecy_or_integrity_are_refused(
    target: Target, address: str, cipher: str
) -> None:
    weak = weak_context()
    weak.maximum_version = ssl.TLSVersion.TLSv1_2
    weak.set_ciphers(f"{cipher}:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        Wire(target.port, source=address, tls=weak)
    target.wait_for_refusal(address, "TLS handshake: no shared cipher")


def test_there_is_no_other_http_than_1_1(target: Target) -> None:
    context = ssl.create_default_context(cafile=target.paths.tls_dir / "ca.crt")
    context.set_alpn_protocols(["h2", "spdy/3", "http/1.1"])
    with Wire(target.port, tls=context) as wire:
        assert isinstance(wire.socket, ssl.SSLSocket)
        assert wire.socket.selected_alpn_protocol() == "http/1.1"
        assert wire.socket.compression() is None
        wire.send(HEALTH)
        assert wire.read().status == 200


def test_the_certificate_is_of_the_pinned_ca_only(target: Target, address: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        Wire(target.port, source=address, tls=ssl.create_default_context())
    target.wait_for_refusal(address, "TLS handshake: tlsv1 alert unknown ca")


def test_the_certificate_is_for_the_servers_own_names_only(target: Target, address: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"), socket.socket() as plain:
        plain.bind((address, 0))
        plain.connect(("127.0.0.77", target.port))
        target.tls.wrap_socket(plain, server_hostname="127.0.0.77")
    target.wait_for_refusal(address, "TLS handshake")


def test_a_server_with_another_ca_learns_nothing_of_the_code(
    target: Target, false_tls: tuple[ssl.SSLContext, bytes], tmp_path: Path
) -> None:
    code = target.invite()
    context, pem = false_tls
    refused = pytest.raises(TrustError, match="not the one that made this code")
    with posing(context, authority_answer(pem)) as impostor, refused:
        join(tmp_path / "client", elsewhere(code, impostor.port), "a")
    assert_kept_silent(impostor, code)
    assert load_membership(tmp_path / "client") is None


def test_a_server_that_shows_the_right_ca_without_its_key_learns_nothing(
    target: Target, false_tls: tuple[ssl.SSLContext, bytes], tmp_path: Path
) -> None:
    code = target.invite()
    true_pem = (target.paths.tls_dir / "ca.crt").read_bytes()
    refused = pytest.raises(TrustError, match="not of a CA that this node trusts")
    with posing(false_tls[0], authority_answer(true_pem)) as impostor, refused:
        join(tmp_path / "client", elsewhere(code, impostor.port), "a")
    assert_kept_silent(impostor, code)
    assert len(impostor.received) == 2, "the second connection is the one that fails"
    assert impostor.received[1] == b""


def test_a_server_that_speaks_no_tls_learns_nothing(target: Target, tmp_path: Path) -> None:
    code = target.invite()
    with posing(None, authority_answer(b"")) as impostor, pytest.raises(TrustError):
        join(tmp_path / "client", elsewhere(code, impostor.port), "a")
    told = b"".join(impostor.received)
    assert told.startswith(b"\x16\x03"), "a TLS greeting and nothing else"
    assert code.secret not in told
    assert code.invite_id.encode() not in told


def test_the_code_still_works_at_the_true_server(target: Target, tmp_path: Path) -> None:
    membership = join(tmp_path / "client", target.invite(), "after the impostors")
    assert membership.trust == "pinned"
    assert target.registry.get(membership.node).state == "active"


def weak_context() -> ssl.SSLContext:
    """A client that would put up with anything."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("ALL:COMPLEMENTOFALL:@SECLEVEL=0")
    return context
