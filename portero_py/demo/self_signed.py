"""Certificates without an authority, for `portero-py demo` and for tests. Browsers warn about them, rightly.

`Authority` is a certificate authority that lives as long as the process does: its key is never written, so
nobody can misuse it afterwards, even where its certificate was imported as trusted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

#: Clocks differ: what was made a moment ago is already valid everywhere.
_BACKDATED: Final = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A chain (PEM, leaf first) and the leaf's private key (PEM, not encrypted)."""

    chain_pem: bytes
    key_pem: bytes = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Lower-case hex SHA-256 of the leaf, as `tls_fingerprint` wants it."""
        return x509.load_pem_x509_certificate(self.chain_pem).fingerprint(hashes.SHA256()).hex()

    def write(self, folder: Path) -> None:
        """Write `privkey.pem` (0600) and `fullchain.pem` into `folder`, each renamed into place."""
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "privkey.pem", self.key_pem, 0o600)
        _replace(folder / "fullchain.pem", self.chain_pem, 0o644)


class Authority:
    """A certificate authority in memory; `pem` is its certificate, to be trusted by clients."""

    def __init__(self, common_name: str = "portero-py demo authority", *, days: float = 365) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name(common_name), self._key.public_key(), _name(common_name), days)
        self._certificate = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(sign_certificates=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = self._certificate.public_bytes(Encoding.PEM)

    def issue(self, *names: str, days: float = 90) -> KeyPair:
        """Make a certificate for host names, wildcards and IP addresses; `days` may be negative (expired)."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name(names[0]), key.public_key(), self._certificate.subject, days)
        # Without it Python 3.13 and other strict clients refuse the certificate (RFC 5280, 4.2.1.1).
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
        )
        leaf = _leaf(builder, names).sign(self._key, hashes.SHA256())
        return KeyPair(leaf.public_bytes(Encoding.PEM) + self.pem, _key_pem(key))


def self_signed(*names: str, days: float = 90) -> KeyPair:
    """Make one certificate that nobody vouches for: its own issuer."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name(names[0]), key.public_key(), _name(names[0]), days)
    return KeyPair(_leaf(builder, names).sign(key, hashes.SHA256()).public_bytes(Encoding.PEM), _key_pem(key))


# Private


def _name(common_name: str) -> x509.Name:
    # A common name has at most 64 characters (RFC 5280); the names that count are in subjectAltName.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, issuer: x509.Name, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    end = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - _BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _leaf(builder: x509.CertificateBuilder, names: tuple[str, ...]) -> x509.CertificateBuilder:
    return (
        builder.add_extension(
            x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _replace(path: Path, content: bytes, mode: int) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    fresh.replace(path)
