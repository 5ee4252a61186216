"""The keys and certificates that portero makes by itself, and a look into those of others."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from portero_py.core.acme.ari import certificate_id
from portero_py.core.acme.schedule import Held
from portero_py.core.certificates import Certificate

#: id-pe-acmeIdentifier (RFC 8737, 6.1).
_ACME_IDENTIFIER: Final = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")


def new_key() -> bytes:
    """A fresh P-256 key, PEM, not encrypted."""
    return _pem(ec.generate_private_key(ec.SECP256R1()))


def tls_alpn_pair(name: str, key_authorization: str) -> tuple[bytes, bytes]:
    """The (chain, key) that answers a tls-alpn-01 challenge for `name`, PEM (RFC 8737, 3)."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ACME challenge")])
    now = datetime.now(UTC)
    # An OCTET STRING of 32 bytes in DER.
    shown = b"\x04\x20" + sha256(key_authorization.encode()).digest()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.UnrecognizedExtension(_ACME_IDENTIFIER, shown), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.PEM), _pem(key)


def held(certificate: Certificate) -> Held:
    """What the schedule needs to know of a certificate."""
    return Held(
        frozenset(certificate.names), certificate.not_before, certificate.not_after, certificate.fingerprint
    )


def renewal_id(chain_pem: bytes) -> str:
    """What the chain's leaf is called in renewal information, "" when it cannot be (RFC 9773, 4.1)."""
    return certificate_id(x509.load_pem_x509_certificate(chain_pem))


# Private


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
