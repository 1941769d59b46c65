"""Join codes: one line that is whole or refused."""

import traceback
from base64 import urlsafe_b64encode
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zk0bot.errors import JoinCodeError
from zk0bot.trust.join_code import JoinCode, _checksum, is_address

CODE = JoinCode(
    server="arms.example.org:9092",
    trust="pinned",
    ca_fingerprint=bytes(range(32)),
    invite_id="0123456789ab",
    secret=b"0123456789abcdef",
)
TEXT = CODE.encode()
SERVERS = st.sampled_from(["a:1", "127.0.0.1:9092", "[2001:db8::1]:65535", "x-y.example.org:443"])


@given(SERVERS, st.booleans(), st.binary(min_size=32, max_size=32), st.binary(max_size=99))
def test_what_is_encoded_is_decoded(
    server: str, is_pinned: bool, digest: bytes, seed: bytes
) -> None:
    code = JoinCode(
        server=server,
        trust="pinned" if is_pinned else "system",
        ca_fingerprint=digest if is_pinned else b"",
        invite_id=seed.ljust(6, b"\0")[:6].hex(),
        secret=seed.rjust(16, b"\0")[-16:],
    )
    assert JoinCode.decode(f"  {code.encode()}\n") == code


@given(st.integers(0, len(TEXT) - 1), st.characters(codec="utf-8"))
def test_any_changed_character_is_refused(index: int, other: str) -> None:
    if other == TEXT[index]:
        return
    with pytest.raises(JoinCodeError):
        JoinCode.decode(TEXT[:index] + other + TEXT[index + 1 :])


@pytest.mark.parametrize("server", ["a:9092", "ab:9092", "abc:9092"])
def test_each_character_counts_whatever_bits_are_left_over_at_the_end(server: str) -> None:
    text = replace(CODE, server=server).encode()
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_= "
    for index in range(len(text)):
        for other in letters.replace(text[index], ""):
            with pytest.raises(JoinCodeError):
                JoinCode.decode(text[:index] + other + text[index + 1 :])


@given(st.integers(0, len(TEXT) - 1), st.integers(1, len(TEXT)))
def test_a_missing_part_is_refused(start: int, length: int) -> None:
    with pytest.raises(JoinCodeError):
        JoinCode.decode(TEXT[:start] + TEXT[start + length :])


@given(st.integers(0, len(TEXT) - 2))
def test_swapped_neighbours_are_refused(index: int) -> None:
    swapped = TEXT[:index] + TEXT[index + 1] + TEXT[index] + TEXT[index + 2 :]
    if swapped != TEXT:
        with pytest.raises(JoinCodeError):
            JoinCode.decode(swapped)


@given(st.text(max_size=300))
def test_rubbish_is_refused(text: str) -> None:
    with pytest.raises(JoinCodeError):
        JoinCode.decode(text)


@given(st.binary(max_size=120))
def test_a_fitting_checksum_does_not_make_rubbish_a_code(body: bytes) -> None:
    data = b"\x01" + body
    text = "zk0-" + urlsafe_b64encode(data + _checksum(data)).rstrip(b"=").decode()
    try:
        code = JoinCode.decode(text)
    except JoinCodeError:
        return
    assert code.encode() == text


def test_each_fault_has_its_own_message() -> None:
    newer = b"\x02" + b"whatever comes then"
    texts = [
        "https://example.org",
        TEXT[:-1],
        "zk0-" + urlsafe_b64encode(newer + _checksum(newer)).rstrip(b"=").decode(),
    ]
    messages = []
    for text in texts:
        with pytest.raises(JoinCodeError) as caught:
            JoinCode.decode(text)
        messages.append(caught.value.message)
    assert ["not a join code" in messages[0], "damaged" in messages[1]] == [True, True]
    assert "version 2" in messages[2]


@pytest.mark.parametrize("text", [TEXT[:-1], TEXT[4:], TEXT + "A", TEXT.lower()])
def test_no_part_of_a_code_is_in_what_is_said_about_it(text: str) -> None:
    with pytest.raises(JoinCodeError) as caught:
        JoinCode.decode(text)
    said = "".join(traceback.format_exception(caught.value)) + str(caught.value.to_dict())
    assert TEXT[8:20] not in said
    assert TEXT[8:20].lower() not in said


def test_the_secret_is_not_shown() -> None:
    assert "0123456789abcdef" not in repr(CODE)
    assert "0123456789abcdef" not in str(CODE)


@pytest.mark.parametrize("text", ["a:0", "a:65536", "a", ":1", "a b:1", "[::g]:1", "a..b:1", "a:x"])
def test_what_is_no_address_is_refused(text: str) -> None:
    assert not is_address(text)
    with pytest.raises(ValueError, match="HOST:PORT"):
        JoinCode(server=text, trust="system", invite_id="0" * 12, secret=b"0" * 16)
