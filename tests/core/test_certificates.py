"""Which pairs are fit to be served, and which one a client gets."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from portero_py.core.certificate_pairs import MAX_CHAIN, is_ordinary, parse_pair
from portero_py.core.certificates import Certificate, CertificateTable, folder_name, folder_of, server_name
from portero_py.demo.self_signed import Authority, KeyPair, self_signed
from portero_py.errors import BadCertificate

AUTHORITY = Authority()
PAIR = AUTHORITY.issue("app.example", "*.app.example", "192.0.2.1", "2001:db8:0::1")
OTHER = AUTHORITY.issue("other.example")

#: Object identifiers of one length, in DER.
SHA256_WITH_ECDSA = bytes.fromhex("06082a8648ce3d040302")
SHA224_WITH_ECDSA = bytes.fromhex("06082a8648ce3d040301")
UNKNOWN_SIGNATURE = bytes.fromhex("06082a8648ce3d04037f")


def parsed(pair: KeyPair = PAIR, name: str = "app.example") -> Certificate:
    return parse_pair(name, pair.chain_pem, pair.key_pem, "certs/app.example")


def certificate(name: str, *names: str, not_after: float = 2e9) -> Certificate:
    return replace(parsed(), name=name, names=names, not_after=not_after, fingerprint=f"{name} {not_after}")


def signed_by_hand(
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | dsa.DSAPrivateKey | ed25519.Ed25519PrivateKey,
    subject: list[x509.NameAttribute[str]] | None = None,
    extension: x509.ExtensionType | None = None,
) -> KeyPair:
    name = x509.Name(subject or [])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
    )
    if extension is not None:
        builder = builder.add_extension(extension, critical=False)
    made = builder.sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    form = PrivateFormat.TraditionalOpenSSL if isinstance(key, rsa.RSAPrivateKey) else PrivateFormat.PKCS8
    pem = key.private_bytes(Encoding.PEM, form, NoEncryption())
    return KeyPair(made.public_bytes(Encoding.PEM), pem)


# Fitness


def test_a_good_pair_is_taken_with_all_that_people_ask_about_it() -> None:
    found = parsed()
    assert found.names == ("app.example", "*.app.example", "192.0.2.1", "2001:db8::1")
    assert found.fingerprint == PAIR.fingerprint
    assert found.issuer == "portero-py demo authority"
    assert found.chain_length == 2
    assert not found.self_signed
    assert 89 * 86400 < found.not_after - found.not_before < 91 * 86400
    assert found.origin == "certs/app.example"


def test_the_key_is_never_shown() -> None:
    assert "PRIVATE" not in repr(parsed())
    assert "PRIVATE" not in repr(PAIR)


def test_a_combined_file_is_taken_apart_in_any_order() -> None:
    for combined in (PAIR.chain_pem + PAIR.key_pem, PAIR.key_pem + PAIR.chain_pem):
        found = parse_pair("app.example", combined, combined, "x")
        assert found.same_bytes(parsed())


def test_what_is_no_certificate_does_not_reach_openssl() -> None:
    parameters = b"-----BEGIN DH PARAMETERS-----\nMIGHAoGB\n-----END DH PARAMETERS-----\n"
    found = parse_pair("a.example", b"subject=x\n" + PAIR.chain_pem + parameters, PAIR.key_pem, "x")
    assert b"DH PARAMETERS" not in found.chain_pem
    assert b"subject" not in found.chain_pem


def test_files_with_carriage_returns_are_taken() -> None:
    chain, key = (pem.replace(b"\n", b"\r\n") for pem in (PAIR.chain_pem, PAIR.key_pem))
    assert parse_pair("a.example", chain, key, "x").fingerprint == PAIR.fingerprint


def test_rsa_and_traditional_keys_are_taken() -> None:
    pair = signed_by_hand(rsa.generate_private_key(65537, 2048))
    assert b"BEGIN RSA PRIVATE KEY" in pair.key_pem
    assert parsed(pair).fingerprint == pair.fingerprint


@pytest.mark.parametrize(
    ("chain", "key", "why"),
    [
        (b"", PAIR.key_pem, "certificate file is empty"),
        (PAIR.chain_pem, b" \n", "private key file is empty"),
        (b"hello\n", PAIR.key_pem, "no PEM certificate"),
        (PAIR.chain_pem, PAIR.chain_pem, "no PEM private key"),
        (PAIR.chain_pem[:-20], PAIR.key_pem, "certificate is incomplete"),
        (PAIR.chain_pem, PAIR.key_pem[:-20], "private key is incomplete"),
        (PAIR.chain_pem[:300] + PAIR.chain_pem, PAIR.key_pem, "certificate is incomplete"),
        (PAIR.chain_pem, OTHER.key_pem, "does not belong to the certificate"),
        (AUTHORITY.pem + PAIR.chain_pem, PAIR.key_pem, "wrong order"),
        (PAIR.chain_pem, PAIR.key_pem + OTHER.key_pem, "several private keys"),
        (PAIR.chain_pem + AUTHORITY.pem * MAX_CHAIN, PAIR.key_pem, "CA bundle"),
        (PAIR.chain_pem.replace(b"\nMII", b"\nMAI", 1), PAIR.key_pem, "chain cannot be parsed"),
        (PAIR.chain_pem, PAIR.key_pem.replace(b"\nM", b"\nA"), "private key cannot be parsed"),
    ],
)
def test_a_bad_pair_is_refused_with_the_reason(chain: bytes, key: bytes, why: str) -> None:
    with pytest.raises(BadCertificate, match=why):
        parse_pair("app.example", chain, key, "x")


def test_every_beginning_of_a_file_that_is_being_written_is_refused() -> None:
    whole = OTHER.key_pem + OTHER.chain_pem
    leaf_ends = whole.index(b"-----END CERTIFICATE-----") + len(b"-----END CERTIFICATE-----")
    for end in range(0, leaf_ends, 7):
        with pytest.raises(BadCertificate):
            parse_pair("other.example", whole[:end], whole[:end], "x")


def test_an_encrypted_key_is_refused_with_advice() -> None:
    key = load_pem_private_key(PAIR.key_pem, None)
    encrypted = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    with pytest.raises(BadCertificate, match="without a passphrase"):
        parse_pair("app.example", PAIR.chain_pem, encrypted, "x")


def test_keys_that_openssl_would_refuse_are_refused_here() -> None:
    with pytest.raises(BadCertificate, match="1024 bits"):
        parsed(signed_by_hand(rsa.generate_private_key(65537, 1024)))
    with pytest.raises(BadCertificate, match="neither RSA nor ECDSA nor EdDSA"):
        parsed(signed_by_hand(dsa.generate_private_key(1024)))


def test_a_leaf_key_of_an_unknown_kind_is_refused() -> None:
    # id-ecPublicKey (1.2.840.10045.2.1) becomes an algorithm that does not exist.
    leaf = x509.load_pem_x509_certificate(OTHER.chain_pem)
    der = leaf.public_bytes(Encoding.DER).replace(
        bytes.fromhex("2a8648ce3d0201"), bytes.fromhex("2a8648ce3d0279")
    )
    pem = x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
    with pytest.raises(BadCertificate, match="unknown kind"):
        parse_pair("other.example", pem, OTHER.key_pem, "x")


def test_a_leaf_whose_extensions_are_garbage_is_refused() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    garbage = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.17"), b"\x01\x02\x03")
    with pytest.raises(BadCertificate, match="cannot be parsed"):
        parsed(signed_by_hand(key, extension=garbage))


def test_the_issuer_is_its_common_name_or_organisation_or_all_of_it() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    oid = x509.NameOID
    country = x509.NameAttribute(oid.COUNTRY_NAME, "PT")
    organisation = x509.NameAttribute(oid.ORGANIZATION_NAME, "Example")
    assert parsed(signed_by_hand(key, [country])).issuer == "C=PT"
    assert parsed(signed_by_hand(key, [country, organisation])).issuer == "Example"
    assert parsed(signed_by_hand(key)).issuer == ""


@given(st.binary(max_size=400), st.binary(max_size=400))
def test_garbage_ends_in_bad_certificate_and_in_nothing_else(chain: bytes, key: bytes) -> None:
    wrapped = b"-----BEGIN CERTIFICATE-----\n" + chain + b"\n-----END CERTIFICATE-----\n"
    for pem in (chain, wrapped):
        with pytest.raises(BadCertificate):
            parse_pair("a.example", pem, key, "x")


def damaged(before: bytes, after: bytes) -> bytes:
    """The chain whose leaf has `after` where `before` was; nobody checks its signature here."""
    der = x509.load_pem_x509_certificate(OTHER.chain_pem).public_bytes(Encoding.DER)
    assert before in der
    return as_pem(der.replace(before, after))


def as_pem(der: bytes) -> bytes:
    lines = [base64.b64encode(der)[at : at + 64] for at in range(0, len(der) * 2, 64)]
    body = b"\n".join(line for line in lines if line)
    return b"-----BEGIN CERTIFICATE-----\n" + body + b"\n-----END CERTIFICATE-----\n"


def test_a_name_of_a_kind_that_the_library_does_not_know_is_that_certificate_s_own_trouble() -> None:
    x400 = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.17"), bytes.fromhex("3002a300"))
    with pytest.raises(BadCertificate, match="UnsupportedGeneralNameType"):
        parsed(signed_by_hand(ec.generate_private_key(ec.SECP256R1()), extension=x400))


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        (bytes.fromhex("a003020102"), bytes.fromhex("a003020107"), "InvalidVersion"),
        (b"Z0", b"!0", "cannot be parsed"),  # the end of one date
        (bytes.fromhex("0603551d11"), bytes.fromhex("0603551d13"), "DuplicateExtension"),
    ],
)
def test_odd_certificates_are_refused_by_what_is_odd(before: bytes, after: bytes, why: str) -> None:
    with pytest.raises(BadCertificate, match=why):
        parse_pair("other.example", damaged(before, after), OTHER.key_pem, "x")


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_a_certificate_with_any_bytes_changed_is_taken_or_refused(changes: list[tuple[int, int]]) -> None:
    der = bytearray(x509.load_pem_x509_certificate(OTHER.chain_pem).public_bytes(Encoding.DER))
    for place, value in changes:
        der[place % len(der)] = value
    try:
        found = parse_pair("other.example", as_pem(bytes(der)), OTHER.key_pem, "x")
    except BadCertificate:
        return
    assert found.issuer.isprintable()
    is_ordinary(found)


@pytest.mark.parametrize(
    "fault", [MemoryError(), OverflowError("date"), type("PanicException", (BaseException,), {})()]
)
def test_whatever_the_library_raises_is_that_certificate_s_own_trouble(
    fault: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portero_py.core.certificate_pairs._listed_names", raising(fault))
    with pytest.raises(BadCertificate, match=type(fault).__name__):
        parsed()


def test_an_interrupt_is_not_taken_for_a_bad_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portero_py.core.certificate_pairs._listed_names", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        parsed()


def raising(fault: BaseException) -> Callable[[object], None]:
    def fails(_: object) -> None:
        raise fault

    return fails


def test_an_issuer_cannot_write_to_the_terminal() -> None:
    name = x509.NameAttribute(x509.NameOID.COMMON_NAME, "evil\x1b[2J\n")
    found = parsed(signed_by_hand(ec.generate_private_key(ec.SECP256R1()), [name]))
    assert found.issuer == "evil\ufffd[2J\ufffd"


@pytest.mark.parametrize(
    ("pair", "ordinary"),
    [
        (lambda: PAIR, True),
        (lambda: signed_by_hand(ec.generate_private_key(ec.SECP521R1())), True),
        (lambda: signed_by_hand(rsa.generate_private_key(65537, 2048)), True),
        (lambda: signed_by_hand(ec.generate_private_key(ec.SECP256K1())), False),
        (lambda: signed_by_hand(ec.generate_private_key(ec.BrainpoolP256R1())), False),
        (lambda: signed_by_hand(ed25519.Ed25519PrivateKey.generate()), False),
        (lambda: KeyPair(damaged(SHA256_WITH_ECDSA, SHA224_WITH_ECDSA), OTHER.key_pem), False),
        (lambda: KeyPair(damaged(SHA256_WITH_ECDSA, UNKNOWN_SIGNATURE), OTHER.key_pem), False),
    ],
    ids=["P-256", "P-521", "RSA", "secp256k1", "brainpool", "Ed25519", "SHA-224", "unknown"],
)
def test_what_every_client_takes_is_ordinary(pair: Callable[[], KeyPair], ordinary: bool) -> None:
    assert is_ordinary(parsed(pair())) is ordinary


# Complaints


def test_a_good_certificate_draws_no_complaint() -> None:
    for pair in (PAIR, self_signed("app.example"), AUTHORITY.issue("*.example")):
        found = parsed(pair)
        assert found.complaints(found.not_before) == []


def test_what_some_clients_refuse_is_complained_about_in_words() -> None:
    found = parsed()
    assert found.complaints(found.not_after) == ["it has expired"]
    assert found.complaints(found.not_before - 1) == ["it is not valid yet"]
    (foreign,) = parsed(OTHER).complaints(found.not_before)
    assert foreign == "it is not for app.example but for other.example"
    (nameless,) = replace(found, names=()).complaints(found.not_before)
    assert "no names" in nameless
    (lonely,) = replace(found, chain_length=1).complaints(found.not_before)
    assert "no intermediate" in lonely


# Choice

BY_FOLDER = certificate("a.example")
BY_LIST = certificate("multi.example", "multi.example", "b.example", "*.c.example", "192.0.2.9")
WILD = certificate("*.d.example", "*.d.example")
EXACT_IN_WILD = certificate("x.d.example")
FIRST = certificate("0-default")
TABLE = CertificateTable([WILD, BY_LIST, EXACT_IN_WILD, FIRST, BY_FOLDER], version=3)


@pytest.mark.parametrize(
    ("sni", "chosen"),
    [
        ("a.example", BY_FOLDER),
        ("A.EXAMPLE", BY_FOLDER),
        ("a.example.", BY_FOLDER),
        ("b.example", BY_LIST),
        ("q.c.example", BY_LIST),
        ("q.r.c.example", WILD),  # the default: the star is one label
        ("q.d.example", WILD),
        ("x.d.example", EXACT_IN_WILD),
        ("192.0.2.9", BY_LIST),
        ("unknown.example", WILD),
        ("", WILD),
        (None, WILD),
        (".", WILD),
        ("*.d.example", WILD),
        ("\x00\n'; --", WILD),
    ],
)
def test_a_client_gets_the_certificate_of_its_name(sni: str | None, chosen: Certificate) -> None:
    assert TABLE.select(sni) is chosen


def test_the_default_is_the_first_in_sorted_order_whatever_the_order_given() -> None:
    assert CertificateTable([BY_LIST, FIRST, BY_FOLDER]).default is FIRST
    assert CertificateTable([FIRST, BY_FOLDER, BY_LIST]).default is FIRST
    assert TABLE.default is WILD


def test_a_folder_decides_against_what_another_certificate_lists() -> None:
    chosen, other = certificate("a.example"), certificate("b.example", "a.example", not_after=3e9)
    assert CertificateTable([other, chosen]).select("a.example") is chosen


def test_of_several_that_list_a_name_the_one_that_lasts_longest_is_chosen() -> None:
    old, new = certificate("old", "w.example", not_after=1e9), certificate("zz", "w.example", not_after=2e9)
    assert CertificateTable([old, new]).select("w.example") is new
    newer_first = certificate("a", "w.example", not_after=2e9), certificate("b", "w.example", not_after=1e9)
    assert CertificateTable(newer_first).select("w.example") is newer_first[0]


def test_an_empty_table_has_nothing_for_anybody() -> None:
    empty = CertificateTable()
    assert empty.select("a.example") is None
    assert empty.default is None
    assert not empty.misdirected(BY_FOLDER, "b.example")


def test_a_table_knows_its_version_and_its_folders() -> None:
    assert TABLE.version == 3
    assert TABLE.get("a.example") is BY_FOLDER
    assert TABLE.get("b.example") is None


# 421


@pytest.mark.parametrize(
    ("presented", "host", "misdirected"),
    [
        (BY_FOLDER, "a.example", False),
        (BY_FOLDER, "b.example", True),
        (BY_FOLDER, "q.d.example", True),
        (BY_FOLDER, "nobody.example", False),  # connecting again would end in the default
        (BY_LIST, "b.example", False),
        (BY_LIST, "q.c.example", False),
        (BY_LIST, "192.0.2.9", False),
        (WILD, "x.d.example", False),  # it covers the name, though another would have been chosen
        (WILD, "localhost", False),
    ],
)
def test_a_host_is_misdirected_when_only_another_certificate_covers_it(
    presented: Certificate, host: str, misdirected: bool
) -> None:
    assert TABLE.misdirected(presented, host) is misdirected


def test_a_certificate_that_was_replaced_still_covers_what_it_listed() -> None:
    former = certificate("a.example", "a.example", "www.a.example")
    table = CertificateTable([certificate("a.example", "a.example"), certificate("www.a.example")])
    assert not table.misdirected(former, "www.a.example")


# Names


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("App.Example", "app.example"),
        ("_wildcard.example.com", "*.example.com"),
        ("_WILDCARD.Example.com", "*.example.com"),
        ("*.example.com", "*.example.com"),
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:0::1", "2001:db8::1"),
        ("lost+found", None),
        ("_wildcard.", None),
        ("*", None),
        ("a b", None),
    ],
)
def test_a_folder_stands_for_a_name(raw: str, name: str | None) -> None:
    assert folder_name(raw) == name


@pytest.mark.parametrize("name", ["app.example", "*.example.com"])
def test_portero_s_own_folders_stand_for_their_names(name: str) -> None:
    assert folder_name(folder_of(name)) == name
    assert "*" not in folder_of(name)


@pytest.mark.parametrize(
    ("sni", "name"),
    [
        ("App.Example", "app.example"),
        ("app.example.", "app.example"),
        (None, ""),
        ("", ""),
        ("app.example:443", ""),
        ("[::1]", ""),
        ("a..b", ""),
        ("x\nlevel=error", ""),
        ("*.example.com", ""),
        ("a" * 300, ""),
    ],
)
def test_only_a_host_name_is_taken_for_a_server_name(sni: str | None, name: str) -> None:
    assert server_name(sni) == name


def test_self_signed_pairs_are_their_own_issuer() -> None:
    assert parsed(self_signed("app.example")).self_signed
