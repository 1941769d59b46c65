"""Certificates: names, renewal, rotation of the CA, and the operator's own."""

import hashlib
import ssl
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from zk0bot.errors import ConfigError
from zk0bot.trust.certificates import (
    MAX_ROTATIONS,
    ca_fingerprint,
    describe_certificate,
    ensure_authority,
    ensure_certificate,
    list_fingerprints,
    make_loopback,
    pick_certificate,
    read_own_authority,
    read_own_certificate,
    rotate_authority,
)

HOSTS = ["arms.example.org", "192.0.2.7", "2001:db8::7"]


@pytest.fixture
def tls_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "tls"
    ensure_authority(folder)
    ensure_certificate(folder, HOSTS)
    return folder


def shake_hands(
    authority: bytes, pair: Path, host: str = "127.0.0.1", key: Path | None = None
) -> str:
    """The TLS version that a client which trusts ``authority`` agrees on; SSLError otherwise."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(pair, key)
    client_context = ssl.create_default_context(cadata=authority.decode())
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = client_context.wrap_bio(to_client, to_server, server_hostname=host)
    for _ in range(4):
        for end in (client, server):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    client.do_handshake()
    return client.version() or ""


def read_authority(tls_dir: Path) -> bytes:
    return (tls_dir / "ca.crt").read_bytes()


def test_a_loopback_certificate_is_trusted_for_this_machine_only(tmp_path: Path) -> None:
    make_loopback(tmp_path)
    pair, key = tmp_path / "server.crt", tmp_path / "server.key"
    for host in ("127.0.0.1", "localhost"):
        assert shake_hands(read_authority(tmp_path), pair, host, key) == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands(read_authority(tmp_path), pair, "127.0.0.2", key)


def test_loopback_files_are_private_new_each_time_and_without_the_key_of_the_ca(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "loopback"
    make_loopback(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    make_loopback(folder)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(after) == ["ca.crt", "secret", "server.crt", "server.key"]
    assert all(before[name] != after[name] for name in after)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("server.key", "secret"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert len(bytes.fromhex(after["secret"].decode().removesuffix("\n"))) == 32


def test_a_certificate_of_another_loopback_is_refused(tmp_path: Path) -> None:
    make_loopback(tmp_path / "a")
    make_loopback(tmp_path / "b")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(
            read_authority(tmp_path / "a"),
            tmp_path / "b" / "server.crt",
            key=tmp_path / "b" / "server.key",
        )


@pytest.mark.parametrize("host", [*HOSTS, "localhost", "127.0.0.1"])
def test_the_public_certificate_holds_for_each_name(tls_dir: Path, host: str) -> None:
    assert shake_hands(read_authority(tls_dir), tls_dir / "server.key", host) == "TLSv1.3"


def test_the_public_certificate_holds_for_no_other_name(tls_dir: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(read_authority(tls_dir), tls_dir / "server.key", "other.example.org")


def test_keys_are_private(tls_dir: Path) -> None:
    assert stat.S_IMODE(tls_dir.stat().st_mode) == 0o700
    for name in ("ca.key", "server.key"):
        assert stat.S_IMODE((tls_dir / name).stat().st_mode) == 0o600


def test_what_is_there_stays(tls_dir: Path) -> None:
    before = {path.name: path.read_bytes() for path in tls_dir.iterdir()}
    ensure_authority(tls_dir)
    assert not ensure_certificate(tls_dir, [*HOSTS[::-1], "ARMS.example.org", "[2001:DB8::7]"])
    assert {path.name: path.read_bytes() for path in tls_dir.iterdir()} == before


@pytest.mark.parametrize("hosts", [HOSTS[:2], [*HOSTS, "new.example.org"]])
def test_other_names_make_another_certificate_of_the_same_ca(
    tls_dir: Path, hosts: list[str]
) -> None:
    authority = read_authority(tls_dir)
    assert ensure_certificate(tls_dir, hosts)
    assert read_authority(tls_dir) == authority
    assert shake_hands(authority, tls_dir / "server.key", hosts[-1]) == "TLSv1.3"


def test_a_certificate_is_renewed_when_fewer_than_thirty_days_are_left(tls_dir: Path) -> None:
    now = datetime.now(UTC)
    assert not ensure_certificate(tls_dir, HOSTS, now + timedelta(days=59))
    assert ensure_certificate(tls_dir, HOSTS, now + timedelta(days=61))
    info = describe_certificate(tls_dir / "server.crt")
    assert info.days_left(now) in (150, 151)
    assert sorted(info.names) == sorted([*HOSTS, "localhost", "127.0.0.1"])


def test_a_certificate_from_the_future_is_made_again(tls_dir: Path) -> None:
    ensure_certificate(tls_dir, HOSTS, datetime.now(UTC) + timedelta(days=400))
    assert ensure_certificate(tls_dir, HOSTS)
    assert shake_hands(read_authority(tls_dir), tls_dir / "server.key") == "TLSv1.3"


@pytest.mark.parametrize("text", [b"", b"rubbish", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
@pytest.mark.parametrize("name", ["server.key", "server.crt", "ca.crt"])
def test_what_a_crash_left_damaged_is_made_again(tls_dir: Path, name: str, text: bytes) -> None:
    (tls_dir / name).write_bytes(text)
    ensure_authority(tls_dir)
    ensure_certificate(tls_dir, HOSTS)
    for pair, key in (
        (tls_dir / "server.key", None),
        (tls_dir / "server.crt", tls_dir / "server.key"),
    ):
        assert shake_hands(read_authority(tls_dir), pair, key=key) == "TLSv1.3"


@pytest.mark.parametrize("text", [b"", b"rubbish"])
def test_a_damaged_ca_is_named_and_never_replaced(tls_dir: Path, text: bytes) -> None:
    (tls_dir / "ca.key").write_bytes(text)
    for ensure in (lambda: ensure_authority(tls_dir), lambda: ensure_certificate(tls_dir, HOSTS)):
        with pytest.raises(ConfigError, match=r"ca\.key is damaged"):
            ensure()
    assert (tls_dir / "ca.key").read_bytes() == text


def test_a_crash_between_the_files_of_a_rotation_is_made_good(
    tls_dir: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in tls_dir.iterdir()}
    rotate_authority(tls_dir)
    for name in ("ca.crt", "server.crt", "server.key"):  # as if only ca.key had been written
        (tls_dir / name).write_bytes(before[name])
    ensure_authority(tls_dir)
    assert ensure_certificate(tls_dir, HOSTS)
    for pinned in (before["ca.crt"], pick_certificate(read_authority(tls_dir), 0)):
        assert shake_hands(pinned, tls_dir / "server.key") == "TLSv1.3"


def test_nodes_that_pin_an_older_ca_still_connect_after_rotations(tls_dir: Path) -> None:
    pinned = [read_authority(tls_dir)]
    for _ in range(MAX_ROTATIONS):
        rotate_authority(tls_dir)
        pinned.append(pick_certificate(read_authority(tls_dir), 0))
        for authority in pinned:
            assert shake_hands(authority, tls_dir / "server.key", HOSTS[0]) == "TLSv1.3"
    assert not ensure_certificate(tls_dir, HOSTS)
    rotate_authority(tls_dir)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(pinned[0], tls_dir / "server.key")
    assert shake_hands(pinned[1], tls_dir / "server.key") == "TLSv1.3"


def test_rotations_and_renewals_at_once_leave_what_fits(tls_dir: Path) -> None:
    pinned = read_authority(tls_dir)
    more = [*HOSTS, "another.example"]
    works = [lambda: rotate_authority(tls_dir), lambda: ensure_certificate(tls_dir, more)]
    with ThreadPoolExecutor(4) as pool:
        for result in [pool.submit(work) for work in (*works, works[1], works[0])]:
            result.result()
    assert len(list_fingerprints(read_authority(tls_dir))) == 3
    assert shake_hands(pinned, tls_dir / "server.key", HOSTS[0]) == "TLSv1.3"


def test_a_rotation_puts_the_new_ca_first_and_deletes_the_old_key(tls_dir: Path) -> None:
    old_key = serialization.load_pem_private_key((tls_dir / "ca.key").read_bytes(), None)
    old = read_authority(tls_dir)
    rotate_authority(tls_dir)
    digests = list_fingerprints(read_authority(tls_dir))
    assert digests[1:] == [ca_fingerprint(old)]
    assert digests[0] == ca_fingerprint(read_authority(tls_dir)) != digests[1]
    key = serialization.load_pem_private_key((tls_dir / "ca.key").read_bytes(), None)
    assert key.public_key() != old_key.public_key()


def test_a_fingerprint_is_of_the_der(tls_dir: Path) -> None:
    certificate = x509.load_pem_x509_certificate(read_authority(tls_dir))
    der = certificate.public_bytes(serialization.Encoding.DER)
    assert ca_fingerprint(read_authority(tls_dir)) == hashlib.sha256(der).digest()


@pytest.mark.parametrize("host", ["", "a b", "https://x", "x:9092", "größe.example", "-x", "a..b"])
def test_what_is_no_host_is_refused_by_name(tls_dir: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="neither a host name nor an address"):
        ensure_certificate(tls_dir, [host])


@pytest.fixture
def own(tls_dir: Path) -> tuple[Path, Path]:
    """Certificate and key files such as an operator brings."""
    return tls_dir / "server.crt", tls_dir / "server.key"


def test_an_own_certificate_is_described(own: tuple[Path, Path]) -> None:
    info = read_own_certificate(*own)
    assert "arms.example.org" in info.names
    assert info.days_left(datetime.now(UTC)) == 89


def test_an_own_key_must_fit(own: tuple[Path, Path], tmp_path: Path) -> None:
    make_loopback(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"server\.key is not the key of .*server\.crt"):
        read_own_certificate(own[0], tmp_path / "other" / "server.key")


def test_an_own_key_that_others_can_read_is_refused(own: tuple[Path, Path]) -> None:
    own[1].chmod(0o644)
    with pytest.raises(ConfigError, match=r"server\.key has mode 0644") as caught:
        read_own_certificate(*own)
    assert caught.value.hint == f"chmod 600 {own[1]}"


@pytest.mark.parametrize(("days", "words"), [(91, "expired on"), (-2, "is valid from")])
def test_an_own_certificate_of_another_time_is_refused(
    own: tuple[Path, Path], days: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=rf"server\.crt {words}"):
        read_own_certificate(*own, datetime.now(UTC) + timedelta(days=days))


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("text", [None, b"", b"rubbish"])
def test_an_own_file_that_cannot_be_read_is_named(
    own: tuple[Path, Path], index: int, text: bytes | None
) -> None:
    own[index].unlink()
    if text is not None:
        own[index].write_bytes(text)
        own[index].chmod(0o600)
    with pytest.raises(ConfigError, match=own[index].name):
        read_own_certificate(*own)


def test_an_encrypted_own_key_is_refused(own: tuple[Path, Path]) -> None:
    key = serialization.load_pem_private_key(own[1].read_bytes(), None)
    own[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"word"),
        )
    )
    with pytest.raises(ConfigError, match="encrypted"):
        read_own_certificate(*own)


def test_a_root_at_the_end_of_an_own_chain_is_what_nodes_pin(own: tuple[Path, Path]) -> None:
    assert read_own_authority(own[0]) is None
    root = read_authority(own[0].parent)
    own[0].write_bytes(own[0].read_bytes() + root)
    assert read_own_authority(own[0]) == root
