"""The ledger of the faults under load: nothing that is wrong, missing or there twice counts as answered."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.faults import asks
from benchmarks.faults.asks import Ask, Kind
from benchmarks.faults.ledger import FORGOTTEN, SHORT, WRONG, CountingError, Ledger, Tally, repeated

GET = Ask("a-1", Kind.GET, 2_000)
POST = Ask("a-2", Kind.POST, 1_000)
DOWNLOAD = Ask("a-3", Kind.DOWNLOAD, 3)
ALL = (GET, POST, DOWNLOAD)


def told(ledger: Ledger) -> Tally:
    return ledger.close(seconds=1.0, late=0.0)


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger()
    for ask in ALL:
        made.send(ask)
    return made


def test_the_right_bytes_are_an_answer(ledger: Ledger) -> None:
    for ask in ALL:
        ledger.answer(ask, 200, ask.answer, 0.1, 0.1)
    tally = told(ledger)
    assert tally.sent == tally.answered == {"GET": 1, "POST": 1, "download": 1}
    assert tally.lost == {}


@pytest.mark.parametrize("ask", ALL, ids=lambda ask: ask.kind.value)
@given(data=st.data())
def test_one_wrong_byte_anywhere_is_noticed(ask: Ask, data: Any) -> None:
    ledger, body = Ledger(), bytearray(ask.answer)
    at = data.draw(st.integers(0, len(body) - 1))
    body[at] ^= data.draw(st.integers(1, 255))
    ledger.send(ask)
    ledger.answer(ask, 200, bytes(body), 0.1, 0.1)
    assert told(ledger).lost == {ask.kind.value: {WRONG: 1}}


@pytest.mark.parametrize("ask", ALL, ids=lambda ask: ask.kind.value)
def test_a_byte_less_and_a_byte_more_are_noticed(ask: Ask) -> None:
    bodies = {b"": SHORT, ask.answer[:-1]: SHORT, ask.answer + b"x": WRONG, ask.answer * 2: WRONG}
    for body, way in bodies.items():
        ledger = Ledger()
        ledger.send(ask)
        ledger.answer(ask, 200, body, 0.1, 0.1)
        assert told(ledger).lost == {ask.kind.value: {way: 1}}


def test_the_answer_of_another_ask_is_wrong(ledger: Ledger) -> None:
    ledger.answer(GET, 200, Ask("a-4", Kind.GET, GET.size).answer, 0.1, 0.1)
    ledger.answer(POST, 200, Ask("a-4", Kind.POST, POST.size).answer, 0.1, 0.1)
    assert told(ledger).lost_of("GET", "POST") == 2


@pytest.mark.parametrize("status", [204, 206, 302, 429, 500, 503])
def test_another_status_is_lost_by_its_number_whatever_the_bytes(ledger: Ledger, status: int) -> None:
    ledger.answer(GET, status, GET.answer, 0.1, 0.1)
    assert told(ledger).lost["GET"] == {str(status): 1}


def test_what_nobody_settles_is_lost(ledger: Ledger) -> None:
    ledger.answer(GET, 200, GET.answer, 0.1, 0.1)
    tally = told(ledger)
    assert tally.lost == {"POST": {FORGOTTEN: 1}, "download": {FORGOTTEN: 1}}
    assert tally.total_answered + tally.lost_of(*Kind) == tally.total_sent


def test_a_second_settlement_is_a_fault_of_the_count(ledger: Ledger) -> None:
    ledger.answer(GET, 200, GET.answer, 0.1, 0.1)
    with pytest.raises(CountingError, match="a-1 was settled before"):
        ledger.answer(GET, 200, GET.answer, 0.1, 0.1)
    with pytest.raises(CountingError, match="a-1 was settled before"):
        ledger.lose(GET, "closed", 0.1, 0.1)


def test_who_was_never_sent_or_is_sent_twice_is_a_fault_of_the_count(ledger: Ledger) -> None:
    with pytest.raises(CountingError, match="never sent"):
        ledger.lose(Ask("b-1", Kind.GET, 1), "closed", 0.1, 0.1)
    with pytest.raises(CountingError, match="a-1 was sent before"):
        ledger.send(GET)


def test_times_are_what_an_exchange_takes_beyond_its_own(ledger: Ledger) -> None:
    ledger.answer(GET, 200, GET.answer, 1.5, 1.5)
    ledger.answer(DOWNLOAD, 200, DOWNLOAD.answer, DOWNLOAD.seconds + 0.25, 2.0)
    ledger.lose(POST, "timed out", 30.0, 30.0)
    tally = told(ledger)
    assert tally.slowest == pytest.approx({"GET": 1.5, "POST": 30.0, "download": 0.25})
    assert tally.p99 == 30.0


def test_a_post_that_two_backends_wrote_down_is_repeated() -> None:
    assert repeated(["a", "b", "c"]) == 0
    assert repeated(["a", "b", "a", "c", "a"]) == 2


def test_the_same_seed_asks_the_same_and_nothing_is_asked_twice() -> None:
    first, again = (list(itertools.islice(asks.stream("7", 200), 5_000)) for _ in range(2))
    assert first == again
    assert len({ask.identity for _, ask in first}) == len(first)
    assert {ask.kind for _, ask in first} == set(Kind)
    assert [at for at, _ in first] == pytest.approx([number / 200 for number in range(1, 5_001)])


def test_every_byte_of_an_answer_belongs_to_its_ask() -> None:
    for _, ask in itertools.islice(asks.stream("7", 200), 2_000):
        if ask.kind is not Kind.WEBSOCKET:
            assert ask.identity.encode() in ask.answer
