"""Certificates of kinds that portero's own makers never make."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ssl import DER_cert_to_PEM_cert

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtensionOID

from portero_py.demo.self_signed import KeyPair

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey


def odd_name(name: str) -> KeyPair:
    """One that lists nothing but an x400Address, which the library does not know."""
    x400 = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, bytes.fromhex("3002a300"))
    return signed(name, ec.SECP256R1(), x400)


def odd_version(name: str) -> KeyPair:
    """One of a version that does not exist."""
    pair = signed(name, ec.SECP256R1())
    der = x509.load_pem_x509_certificate(pair.chain_pem).public_bytes(Encoding.DER)
    pem = DER_cert_to_PEM_cert(der.replace(bytes.fromhex("a003020102"), bytes.fromhex("a003020107")))
    return KeyPair(pem.encode(), pair.key_pem)


def signed(name: str, key: Key | ec.EllipticCurve, listed: x509.ExtensionType | None = None) -> KeyPair:
    """A self-signed certificate for `name`, with this key or with one on this curve."""
    if isinstance(key, ec.EllipticCurve):
        key = ec.generate_private_key(key)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(listed or x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    )
    is_edwards = isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    made = builder.sign(key, None if is_edwards else hashes.SHA256())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return KeyPair(made.public_bytes(Encoding.PEM), pem)
