"""What a CA complains of, in plain words."""

from __future__ import annotations

import pytest

from portero_py.core.acme.faults import fault, kind_of, lost
from portero_py.errors import (
    AcmeError,
    AlreadyReplaced,
    CaRateLimited,
    CaRefused,
    OrderLost,
    ValidationFailed,
)

PREFIX = "urn:ietf:params:acme:error:"


@pytest.mark.parametrize(
    ("kind", "of_validation", "error", "words"),
    [
        ("rateLimited", False, CaRateLimited, "rate limit is reached (as it says)"),
        ("alreadyReplaced", False, AlreadyReplaced, "was replaced already"),
        ("connection", True, ValidationFailed, "the port open to all?"),
        ("unauthorized", True, ValidationFailed, "another server answered"),
        ("unauthorized", False, CaRefused, "does not let this account"),
        ("caa", True, CaRefused, "CAA record forbids this CA"),
        ("caa", False, CaRefused, "CAA record forbids this CA"),
        ("externalAccountRequired", False, CaRefused, "--acme-eab-kid"),
        ("newOne", False, CaRefused, "the CA refused: as it says"),
    ],
)
def test_a_problem_is_explained(kind: str, of_validation: bool, error: type[AcmeError], words: str) -> None:
    found = fault(PREFIX + kind, "as it says", 5.0, of_validation=of_validation)
    assert type(found) is error
    assert words in str(found)
    assert "as it says" in str(found)
    assert found.retry_after == 5.0


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("unauthorized", "did not find the TXT record"),
        ("dns", "TXT record up"),
        ("connection", "not connect"),
    ],
)
def test_a_problem_of_dns_01_is_about_records(kind: str, words: str) -> None:
    found = fault(PREFIX + kind, "as it says", of_validation=True, challenge="dns-01")
    assert isinstance(found, ValidationFailed)
    assert words in str(found)


def test_a_refusal_keeps_its_kind() -> None:
    found = fault(PREFIX + "badNonce", "no")
    assert isinstance(found, CaRefused)
    assert found.problem == "badNonce"


def test_a_problem_of_another_kind_has_no_kind() -> None:
    assert kind_of("about:blank") == ""
    assert str(fault("about:blank", "")) == "the CA refused: no reason"


def test_the_ca_s_words_are_bounded_and_on_one_line() -> None:
    said = str(fault(PREFIX + "caa", "a\nb\x1b[31m" + "x" * 9999))
    assert said.isprintable()
    assert len(said) < 600


def test_an_order_that_is_lost_says_what_comes_next() -> None:
    assert isinstance(lost("x" * 9999), OrderLost)
    assert "a new one is made" in str(lost("status 404"))
