"""The name that a certificate has in renewal information (RFC 9773, 4.1)."""

from __future__ import annotations

from base64 import urlsafe_b64encode

from cryptography import x509
from cryptography.x509.oid import ExtensionOID


def certificate_id(certificate: x509.Certificate) -> str:
    """base64url(authority key identifier) "." base64url(serial number, as DER has it); "" without the first.

    A serial number whose first bit is set has a zero byte before it in DER, and here too.
    """
    try:
        extension = certificate.extensions.get_extension_for_oid(ExtensionOID.AUTHORITY_KEY_IDENTIFIER)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return ""
    authority = extension.value
    assert isinstance(authority, x509.AuthorityKeyIdentifier)
    if authority.key_identifier is None:
        return ""
    serial = certificate.serial_number
    return f"{_text(authority.key_identifier)}.{_text(serial.to_bytes(serial.bit_length() // 8 + 1))}"


# Private


def _text(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()
