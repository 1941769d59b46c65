"""Certificates: of a service's own hops, of the public port with a private CA, and the owner's own.

``ca.key`` is the whole private CA in one file: its key, then its roots (newest first), then the
certificates in which an older root vouches for a newer one. ``server.key`` is the key of the public
port followed by its chain. One file each, swapped in one step: a key never lies beside a
certificate that it does not fit. ``ca.crt`` and ``server.crt`` are public copies, made again from
them whenever they differ. To load: ``context.load_cert_chain(tls_dir / "server.key")``.
"""

import hashlib
import ipaddress
import re
import secrets
import shlex
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from zk0bot.errors import ConfigError
from zk0bot.files import locked, private_dir, write_text
from zk0bot.records import Record
from zk0bot.trust.private import make_private_dir

CA_CERT, CA_KEY = "ca.crt", "ca.key"
SERVER_CERT, SERVER_KEY = "server.crt", "server.key"
SECRET = "secret"
LOOPBACK_HOSTS = ("localhost", "127.0.0.1")
AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 90
RENEW_DAYS = 30
"""A certificate with fewer days left is made again."""
MAX_ROTATIONS = 3
"""A node that missed more rotations than this has to join again."""

_BACKDATED = timedelta(days=1)
"""Clocks differ: a clock that is hours behind is told so by the server, not by TLS."""
_PAST = datetime(2000, 1, 1, tzinfo=UTC)
_FUTURE = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
_DNS_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?")


class CertificateInfo(Record):
    """What is worth telling of a certificate."""

    names: list[str]
    """DNS names and addresses it is for."""
    issuer: str
    fingerprint: str
    """SHA-256 of its DER, in hex."""
    not_after: datetime

    def days_left(self, at: datetime) -> int:
        """Whole days from ``at`` until it expires; negative afterwards."""
        return (self.not_after - at) // timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class _Authority:
    """What is in ``ca.key``."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    roots: tuple[x509.Certificate, ...]
    """Self-signed, newest first; the first is of ``key``."""
    crosses: tuple[x509.Certificate, ...] = ()
    """Each new root's key under the root before it, newest first."""


def make_loopback(folder: Path) -> None:
    """Make ``ca.crt``, ``server.crt``, ``server.key`` and ``secret`` anew in ``folder`` (0700).

    For 127.0.0.1 and localhost, without end of validity: they live as long as the service. The
    CA's key is not kept. ``secret`` is 64 hex digits and a newline.
    """
    private_dir(folder)
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _sign_authority("zk0bot loopback", authority_key, (_PAST, _FUTURE), path_length=0)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _sign_server(
        key, LOOPBACK_HOSTS, (_PAST, _FUTURE), issuer=authority, issuer_key=authority_key
    )
    write_text(folder / CA_CERT, _pem(authority))
    write_text(folder / SERVER_CERT, _pem(certificate))
    write_text(folder / SERVER_KEY, _key_pem(key), mode=0o600)
    write_text(folder / SECRET, f"{secrets.token_hex(32)}\n", mode=0o600)


def ensure_authority(tls_dir: Path, at: datetime | None = None) -> None:
    """Make the private CA in ``tls_dir`` if there is none; repair ``ca.crt`` if it differs.

    Raises ConfigError naming ``ca.key`` when it is there and cannot be read as a CA.
    """
    make_private_dir(tls_dir)
    with locked(tls_dir):  # the gateway renews while an operator rotates
        _ensure_authority(tls_dir, at or datetime.now(UTC))


def ensure_certificate(tls_dir: Path, hosts: Sequence[str], at: datetime | None = None) -> bool:
    """Have a certificate for ``hosts``, localhost and 127.0.0.1; True when it was made now.

    Made again when names differ, fewer than RENEW_DAYS are left, or it is not of the newest CA.
    Needs ``ensure_authority`` before. Raises ConfigError for a host that is neither a DNS name nor
    an address.
    """
    with locked(tls_dir):
        return _ensure_certificate(tls_dir, hosts, at or datetime.now(UTC))


def rotate_authority(tls_dir: Path, at: datetime | None = None) -> None:
    """Replace the CA's key; nodes that pin the CA before (or up to three before) still connect.

    ``ca.crt`` then holds the new root first and those before after it. The public certificate is
    made again for the same names, with the old root's word for the new one in its chain. The old
    key is gone.
    """
    moment = at or datetime.now(UTC)
    with locked(tls_dir):
        chain = _find_chain(tls_dir / SERVER_KEY)
        _save_authority(tls_dir, _succeed(_load_authority(tls_dir), moment))
        _ensure_certificate(tls_dir, _names(chain[0]) if chain else (), moment)
        _ensure_authority(tls_dir, moment)


def read_own_certificate(cert: Path, key: Path, at: datetime | None = None) -> CertificateInfo:
    """The certificate that the operator brings with ``--tls-cert`` and ``--tls-key``.

    Raises ConfigError naming the file: absent, not PEM, expired, a key that is encrypted, does not
    fit or can be read by others.
    """
    moment = at or datetime.now(UTC)
    certificate = _read_certificate(cert)
    private = _read_key(key)
    if private.public_key() != certificate.public_key():
        raise ConfigError(
            f"{key} is not the key of {cert}",
            hint="give the pair that belongs together; the server's certificate comes first in it",
        )
    info = _describe(certificate)
    if certificate.not_valid_after_utc <= moment:
        raise ConfigError(f"{cert} expired on {info.not_after:%Y-%m-%d}", hint="renew it")
    if certificate.not_valid_before_utc > moment:
        begins = f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        raise ConfigError(f"{cert} is valid from {begins} only", hint="check this machine's clock")
    return info


def read_own_authority(cert: Path) -> bytes | None:
    """The root in the operator's own chain, which nodes are to pin: its last certificate.

    None when that is not self-signed: then the certificates of the nodes' systems decide.
    Raises ConfigError naming the file when it is unreadable.
    """
    last = _read_chain(cert)[-1]
    try:
        last.verify_directly_issued_by(last)
    except (ValueError, TypeError, InvalidSignature):
        return None
    return _pem(last).encode("ascii")


def describe_certificate(path: Path) -> CertificateInfo:
    """Names, issuer and end of the first certificate in ``path``; ConfigError when unreadable."""
    return _describe(_read_certificate(path))


def ca_fingerprint(pem: bytes) -> bytes:
    """SHA-256 of the DER of the first certificate in ``pem``; ValueError when there is none."""
    return list_fingerprints(pem)[0]


def list_fingerprints(pem: bytes) -> list[bytes]:
    """SHA-256 of the DER of each certificate in ``pem``, in order; ValueError when none."""
    return [
        hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).digest()
        for certificate in x509.load_pem_x509_certificates(pem)
    ]


def pick_certificate(pem: bytes, index: int) -> bytes:
    """The PEM of the certificate at ``index`` in the bundle ``pem``, alone."""
    return _pem(x509.load_pem_x509_certificates(pem)[index]).encode("ascii")


def _ensure_authority(tls_dir: Path, at: datetime) -> None:
    if (tls_dir / CA_KEY).exists():
        authority = _load_authority(tls_dir)
    else:
        authority = _make_authority(at)
        _save_authority(tls_dir, authority)
    _write_if_new(tls_dir / CA_CERT, _pem(*authority.roots))


def _ensure_certificate(tls_dir: Path, hosts: Sequence[str], at: datetime) -> bool:
    authority = _load_authority(tls_dir)
    names = _normalise((*hosts, *LOOPBACK_HOSTS))
    chain = _find_chain(tls_dir / SERVER_KEY)
    is_fresh = bool(chain) and _is_fresh(chain[0], names, authority, at)
    if not is_fresh:
        chain = _make_certificate(tls_dir, names, authority, at)
    _write_if_new(tls_dir / SERVER_CERT, _pem(*chain))
    return not is_fresh


def _succeed(old: _Authority, at: datetime) -> _Authority:
    """A new key that the old one vouches for."""
    new = _make_authority(at)
    cross = _sign_authority(
        _common_name(new.roots[0]),
        new.key,
        _lifetime(at, AUTHORITY_DAYS),
        path_length=MAX_ROTATIONS,
        issuer=old.roots[0],
        issuer_key=old.key,
    )
    return _Authority(
        key=new.key,
        roots=(*new.roots, *old.roots)[: MAX_ROTATIONS + 1],
        crosses=(cross, *old.crosses)[:MAX_ROTATIONS],
    )


def _make_authority(at: datetime) -> _Authority:
    key = ec.generate_private_key(ec.SECP384R1())
    name = f"zk0bot CA {secrets.token_hex(4)}"
    root = _sign_authority(name, key, _lifetime(at, AUTHORITY_DAYS), path_length=MAX_ROTATIONS)
    return _Authority(key=key, roots=(root,))


def _save_authority(tls_dir: Path, authority: _Authority) -> None:
    text = _key_pem(authority.key) + _pem(*authority.roots, *authority.crosses)
    write_text(tls_dir / CA_KEY, text, mode=0o600)


def _load_authority(tls_dir: Path) -> _Authority:
    path = tls_dir / CA_KEY
    text = path.read_bytes()
    hint = "restore it from a copy; with it gone, all nodes have to join again"
    try:
        key = serialization.load_pem_private_key(text, password=None)
        certificates = x509.load_pem_x509_certificates(text)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{path} is damaged: no certificate authority in it", hint=hint) from None
    roots = tuple(one for one in certificates if one.subject == one.issuer)
    crosses = tuple(one for one in certificates if one.subject != one.issuer)
    is_pair = roots and roots[0].public_key() == key.public_key()
    if not is_pair or not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is damaged: its key and certificate do not fit", hint=hint)
    return _Authority(key=key, roots=roots, crosses=crosses)


def _make_certificate(
    tls_dir: Path, names: frozenset[str], authority: _Authority, at: datetime
) -> list[x509.Certificate]:
    key = ec.generate_private_key(ec.SECP384R1())
    leaf = _sign_server(
        key,
        sorted(names),
        _lifetime(at, CERTIFICATE_DAYS),
        issuer=authority.roots[0],
        issuer_key=authority.key,
    )
    chain = [leaf, *authority.crosses]
    write_text(tls_dir / SERVER_KEY, _key_pem(key) + _pem(*chain), mode=0o600)
    return chain


def _find_chain(path: Path) -> list[x509.Certificate]:
    """The certificates beside the key in ``path``; none when it is absent or damaged."""
    try:
        text = path.read_bytes()
        serialization.load_pem_private_key(text, password=None)
        return x509.load_pem_x509_certificates(text)
    except (FileNotFoundError, ValueError, TypeError):
        return []  # it is made again: only the CA is worth a complaint


def _is_fresh(
    leaf: x509.Certificate, names: frozenset[str], authority: _Authority, at: datetime
) -> bool:
    try:
        leaf.verify_directly_issued_by(authority.roots[0])
    except (ValueError, TypeError, InvalidSignature):
        return False
    days_left = (leaf.not_valid_after_utc - at) / timedelta(days=1)
    return frozenset(_names(leaf)) == names and RENEW_DAYS <= days_left <= CERTIFICATE_DAYS


def _normalise(hosts: Sequence[str]) -> frozenset[str]:
    return frozenset(str(_general_name(host).value) for host in hosts)


def _general_name(host: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass  # a name, then
    if not _DNS_NAME.fullmatch(host) or len(host) > 253:
        raise ConfigError(
            f"{host!r} is neither a host name nor an address",
            hint="give --public-host as arms.example.org or 192.0.2.7, without port; "
            "names in other scripts in their xn-- form",
        )
    return x509.DNSName(host.lower().rstrip("."))


def _sign_authority(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    lifetime: tuple[datetime, datetime],
    *,
    path_length: int,
    issuer: x509.Certificate | None = None,
    issuer_key: ec.EllipticCurvePrivateKey | None = None,
) -> x509.Certificate:
    """A CA's certificate over ``key``, self-signed unless there is an issuer."""
    signer = issuer_key or key
    usage = _key_usage(key_cert_sign=True, crl_sign=True)
    builder = _begin(name, key, lifetime, issuer.subject if issuer else _subject(name), signer)
    constraints = x509.BasicConstraints(ca=True, path_length=path_length)
    return (
        builder.add_extension(constraints, critical=True)
        .add_extension(usage, critical=True)
        .sign(signer, hashes.SHA384())
    )


def _sign_server(
    key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
    lifetime: tuple[datetime, datetime],
    *,
    issuer: x509.Certificate,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    server_auth = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    builder = _begin("zk0bot server", key, lifetime, issuer.subject, issuer_key)
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(server_auth, critical=False)
        .add_extension(names, critical=False)
        .sign(issuer_key, hashes.SHA384())
    )


def _begin(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    lifetime: tuple[datetime, datetime],
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.CertificateBuilder:
    subject_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(lifetime[0])
        .not_valid_after(lifetime[1])
        .add_extension(subject_id, critical=False)
        .add_extension(issuer_id, critical=False)
    )


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _common_name(certificate: x509.Certificate) -> str:
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def _lifetime(at: datetime, days: int) -> tuple[datetime, datetime]:
    return at - _BACKDATED, at + timedelta(days=days)


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    kinds = (x509.DNSName, x509.IPAddress)
    return [str(name.value) for name in extension.value if isinstance(name, kinds)]


def _describe(certificate: x509.Certificate) -> CertificateInfo:
    return CertificateInfo(
        names=_names(certificate),
        issuer=certificate.issuer.rfc4514_string(),
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        not_after=certificate.not_valid_after_utc,
    )


def _read_certificate(path: Path) -> x509.Certificate:
    return _read_chain(path)[0]


def _read_chain(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError:
        raise ConfigError(f"{path} holds no certificate in PEM") from None


def _read_key(path: Path) -> PrivateKeyTypes:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if mode & 0o037:  # a group may read: certificate tools keep keys so for their service
        raise ConfigError(
            f"{path} has mode {mode:04o}: other accounts can read or change this private key",
            hint=f"chmod 600 {shlex.quote(str(path))}",
        )
    try:
        return serialization.load_pem_private_key(text, password=None)
    except TypeError:
        hint = f"openssl pkey -in {shlex.quote(str(path))} -out plain.key"
        raise ConfigError(f"{path} is encrypted with a password", hint=hint) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{path} holds no private key in PEM") from None


def _write_if_new(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        write_text(path, text)


def _pem(*certificates: x509.Certificate) -> str:
    parts = [one.public_bytes(serialization.Encoding.PEM) for one in certificates]
    return b"".join(parts).decode("ascii")


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode("ascii")
