"""A certificate authority for tests: real chains, real keys, one second to make."""

from __future__ import annotations

import datetime as dt
import ssl
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Pair:
    """A certificate with its chain, and its key, both PEM."""

    chain: bytes
    key: bytes

    def write(self, folder: Path) -> Path:
        """Write fullchain.pem and privkey.pem into `folder`, each moved into place."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in (("privkey.pem", self.key), ("fullchain.pem", self.chain)):
            part = folder / f".{name}.part"
            part.touch(0o600)
            part.write_bytes(data)
            part.rename(folder / name)
        return folder

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the leaf, as `tls_fingerprint` has it."""
        return x509.load_pem_x509_certificate(self.chain).fingerprint(hashes.SHA256()).hex()

    @property
    def serial(self) -> int:
        """The leaf's serial number."""
        return x509.load_pem_x509_certificate(self.chain).serial_number


class Authority:
    """Signs leaf certificates; `pem` is its own."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "portero-py test authority")])
        self._certificate = (
            self._builder(self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = self._certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, *names: str) -> Pair:
        """A new leaf for DNS names and IP addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        leaf = (
            self._builder(subject, key.public_key())
            .add_extension(
                x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        return Pair(
            leaf.public_bytes(serialization.Encoding.PEM) + self.pem,
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )

    # Private

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=30))
        )


def server_context(folder: Path) -> ssl.SSLContext:
    """What a TLS backend presents."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "fullchain.pem", folder / "privkey.pem")
    return context


def client_context(authority_pem: bytes, *alpn: str) -> ssl.SSLContext:
    """A verifying client that offers `alpn`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority_pem.decode())
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


def threaded_client_context(authority_pem: bytes, *alpn: str) -> ssl.SSLContext:
    """The same for a client that reads in one thread while it writes in another: without TLS 1.3.

    `websockets.sync.client` does so, and the `ssl` module lets both into OpenSSL at once. A TLS 1.3 server
    sends its tickets after the handshake: when one is read while the request is written, the request never
    leaves, and the client waits until its time is up. On two busy cores that was one connection in 150,
    with any server; in 10,000 over TLS 1.2, whose tickets are part of the handshake, there was none.
    """
    context = client_context(authority_pem, *alpn)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


# Private


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)
