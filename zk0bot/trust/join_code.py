"""One line of text that lets one node join: where, whom to trust there, and a secret.

``zk0-`` and URL-safe base64 of: version (1 byte), trust (1), invite id (6), secret (16), SHA-256
of the CA (32 when pinned, else none), HOST:PORT, and the first 4 bytes of the SHA-256 of all that.
"""

import hashlib
import ipaddress
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, field
from typing import Literal

from zk0bot.errors import JoinCodeError

PREFIX = "zk0-"
VERSION = 1
SECRET_BYTES = 16
MAX_CHARS = 512
MAX_ADDRESS_CHARS = 260

_TRUST: tuple[Literal["pinned", "system"], ...] = ("pinned", "system")
_INVITE_BYTES = 6
_DIGEST_BYTES = 32
_CHECKSUM_BYTES = 4
_FIXED_BYTES = 2 + _INVITE_BYTES + SECRET_BYTES
_ADDRESS = re.compile(
    r"(?:(?P<name>[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*)|\[(?P<ipv6>[0-9A-Fa-f:.]{2,45})\])"
    r":(?P<port>[0-9]{1,5})"
)
_HINT = "copy the whole line again, or make a new code: zk0bot server invite on the server machine"


@dataclass(frozen=True, kw_only=True)
class JoinCode:
    """What a join code says. The secret is not shown by ``repr``."""

    server: str
    """HOST:PORT of the gateway; an IPv6 address in brackets."""
    trust: Literal["pinned", "system"]
    ca_fingerprint: bytes = b""
    """SHA-256 of the server's CA, 32 bytes; empty where the system's certificates decide."""
    invite_id: str
    """12 hex digits."""
    secret: bytes = field(repr=False)
    """16 bytes."""

    def __post_init__(self) -> None:
        if not is_address(self.server):
            raise ValueError(f"{self.server!r} is not HOST:PORT")
        digest_bytes = _DIGEST_BYTES if self.trust == "pinned" else 0
        if len(self.ca_fingerprint) != digest_bytes or len(self.secret) != SECRET_BYTES:
            raise ValueError("fingerprint or secret of the wrong length")
        if not re.fullmatch(r"[0-9a-f]{12}", self.invite_id):
            raise ValueError("invite_id is not 12 hex digits")

    def encode(self) -> str:
        """The one line to paste. It holds the secret: show it, never log it."""
        body = (
            bytes((VERSION, _TRUST.index(self.trust)))
            + bytes.fromhex(self.invite_id)
            + self.secret
            + self.ca_fingerprint
            + self.server.encode("ascii")
        )
        return PREFIX + _to_text(body + _checksum(body))

    @classmethod
    def decode(cls, text: str) -> "JoinCode":
        """The join code in ``text``; white space around it is ignored.

        Raises JoinCodeError: not a join code, damaged, or of a newer zk0bot. The message never
        holds any of ``text``.
        """
        body = _read_body(text.strip())
        if body[0] != VERSION:
            raise JoinCodeError(
                f"this join code is of version {body[0]}; this zk0bot reads version {VERSION}",
                hint="install the zk0bot version that runs on the server: zk0bot version",
            )
        try:
            return _parse(body)
        except (ValueError, IndexError):
            raise _damaged() from None


def is_address(text: str) -> bool:
    """Whether ``text`` is HOST:PORT, an IPv6 address in brackets."""
    match = _ADDRESS.fullmatch(text)
    if match is None or not 1 <= int(match["port"]) <= 65535 or len(text) > MAX_ADDRESS_CHARS:
        return False
    try:
        return match["name"] is not None or ipaddress.ip_address(match["ipv6"]).version == 6
    except ValueError:
        return False


def _read_body(text: str) -> bytes:
    """Everything before the checksum, which fits."""
    if not text.startswith(PREFIX):
        raise JoinCodeError(f"this is not a join code: those begin with {PREFIX}", hint=_HINT)
    encoded = text.removeprefix(PREFIX)
    if len(text) > MAX_CHARS or not re.fullmatch(r"[A-Za-z0-9_-]+", encoded):
        raise _damaged()
    try:
        data = urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    except ValueError:
        raise _damaged() from None
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    is_canonical = _to_text(data) == encoded  # else the unused bits at the end could be changed
    if not body or not is_canonical or _checksum(body) != checksum:
        raise _damaged()
    return body


def _parse(body: bytes) -> JoinCode:
    trust = _TRUST[body[1]]
    digest_end = _FIXED_BYTES + (_DIGEST_BYTES if trust == "pinned" else 0)
    return JoinCode(
        server=body[digest_end:].decode("ascii"),
        trust=trust,
        ca_fingerprint=body[_FIXED_BYTES:digest_end],
        invite_id=body[2 : 2 + _INVITE_BYTES].hex(),
        secret=body[2 + _INVITE_BYTES : _FIXED_BYTES],
    )


def _damaged() -> JoinCodeError:
    return JoinCodeError(
        "this join code is damaged: a part of it is missing or changed", hint=_HINT
    )


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECKSUM_BYTES]


def _to_text(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode("ascii")
