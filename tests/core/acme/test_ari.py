"""The name of a certificate in renewal information, against RFC 9773's own example."""

from __future__ import annotations

import datetime as dt

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from portero_py.core.acme.ari import certificate_id

KEY = ec.generate_private_key(ec.SECP256R1())


def certificate(serial: int, authority: x509.AuthorityKeyIdentifier | None) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "example")])
    start = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(KEY.public_key())
        .serial_number(serial)
        .not_valid_before(start)
        .not_valid_after(start + dt.timedelta(days=1))
    )
    if authority is not None:
        builder = builder.add_extension(authority, critical=False)
    return builder.sign(KEY, hashes.SHA256())


def test_the_example_of_the_rfc() -> None:
    # RFC 9773, 4.1: the key identifier and the serial number of its certificate, and what they become.
    known = bytes.fromhex("69885b6b87464041e1b37b847ba0ae2cde01c8d4")
    authority = x509.AuthorityKeyIdentifier(known, None, None)
    assert certificate_id(certificate(0x87654321, authority)) == "aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE"


@pytest.mark.parametrize(("serial", "text"), [(1, "AQ"), (0x7F, "fw"), (0x80, "AIA"), (0xFF00, "AP8A")])
def test_the_serial_number_is_as_der_has_it(serial: int, text: str) -> None:
    authority = x509.AuthorityKeyIdentifier(b"\xfb\xff", None, None)
    assert certificate_id(certificate(serial, authority)) == f"-_8.{text}"


def test_a_certificate_without_an_authority_has_no_name() -> None:
    assert certificate_id(certificate(1, None)) == ""


def test_an_authority_without_a_key_identifier_has_no_name() -> None:
    issuer = x509.DirectoryName(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ca")]))
    assert certificate_id(certificate(1, x509.AuthorityKeyIdentifier(None, [issuer], 5))) == ""
