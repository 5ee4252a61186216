"""Certificates: what makes a pair of PEM files fit to be served, and which one a client gets.

The rules of fitness
- The first certificate of the chain is the leaf, and the private key is its key. So a pair that was read
  while it was being replaced (new chain, old key) is refused, and so is a chain in the wrong order.
- A PEM block without its END line is a file that is still being written: refused.
- Parsing a pair ends in a certificate or in BadCertificate, whatever a library makes of it: one odd pair
  does no harm to the others.
- What only makes some clients fail (expired, a missing intermediate, names that do not cover the
  folder's) is a warning: an operator who put it there is better served by a certificate that complains
  than by none.

The rules of choice, for the name that a client sends (SNI)
  1. the folder of that name, whatever its certificate says: the operator decided;
  2. a certificate that lists the name;
  3. a wildcard (folder, then certificate) over it: the star stands for exactly one label (RFC 6125,
  6.4.3);
  4. the default: the first folder in sorted order ("*" sorts before digits and letters).

Names here are lower-case and without a trailing dot; IP addresses are in their shortest spelling.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtensionOID, NameOID

from portero_py.core.names import normalise_host, normalise_service_name, wildcard_over
from portero_py.errors import BadCertificate

#: OpenSSL's default security level refuses shorter ones.
MIN_RSA_BITS: Final = 2048
#: Longer ones cost a handshake tens of milliseconds, and OpenSSL has a limit.
MAX_ORDINARY_RSA_BITS: Final = 8192
#: More than any real chain; a CA bundle put here by mistake has 140.
MAX_CHAIN: Final = 16

_GOOD_CURVES: Final = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_GOOD_HASHES: Final = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
#: pyo3's, which cannot be imported.
_PANIC: Final = "PanicException"

_UNDERSCORE_WILDCARD: Final = "_wildcard."
_BLOCK: Final = re.compile(
    rb"-----BEGIN ([A-Z0-9 ]{1,40})-----[ \t]*\r?\n[A-Za-z0-9+/=\s:,-]*?-----END \1-----", re.ASCII
)
_KEY_LABELS: Final = frozenset(
    {b"PRIVATE KEY", b"RSA PRIVATE KEY", b"EC PRIVATE KEY", b"ENCRYPTED PRIVATE KEY"}
)
_CERTIFICATE_LABELS: Final = frozenset({b"CERTIFICATE", b"X509 CERTIFICATE"})


@dataclass(frozen=True, slots=True)
class Certificate:
    """A chain and its key, parsed and checked, ready to be served.

    name         the folder's name, normalised: "app.example" or "*.example.com"
    chain_pem    the certificates, leaf first; nothing else
    key_pem      the leaf's private key, not encrypted; never shown
    names        what the leaf lists (DNS names, wildcards, IP addresses)
    not_before, not_after   epoch seconds
    fingerprint  lower-case hex SHA-256 of the leaf (DER)
    issuer       of the leaf, for people
    chain_length number of certificates in `chain_pem`
    self_signed  issuer and subject of the leaf are the same
    origin       the file or folder that it came from, for people
    """

    name: str
    chain_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)
    names: tuple[str, ...]
    not_before: float
    not_after: float
    fingerprint: str
    issuer: str
    chain_length: int
    self_signed: bool
    origin: str

    def covers(self, host: str) -> bool:
        """Say whether it stands for `host` (normalised): by its folder's name or by what it lists."""
        wildcard = wildcard_over(host)
        return any(name in (self.name, *self.names) for name in (host, wildcard) if name)

    def same_bytes(self, other: Certificate) -> bool:
        """Say whether both put the same bytes on the wire."""
        return self.chain_pem == other.chain_pem and self.key_pem == other.key_pem

    def complaints(self, now: float) -> list[str]:
        """Say what some clients will not like about it at `now` (epoch seconds); empty when all is well."""
        found = []
        if now >= self.not_after:
            found.append("it has expired")
        elif now < self.not_before:
            found.append("it is not valid yet")
        if not self.names:
            found.append("it lists no names (subjectAltName), which every browser refuses")
        elif self.name not in self.names and wildcard_over(self.name) not in self.names:
            found.append(f"it is not for {self.name} but for {', '.join(self.names[:5])}")
        if self.chain_length == 1 and not self.self_signed:
            found.append("it has no intermediate certificate (is it a fullchain?), which many clients refuse")
        return found


class CertificateTable:
    """An immutable, versioned set of certificates; finding one costs a few dictionary look-ups.

    Two certificates never have the same `name`. The order given does not matter: it is by name.
    """

    __slots__ = ("_by_listed", "_by_name", "certificates", "version")

    def __init__(self, certificates: Iterable[Certificate] = (), version: int = 0) -> None:
        ordered = sorted(certificates, key=lambda certificate: certificate.name)
        by_listed: dict[str, Certificate] = {}
        for certificate in ordered:
            for name in certificate.names:
                # Of several that list a name, the one that serves longest: the others are leftovers.
                rival = by_listed.get(name)
                if rival is None or certificate.not_after > rival.not_after:
                    by_listed[name] = certificate
        self._by_name = {certificate.name: certificate for certificate in ordered}
        self._by_listed = by_listed
        self.certificates = tuple(ordered)
        self.version = version

    @property
    def default(self) -> Certificate | None:
        """The one for clients that name none or an unknown one."""
        return self.certificates[0] if self.certificates else None

    def get(self, name: str) -> Certificate | None:
        """Return the certificate of the folder `name`, or None."""
        return self._by_name.get(name)

    def find(self, host: str) -> Certificate | None:
        """Return the certificate that covers `host` (normalised), or None."""
        found = self._by_name.get(host) or self._by_listed.get(host)
        if found is None:
            wildcard = wildcard_over(host)
            found = self._by_name.get(wildcard) or self._by_listed.get(wildcard)
        return found

    def select(self, sni: str | None) -> Certificate | None:
        """Return the certificate to present to a client that sent `sni`, in any case, or none, or garbage.

        None only when the table is empty.
        """
        found = self.find(sni.lower().removesuffix(".")) if sni else None
        return found or self.default

    def misdirected(self, presented: Certificate, host: str) -> bool:
        """Say whether a request for `host` came over a connection made for another (RFC 9110, 15.5.20).

        True when `presented` does not cover `host` though another certificate does: the client should
        connect again. False when nobody covers it: that would end in the same certificate.
        """
        return not presented.covers(host) and self.find(host) is not None


def folder_name(raw: str) -> str | None:
    """The name that a folder (or a combined file without its ".pem") stands for, or None.

    "App.Example" -> "app.example"; "_wildcard.example.com" and "*.example.com" -> "*.example.com".
    """
    if raw.lower().startswith(_UNDERSCORE_WILDCARD):
        raw = f"*.{raw[len(_UNDERSCORE_WILDCARD) :]}"
    return normalise_service_name(raw)


def server_name(sni: str | None) -> str:
    """The host name in a ClientHello, normalised; "" when there is none, or when it is no name at all.

    OpenSSL passes whatever the client sent, as it was spelled. An IP address is not allowed (RFC 6066, 3),
    and neither is a port, but an IPv4 address cannot be told from a name and does no harm.
    """
    if not sni or ":" in sni:
        return ""
    return normalise_host(sni) or ""


def parse_pair(name: str, chain: bytes, key: bytes, origin: str) -> Certificate:
    """Parse a chain and its key, and check that they can be served together.

    `chain` and `key` are the bytes of the files; for a combined file both are the whole of it.
    Raises BadCertificate, and nothing else, with the reason in words that fit behind "cannot be used: ".
    """
    try:
        return _pair(name, chain, key, origin)
    except BadCertificate:
        raise
    except BaseException as error:
        # cryptography raises more than it documents (UnsupportedGeneralNameType, InvalidVersion, ValueError
        # for a date, ...), often only when a part is asked for. A panic of its Rust is no Exception even.
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        raise BadCertificate(f"the certificate cannot be parsed ({type(error).__name__})") from error


def is_ordinary(certificate: Certificate) -> bool:
    """Say whether every OpenSSL serves such a pair, and every client takes it: it need not be tried.

    That is ECDSA on P-256, P-384 or P-521, or RSA of a length that is not absurd, with SHA-2 in every
    signature of the chain.
    """
    chain = x509.load_pem_x509_certificates(certificate.chain_pem)
    key = chain[0].public_key()
    try:
        if not all(isinstance(each.signature_hash_algorithm, _GOOD_HASHES) for each in chain):
            return False
    except (UnsupportedAlgorithm, ValueError):
        return False
    if isinstance(key, rsa.RSAPublicKey):
        return key.key_size <= MAX_ORDINARY_RSA_BITS
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _GOOD_CURVES)


# Private


def _pair(name: str, chain: bytes, key: bytes, origin: str) -> Certificate:
    chain_blocks = _blocks(chain, _CERTIFICATE_LABELS, "certificate")
    key_blocks = _blocks(key, _KEY_LABELS, "private key")
    if len(key_blocks) > 1:
        raise BadCertificate("it holds several private keys; one is wanted")
    if len(chain_blocks) > MAX_CHAIN:
        raise BadCertificate(f"the chain has {len(chain_blocks)} certificates; is it a CA bundle?")
    certificates = [_parse_certificate(block) for block in chain_blocks]
    leaf = certificates[0]
    public_key = _public_bytes_of_key(key_blocks[0])
    if _public_bytes(leaf) != public_key:
        if any(_public_bytes(other) == public_key for other in certificates[1:]):
            raise BadCertificate("the chain is in the wrong order: the key's own certificate must come first")
        raise BadCertificate(
            "the private key does not belong to the certificate (was half of the pair replaced?)"
        )
    return Certificate(
        name=name,
        chain_pem=b"\n".join(chain_blocks) + b"\n",
        key_pem=key_blocks[0] + b"\n",
        names=_listed_names(leaf),
        not_before=leaf.not_valid_before_utc.timestamp(),
        not_after=leaf.not_valid_after_utc.timestamp(),
        fingerprint=leaf.fingerprint(hashes.SHA256()).hex(),
        issuer=_issuer(leaf),
        chain_length=len(chain_blocks),
        self_signed=leaf.issuer == leaf.subject,
        origin=origin,
    )


def _blocks(pem: bytes, labels: frozenset[bytes], what: str) -> list[bytes]:
    if not pem.strip():
        raise BadCertificate(f"the {what} file is empty")
    found = [match[0] for match in _BLOCK.finditer(pem) if match[1] in labels]
    begun = sum(pem.count(b"-----BEGIN %b-----" % label) for label in labels)
    if begun > len(found):
        raise BadCertificate(f"the {what} is incomplete or garbled (is it still being written?)")
    if not found:
        raise BadCertificate(f"there is no PEM {what} in it")
    return found


def _parse_certificate(block: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(block)
    except ValueError as error:
        raise BadCertificate("a certificate of the chain cannot be parsed") from error


def _public_bytes(certificate: x509.Certificate) -> bytes:
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadCertificate("a certificate of the chain has a key of an unknown kind") from error
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _public_bytes_of_key(block: bytes) -> bytes:
    try:
        key = load_pem_private_key(block, password=None)
    except TypeError as error:
        raise BadCertificate("the private key is encrypted; store it without a passphrase") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadCertificate("the private key cannot be parsed") from error
    if isinstance(key, rsa.RSAPrivateKey):
        if key.key_size < MIN_RSA_BITS:
            raise BadCertificate(f"its RSA key has {key.key_size} bits; {MIN_RSA_BITS} is the least")
    elif not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey):
        raise BadCertificate("its key is neither RSA nor ECDSA nor EdDSA")
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _listed_names(leaf: x509.Certificate) -> tuple[str, ...]:
    try:
        extension = leaf.extensions.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME)
    except x509.ExtensionNotFound:
        return ()
    listed = extension.value
    assert isinstance(listed, x509.SubjectAlternativeName)
    names = [normalise_service_name(name) for name in listed.get_values_for_type(x509.DNSName)]
    addresses = [str(address) for address in listed.get_values_for_type(x509.IPAddress)]
    # A name that no Host can be (a star within a label, say) covers nothing.
    return tuple(dict.fromkeys([*(name for name in names if name), *addresses]))


def _issuer(leaf: x509.Certificate) -> str:
    """Its name for people, whom whoever made the certificate may want to deceive: no control characters."""
    found = leaf.issuer.rfc4514_string()
    for oid in (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME):
        for attribute in leaf.issuer.get_attributes_for_oid(oid)[:1]:
            found = str(attribute.value)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in found)
