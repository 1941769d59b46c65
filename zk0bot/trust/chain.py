"""Lines that hang together: each holds the hash of the one before and is signed with Ed25519.

A line is one JSON object, written in exactly one way (field order, no spaces, ASCII), so that
there is no second spelling of the same event.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ValidationError

from zk0bot.errors import ConfigError
from zk0bot.records import Record

Value = str | int | float | bool | None
MAX_LINE = 256 * 1024
"""Bytes; no line that is written comes near it."""
_LINE_DOMAIN = b"zk0bot audit line 1\n"
_HEAD_DOMAIN = b"zk0bot audit head 1\n"
_MARK = re.compile(r"([0-9]{1,15}):([0-9a-f]{64})")


@dataclass(frozen=True, kw_only=True)
class Mark:
    """The place of one line and the hash of all up to it; 0 and zeros: before the first."""

    seq: int
    hash: str

    @classmethod
    def parse(cls, text: str) -> "Mark":
        """The mark that ``str`` gave. Raises ConfigError."""
        found = _MARK.fullmatch(text.strip().lower())
        if found is None:
            raise ConfigError(
                f"{text!r} is not the head of an audit log",
                hint="it is SEQ:HASH as zk0bot audit verify prints it",
            )
        return cls(seq=int(found[1]), hash=found[2])

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"


START = Mark(seq=0, hash="0" * 64)


class AuditEvent(Record):
    """One line of an audit log."""

    seq: int
    at: str
    """UTC, ISO 8601 with microseconds and ``Z``."""
    event: str
    actor: str
    details: dict[str, Value]
    prev: str
    """Hash of the line before."""
    hash: str
    """SHA-256, in hex, of the fields above as they are written."""
    sig: str
    """Ed25519 over the hash, in hex."""

    @property
    def mark(self) -> Mark:
        return Mark(seq=self.seq, hash=self.hash)

    def to_line(self) -> bytes:
        """The line in the file, with its end."""
        return _encode(self.model_dump()) + b"\n"


def seal(
    key: Ed25519PrivateKey,
    after: Mark,
    *,
    at: str,
    event: str,
    actor: str,
    details: Mapping[str, Value],
) -> AuditEvent:
    """The line that follows on ``after``."""
    body: dict[str, Any] = {
        "seq": after.seq + 1, "at": at, "event": event, "actor": actor, "details": dict(details),
        "prev": after.hash,
    }  # fmt: skip
    digest = hashlib.sha256(_encode(body)).digest()
    signature = key.sign(_LINE_DOMAIN + digest)
    return AuditEvent(**body, hash=digest.hex(), sig=signature.hex())


def find_event(line: bytes) -> AuditEvent | None:
    """The event of a line; None unless it is written exactly as ``to_line`` does."""
    try:
        event = AuditEvent.model_validate(json.loads(line.decode("ascii")), strict=True)
    except (ValueError, RecursionError, ValidationError):
        return None
    return event if event.to_line() == line else None


def find_problem(event: AuditEvent, after: Mark, public: Ed25519PublicKey) -> str:
    """Why ``event`` does not follow on ``after``; empty when it does."""
    if event.seq != after.seq + 1:
        return f"is number {event.seq}, where number {after.seq + 1} belongs"
    if event.prev != after.hash:
        return "does not follow on the line before it"
    if not has_own_hash(event):
        return "was changed after it was written"
    if not _is_signed(public, event.sig, _LINE_DOMAIN + bytes.fromhex(event.hash)):
        return "has no signature of this log's key"
    return ""


def has_own_hash(event: AuditEvent) -> bool:
    """Whether the hash of an event is that of its content."""
    body = event.model_dump(exclude={"hash", "sig"})
    return hashlib.sha256(_encode(body)).hexdigest() == event.hash


def follow(lines: Iterable[bytes], public: Ed25519PublicKey, after: Mark) -> tuple[Mark, str]:
    """The last mark that ``lines`` lead to from ``after``, and why they lead no further, if so."""
    for line in lines:
        event = find_event(line)
        problem = find_problem(event, after, public) if event else "cannot be read"
        if event is None or problem:
            return after, problem
        after = event.mark
    return after, ""


def build_head(key: Ed25519PrivateKey, mark: Mark) -> bytes:
    """The content of ``head.json``: a signed mark."""
    signature = key.sign(_HEAD_DOMAIN + str(mark).encode())
    return _encode({"seq": mark.seq, "hash": mark.hash, "sig": signature.hex()}) + b"\n"


def find_head(content: bytes, public: Ed25519PublicKey) -> Mark | None:
    """The mark in a ``head.json``; None unless the log's writer made exactly this content."""
    try:
        fields = json.loads(content.decode("ascii"))
        mark = Mark.parse(f"{fields['seq']}:{fields['hash']}")
        signature = str(fields["sig"])
    except (ValueError, TypeError, KeyError, RecursionError, ConfigError):
        return None
    again = _encode({"seq": mark.seq, "hash": mark.hash, "sig": signature}) + b"\n"
    is_signed = _is_signed(public, signature, _HEAD_DOMAIN + str(mark).encode())
    return mark if again == content and is_signed else None


def find_private_key(pem: bytes) -> Ed25519PrivateKey | None:
    """The key in ``signing.key``; None when it holds none."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, Ed25519PrivateKey) else None


def find_public_key(pem: bytes) -> Ed25519PublicKey | None:
    """The key in ``signing.pub``; None unless the content is exactly what ``to_public_pem`` is."""
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, Ed25519PublicKey) and to_public_pem(key) == pem else None


def to_private_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def to_public_pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _is_signed(public: Ed25519PublicKey, signature: str, data: bytes) -> bool:
    try:
        raw = bytes.fromhex(signature)
        public.verify(raw, data)
    except (ValueError, InvalidSignature):
        return False
    return raw.hex() == signature  # one spelling only


def _encode(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
