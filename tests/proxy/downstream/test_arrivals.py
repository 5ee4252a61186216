"""Who may come in, and that each connection is given back once, whatever becomes of it."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from portero_py.config.model import Limits
from portero_py.proxy.downstream.arrivals import Arrivals
from portero_py.proxy.refusals import CLIENT_CONNECTIONS, HANDSHAKES


class Place:
    """A listener that counts."""

    def __init__(self, *, secure: bool = False) -> None:
        self.secure = secure
        self.there = 0

    def came(self) -> None:
        self.there += 1

    def went(self) -> None:
        self.there -= 1


def made(limits: Limits, workers: int = 1) -> Arrivals:
    found = Arrivals(asyncio.new_event_loop())
    found.configure(limits, workers)
    found._loop.close()
    return found


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["come", "pass", "go", "go twice"]))))
def test_a_connection_is_counted_once_whatever_becomes_of_it(steps: list[tuple[int, str]]) -> None:
    found, place = made(Limits(connections_per_client=2)), Place()
    holders: dict[int, object] = {}
    for number, step in steps:
        client = "ab"[number % 2]
        if step == "come" and number not in holders:
            who = object()
            others = sum(other % 2 == number % 2 for other in holders)
            reason = found.arrive(who, place, client, 0.0)
            assert reason == (CLIENT_CONNECTIONS if others == 2 else "")
            if not reason:
                holders[number] = who
        elif number in holders and step == "pass":
            successor = object()
            found.passed_on(holders[number], successor)
            found.leave(holders[number])  # the former one is nobody any more
            holders[number] = successor
        elif number in holders and step != "come":
            who = holders.pop(number)
            found.leave(who)
            if step == "go twice":
                found.leave(who)
        assert place.there == len(found) == len(holders)
    for who in holders.values():
        found.leave(who)
    assert (place.there, len(found), found.clients) == (0, 0, 0)


def test_those_that_were_there_before_a_limit_are_not_given_back_to_it() -> None:
    found, place = made(Limits()), Place()
    early = [object() for _ in range(3)]
    for who in early:
        assert found.arrive(who, place, "a", 0.0) == ""
    found.configure(Limits(connections_per_client=1), 1)
    late = object()
    assert found.arrive(late, place, "a", 0.0) == ""
    assert found.arrive(object(), place, "a", 0.0) == CLIENT_CONNECTIONS
    for who in early:
        found.leave(who)
    assert found.arrive(object(), place, "a", 0.0) == CLIENT_CONNECTIONS
    found.configure(Limits(), 1)
    found.leave(late)
    assert found.clients == 0
    assert place.there == 0


async def test_handshakes_have_a_rate_and_whoever_is_quiet_is_forgotten() -> None:
    found = Arrivals(asyncio.get_running_loop())
    found.configure(Limits(handshakes_per_client=4), 2)
    plain, secure = Place(), Place(secure=True)
    now = asyncio.get_running_loop().time() - 100
    reasons = [found.arrive(object(), secure, "a", now) for _ in range(6)]
    assert reasons == [""] * 4 + [HANDSHAKES] * 2, "a burst of one second at one worker"
    assert found.arrive(object(), secure, "a", now + 0.5) == "", "its share is two a second"
    assert found.arrive(object(), secure, "a", now + 0.5) == HANDSHAKES
    assert found.arrive(object(), plain, "a", now) == "", "that is no handshake"
    assert found.arrive(object(), secure, "", now) == "", "a proxy stands for many"
    assert (secure.there, plain.there) == (6, 1)
    assert found.clients == 1
    assert found._sweeping is not None
    found._sweep()
    assert found.clients == 0
    assert found._sweeping is None, "nobody is left to look for"
    assert found.arrive(object(), secure, "a", now + 1000) == ""
    assert found._sweeping is not None
    found.close()
