"""The steps of an order: every arrow, no other, and what is written down."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from portero_py.core.acme.progress import Progress, Step, from_json

NAMES = ("a.example", "www.a.example")
IDLE = Progress(failures=2, retry_at=9.0, reason="r", error="e", failed_at=3.0, revoked=True)
ORDERED = IDLE.ordered(NAMES, "https://ca/1", "aki.serial")
FINALIZED = ORDERED.finalized()
ISSUED = FINALIZED.issued()

Move = Callable[[Progress], Progress]
MOVES: dict[str, Move] = {
    "ordered": lambda progress: progress.ordered(NAMES, "https://ca/2", ""),
    "finalized": lambda progress: progress.finalized(),
    "issued": lambda progress: progress.issued(),
    "installed": lambda progress: progress.installed("ab", 5.0),
    "dropped": lambda progress: progress.dropped(),
}
ARROWS = {
    "idle": {"ordered": Step.ORDERED},
    "ordered": {
        "finalized": Step.FINALIZED,
        "issued": Step.ISSUED,
        "dropped": Step.IDLE,
        "installed": Step.IDLE,
    },
    "finalized": {"issued": Step.ISSUED, "dropped": Step.IDLE, "installed": Step.IDLE},
    "issued": {"dropped": Step.IDLE, "installed": Step.IDLE},
}


@pytest.mark.parametrize("progress", [IDLE, ORDERED, FINALIZED, ISSUED], ids=lambda one: one.step.value)
@pytest.mark.parametrize("move", MOVES)
def test_an_order_moves_along_the_arrows_and_nowhere_else(progress: Progress, move: str) -> None:
    led_to = ARROWS[progress.step.value].get(move)
    if led_to is None:
        with pytest.raises(ValueError, match="cannot become"):
            MOVES[move](progress)
    else:
        assert MOVES[move](progress).step is led_to


def test_what_the_order_is_stays_until_it_is_dropped() -> None:
    for progress in (ORDERED, FINALIZED, ISSUED):
        assert (progress.names, progress.order_url, progress.replaces) == (
            NAMES,
            "https://ca/1",
            "aki.serial",
        )
    assert ISSUED.dropped().order_url == ISSUED.dropped().replaces == ""
    assert ISSUED.dropped().failures == 2


def test_an_installed_certificate_forgets_what_was_wrong() -> None:
    assert ISSUED.installed("ab", 5.0) == Progress(names=NAMES, fingerprint="ab", installed_at=5.0)


def test_a_failure_is_counted_and_keeps_the_step() -> None:
    failed = ORDERED.challenge_failed("http-01", "x", "first", 6.0).failed("y", "z" * 5000, 7.0, 307.0)
    assert failed.step is Step.ORDERED
    assert (failed.failures, failed.retry_at, failed.reason, failed.failed_at) == (3, 307.0, "y", 7.0)
    assert failed.tried == ()
    assert len(failed.error) == 2000


def test_a_failed_challenge_is_remembered_for_this_attempt() -> None:
    once = Progress().challenge_failed("tls-alpn-01", "validation_failed", "no", 6.0)
    assert once.challenge_failed("http-01", "validation_failed", "no", 7.0).tried == (
        "tls-alpn-01",
        "http-01",
    )
    assert (once.failures, once.retry_at) == (0, 0.0)


@pytest.mark.parametrize("progress", [Progress(), IDLE, ORDERED, FINALIZED, ISSUED])
def test_what_is_written_is_read_again(progress: Progress) -> None:
    assert from_json(json.loads(json.dumps(progress.to_json()))) == progress


def test_a_window_survives() -> None:
    progress = Progress(window=(1.0, 2.5), tried=("http-01",))
    assert from_json(json.loads(json.dumps(progress.to_json()))) == progress


def test_other_versions_are_read() -> None:
    assert from_json({"later": 1, "retry_at": 5}) == Progress(retry_at=5.0)


@pytest.mark.parametrize(
    "document",
    [
        *([], "x", None, {"step": "gone"}, {"names": "a"}, {"names": [1]}, {"failures": True}),
        *({"failures": 1.5}, {"retry_at": "1"}, {"retry_at": True}, {"window": ["a"]}, {"revoked": 1}),
        *({"retry_at": 10**400}, {"retry_at": float("inf")}, {"ask_at": float("nan")}, {"renew_at": -1}),
        *({"window": [0, 1e300]}, {"failures": -1}, {"failures": 10**400}),
        {"error": None},
    ],
    ids=str,
)
def test_garbage_is_refused(document: object) -> None:
    with pytest.raises(ValueError, match=r"no JSON object|impossible value|is not a valid Step"):
        from_json(document)


def test_what_the_ca_never_heard_of_is_counted_apart() -> None:
    once = IDLE.failed("x", "y", 7.0, 9.0, was_heard=False)
    assert (once.failures, once.unheard) == (2, 1)
    assert once.failed("x", "y", 7.0, 9.0, was_heard=False).unheard == 2
    heard = once.failed("x", "y", 8.0, 308.0)
    assert (heard.failures, heard.unheard) == (3, 0)


def test_a_pair_is_adopted_where_no_order_goes_on() -> None:
    adopted = IDLE.adopted(NAMES, "ab", 4.0, 99.0)
    assert adopted == Progress(NAMES, fingerprint="ab", installed_at=4.0, ask_at=99.0)
    with pytest.raises(ValueError, match="carried on first"):
        ORDERED.adopted(NAMES, "ab", 4.0, 99.0)
