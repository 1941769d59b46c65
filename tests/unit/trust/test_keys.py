"""Node keys, and the headers by which a request shows whose it is."""

import stat
from base64 import b64decode, b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from zk0bot.errors import ConfigError, KeyRefusedError
from zk0bot.trust.keys import (
    NodeKey,
    find_public_key,
    fingerprint,
    load_node_key,
    make_node_key,
    verify_headers,
)

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


def build_key(curve: ec.EllipticCurve | None = None) -> NodeKey:
    private = ec.generate_private_key(curve or ec.SECP384R1())
    return NodeKey(private=private, public_pem=public_key_to_bytes(private.public_key()))


KEY = build_key()
HEADERS = KEY.sign_headers(NOW)


def test_a_key_is_made_once_and_is_private(tmp_path: Path) -> None:
    key = make_node_key(tmp_path / "identity")
    assert make_node_key(tmp_path / "identity").public_pem == key.public_pem
    assert stat.S_IMODE((tmp_path / "identity").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "identity" / "node.key").stat().st_mode) == 0o600
    assert "PRIVATE" not in repr(key)


def test_flower_reads_the_key_and_registers_the_same_bytes(tmp_path: Path) -> None:
    key = make_node_key(tmp_path)
    loaded = serialization.load_ssh_private_key((tmp_path / "node.key").read_bytes(), None)
    assert isinstance(loaded, ec.EllipticCurvePrivateKey)
    assert public_key_to_bytes(loaded.public_key()) == key.public_pem
    public = serialization.load_ssh_public_key((tmp_path / "node.pub").read_bytes())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert public_key_to_bytes(public) == key.public_pem


@pytest.mark.parametrize("text", [b"", b"rubbish", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA"])
def test_a_damaged_key_file_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "node.key").write_bytes(text)
    with pytest.raises(ConfigError, match=r"node\.key"):
        load_node_key(tmp_path)


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"node\.key is missing"):
        load_node_key(tmp_path)


def test_signed_headers_are_accepted() -> None:
    assert verify_headers(HEADERS, NOW) == KEY.public_pem
    assert find_public_key(HEADERS) == KEY.public_pem
    assert verify_headers({name.upper(): value for name, value in HEADERS.items()}, NOW)


@pytest.mark.parametrize("age_s", [-59, 0, 119])
def test_a_request_of_the_last_two_minutes_is_accepted(age_s: int) -> None:
    assert verify_headers(HEADERS, NOW + timedelta(seconds=age_s))


@pytest.mark.parametrize("age_s", [-(10**9), -61, 121, 300, 10**9])
def test_a_request_of_another_time_is_refused(age_s: int) -> None:
    with pytest.raises(KeyRefusedError, match="s ago"):
        verify_headers(HEADERS, NOW + timedelta(seconds=age_s))


@pytest.mark.parametrize("name", HEADERS)
def test_a_missing_header_is_refused(name: str) -> None:
    rest = {key: value for key, value in HEADERS.items() if key != name}
    with pytest.raises(KeyRefusedError, match=f"0 headers {name}"):
        verify_headers(rest, NOW)


@pytest.mark.parametrize("name", HEADERS)
def test_a_repeated_header_is_refused(name: str) -> None:
    pairs = [*HEADERS.items(), (name.title(), HEADERS[name])]
    raw = [(key.lower().encode(), value.encode()) for key, value in pairs]
    with pytest.raises(KeyRefusedError, match=f"2 headers {name}"):
        verify_headers(Headers(raw=raw), NOW)


@pytest.mark.parametrize("name", HEADERS)
@given(data=st.data())
def test_a_changed_header_is_refused(name: str, data: st.DataObject) -> None:
    value = HEADERS[name]
    index = data.draw(st.integers(0, len(value) - 1))
    other = data.draw(st.characters(codec="latin-1").filter(lambda c: c != value[index]))
    with pytest.raises(KeyRefusedError):
        verify_headers(HEADERS | {name: value[:index] + other + value[index + 1 :]}, NOW)


@given(st.text(max_size=600), st.text(max_size=600), st.text(max_size=60))
def test_rubbish_is_refused(key: str, signature: str, timestamp: str) -> None:
    headers = {"flwr-public-key": key, "flwr-signature": signature, "flwr-timestamp": timestamp}
    with pytest.raises(KeyRefusedError):
        verify_headers(headers, NOW)


def test_the_key_of_another_is_refused() -> None:
    other = build_key().sign_headers(NOW)
    with pytest.raises(KeyRefusedError, match="does not fit"):
        verify_headers(HEADERS | {"flwr-signature": other["flwr-signature"]}, NOW)


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP521R1(), ec.SECP192R1()])
def test_another_curve_is_refused(curve: ec.EllipticCurve) -> None:
    with pytest.raises(KeyRefusedError, match="P-384"):
        verify_headers(build_key(curve).sign_headers(NOW), NOW)


def test_a_key_has_one_spelling() -> None:
    pem = KEY.public_pem + b"\n"
    headers = HEADERS | {"flwr-public-key": b64encode(pem).decode()}
    with pytest.raises(KeyRefusedError, match="canonical"):
        verify_headers(headers, NOW)


def test_a_header_has_one_spelling() -> None:
    name, letters = (
        "flwr-public-key",
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/",
    )
    value = HEADERS[name]
    assert value.endswith("=")  # so the last letter has bits that say nothing
    last = letters[letters.index(value[-2]) + 1]
    assert b64decode(f"{value[:-2]}{last}=") == KEY.public_pem
    with pytest.raises(KeyRefusedError, match="canonical"):
        verify_headers(HEADERS | {name: f"{value[:-2]}{last}="}, NOW)


def test_a_fingerprint_is_short_and_of_the_key() -> None:
    assert len(fingerprint(KEY.public_pem)) == 36
    assert fingerprint(KEY.public_pem) == KEY.fingerprint != build_key().fingerprint
