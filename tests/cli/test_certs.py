"""`portero-py certs`, and what must hold before portero asks a CA for anything."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from portero_py.cli import certs
from portero_py.config.model import Config
from portero_py.config.sources import load
from portero_py.control.acme.files import AcmeFiles
from portero_py.control.acme.folder import CertificateFolder
from portero_py.core.acme.progress import Progress
from portero_py.core.certificate_pairs import parse_pair
from portero_py.demo.self_signed import Authority, KeyPair, self_signed
from portero_py.errors import ConfigError
from portero_py.run import preflight

AUTHORITY = Authority()
SECRETS = {"register-secret": "s" * 20, "jwt-hmac-key": "k" * 40}
DIRECTORY = "https://ca.example/dir"


@pytest.fixture
def flags(tmp_path: Path) -> dict[str, Any]:
    for folder in ("certs", "state"):
        (tmp_path / folder).mkdir()
    return {
        **SECRETS,
        "tls-cert-dir": str(tmp_path / "certs"),
        "state-dir": str(tmp_path / "state"),
        "acme-directory": DIRECTORY,
        "acme-domain": ["a.example,www.a.example"],
        "acme-agree-tos": True,
        "listen-addr": ["127.0.0.1:1"],
    }


def install(flags: dict[str, Any], pair: KeyPair, progress: Progress) -> None:
    """As ACME leaves it."""
    certificate = parse_pair("a.example", pair.chain_pem, pair.key_pem, "here")
    files = AcmeFiles(flags["state-dir"], DIRECTORY)
    files.save_pair("a.example", pair.chain_pem, pair.key_pem)
    files.save_progress("a.example", progress)
    CertificateFolder(flags["tls-cert-dir"]).install(certificate)


# The list


def test_source_issuer_renewal_and_the_last_error_are_listed(
    flags: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    failed = Progress().failed("ca_rate_limited", "the CA's rate limit is reached", 1e9, 2e9)
    install(flags, AUTHORITY.issue("a.example", "www.a.example"), failed)
    AUTHORITY.issue("b.example").write(Path(flags["tls-cert-dir"]) / "b.example")
    assert certs.certs(flags, {}) == 0
    said = capsys.readouterr().out
    assert re.search(r"issuer: portero-py demo authority; by ACME; next renewal: \d{4}-\d\d-\d\d\n", said)
    assert (
        "last error, 2001-09-09 01:46:40 UTC (ca_rate_limited): the CA's rate limit is reached; "
        "next attempt: 2033-05-18 03:33:20 UTC" in said
    )
    assert "certificate b.example: b.example" in said
    assert "  issuer: portero-py demo authority; from a file\n" in said


def test_a_certificate_that_acme_is_to_bring_is_no_error(
    flags: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert certs.certs(flags, {}) == 0
    assert capsys.readouterr().out == (
        "no certificate yet for a.example, www.a.example: ACME is to bring one\n"
    )


# The doctor


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AUTHORITY.issue("a.example"), "the chain ends in nothing that this machine trusts"),
        (lambda: AUTHORITY.issue("b.example"), "it is not for a.example but for b.example"),
        (lambda: AUTHORITY.issue("a.example", days=-1), "it has expired on"),
        (lambda: AUTHORITY.issue("a.example", days=0.005), "it ends soon"),
        (lambda: self_signed("a.example"), "it is its own issuer"),
        (
            lambda: KeyPair(_first(pair := AUTHORITY.issue("a.example")), pair.key_pem),
            "the chain has no intermediate",
        ),
        (
            lambda: KeyPair(_first(pair := AUTHORITY.issue("a.example")) + Authority("x").pem, pair.key_pem),
            "certificate 1 of the chain was not issued by certificate 2",
        ),
        (
            lambda: KeyPair(AUTHORITY.issue("a.example").chain_pem, AUTHORITY.issue("b.example").key_pem),
            "cannot be used: the private key does not belong",
        ),
    ],
)
def test_the_doctor_finds_what_is_wrong(
    flags: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], KeyPair],
    said: str,
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    make().write(Path(flags["tls-cert-dir"]) / "a.example")
    assert certs.check(flags, {}, "A.example") == 1
    found = capsys.readouterr().out
    assert any(line.startswith("bad: ") and said in line for line in found.splitlines())
    assert "bad: nothing listens at 127.0.0.1:1" in found


def test_the_doctor_trusts_what_the_machine_trusts(
    flags: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "roots.pem").write_bytes(AUTHORITY.pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "roots.pem"))
    install(flags, AUTHORITY.issue("a.example", "www.a.example"), Progress())
    certs.check(flags, {}, "www.a.example")
    found = capsys.readouterr().out.splitlines()
    assert [line for line in found if line.startswith("bad")] == [
        "bad: nothing listens at 127.0.0.1:1: Connection refused"
    ]
    assert "ok: it is for www.a.example" in found
    assert "ok: the chain is complete (2): this machine trusts it" in found


def test_a_name_that_nothing_is_for_is_told(
    flags: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert certs.check(flags, {}, "c.example") == 1
    assert "is for c.example" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="is no host name"):
        certs.check(flags, {}, "a b")


# The account


def test_commands_about_the_account_need_one(flags: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no ACME account"):
        certs.rollover(flags, {})
    with pytest.raises(ConfigError, match="--state-dir is missing"):
        certs.revoke({**flags, "state-dir": None}, {}, "a.example")


# Preflight


def prepared(flags: dict[str, Any], **more: Any) -> Config:
    return load({**flags, **{name.replace("_", "-"): value for name, value in more.items()}}, {})


def test_a_whole_configuration_passes(flags: dict[str, Any]) -> None:
    preflight.require(prepared(flags))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"no_tls": True}, "does nothing with --no-tls"),
        ({"state_dir": None}, "needs --state-dir"),
        (
            {"acme_agree_tos": None},
            "needs --acme-agree-tos: read the terms of service that https://ca.example",
        ),
        ({"acme_challenge": "http-01"}, "needs --http-addr"),
        ({"acme_domain": ["a.example", "b.example,a.example"]}, "a.example is given twice"),
        ({"acme_eab_kid": "kid"}, "belong together"),
        ({"acme_ca_file": "/nonexistent/ca.pem"}, "--acme-ca-file: cannot read"),
        ({"acme_domain": None, "acme_on_register": ["*.a.example"], "state_dir": None}, "--acme-on-register"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_opened(
    flags: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        preflight.require(prepared(flags, **more))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("acme-domain", ["*.example"]),
        ("acme-domain", ["192.0.2.1"]),
        ("acme-on-register", ["*"]),
        ("acme-email", "nobody"),
        ("acme-directory", "http://ca.example/dir"),
        ("acme-directory", "production"),
        ("acme-challenge", "dns-02"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(flags: dict[str, Any], flag: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^--{flag}: "):
        load({**flags, flag: value}, {})  # type: ignore[dict-item]


def _first(pair: KeyPair) -> bytes:
    end = b"-----END CERTIFICATE-----\n"
    return pair.chain_pem.partition(end)[0] + end
