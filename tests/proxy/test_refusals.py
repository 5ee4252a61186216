"""Refusals: each is counted, and the log is not flooded."""

from __future__ import annotations

import asyncio

import pytest

from portero_py.core.counters import Counters
from portero_py.proxy import refusals
from portero_py.proxy.refusals import BODY_RATE, HANDSHAKES, Refusals
from tests.waiting import until


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "PAUSE", 0.02)


async def test_the_first_is_a_line_and_all_that_follow_within_a_second_are_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counters = Counters()
    made = Refusals(asyncio.get_running_loop(), counters)
    for _ in range(1000):
        made.count(HANDSHAKES, "192.0.2.7")
    made.count(BODY_RATE)
    assert counters.refused == {HANDSHAKES: 1000, BODY_RATE: 1}
    assert [record.getMessage() for record in caplog.records] == [
        "a connection over limits.handshakes_per_client was closed (192.0.2.7)",
        "a request whose body came slower than limits.body_rate was ended",
    ]
    caplog.clear()
    await until(lambda: not made._more)
    assert [record.getMessage() for record in caplog.records] == ["handshakes: 999 more in the last second"]
    caplog.clear()
    made.count(HANDSHAKES, "192.0.2.8")
    assert caplog.messages == ["a connection over limits.handshakes_per_client was closed (192.0.2.8)"]
    made.close()


async def test_when_everything_ends_nothing_more_is_said(caplog: pytest.LogCaptureFixture) -> None:
    made = Refusals(asyncio.get_running_loop(), Counters())
    for _ in range(3):
        made.count(BODY_RATE)
    made.close()
    await asyncio.sleep(0.05)
    assert len(caplog.messages) == 1
