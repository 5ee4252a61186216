"""What makes a pair of PEM files fit to be served: chain and key become a `Certificate`, or BadCertificate.

The rules
- The first certificate of the chain is the leaf, and the private key is its key. So a pair that was read
  while it was being replaced (new chain, old key) is refused, and so is a chain in the wrong order.
- A PEM block without its END line is a file that is still being written: refused.
- Parsing a pair ends in a certificate or in BadCertificate, whatever a library makes of it: one odd pair
  does no harm to the others.
- What only makes some clients fail (expired, a missing intermediate, names that do not cover the
  folder's) is a warning (`Certificate.complaints`): an operator who put it there is better served by a
  certificate that complains than by none.

Only who reads files needs this, and the library that it takes (12 MB): a worker is given what was parsed.
"""

from __future__ import annotations

import re
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtensionOID, NameOID

from portero_py.core.certificates import Certificate
from portero_py.core.names import normalise_service_name
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

_BLOCK: Final = re.compile(
    rb"-----BEGIN ([A-Z0-9 ]{1,40})-----[ \t]*\r?\n[A-Za-z0-9+/=\s:,-]*?-----END \1-----", re.ASCII
)
_KEY_LABELS: Final = frozenset(
    {b"PRIVATE KEY", b"RSA PRIVATE KEY", b"EC PRIVATE KEY", b"ENCRYPTED PRIVATE KEY"}
)
_CERTIFICATE_LABELS: Final = frozenset({b"CERTIFICATE", b"X509 CERTIFICATE"})


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
