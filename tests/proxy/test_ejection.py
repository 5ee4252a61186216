"""What an exchange tells of its backend, who is passed over then, and what is sent again."""

from __future__ import annotations

import asyncio
import errno
import logging

import pytest

from portero_py.config.model import Config, Health, Log
from portero_py.core.health import Evidence
from portero_py.core.retry_budget import LEAST, WINDOW
from portero_py.errors import ClientGone
from tests.proxy.dialogue import GET, OK, ScriptedTransport, World, get, post, settle, statuses

REFUSED = ConnectionRefusedError(111, "Connection refused")
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
A, B = 9000, 9001


class Play:
    """A world of two backends, A and B. First tries go to them in turns, A first."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.evidence: list[Evidence] = []
        world.outcomes.on_evidence = self.evidence.append
        world.register(2)

    async def ask(self, request: bytes = GET) -> tuple[ScriptedTransport, ScriptedTransport]:
        """A request, and a connection of its own to whichever backend takes it: the client, the backend."""
        self.forget_connections()
        client = self.world.client()
        client.send(request)
        return client, await self.world.backend()

    def forget_connections(self) -> None:
        """Whoever is sent to a backend makes a connection."""
        for pool in self.world.all_pools():
            pool.empty()

    async def first_try(self, answer: bytes = OK) -> int:
        """An exchange that is served; to whom it was sent first."""
        before = len(self.world.loop.addresses)
        client, backend = await self.ask()
        backend.send(answer)
        assert len(statuses(client.received)) == 1
        client.vanish()
        port: int = self.world.loop.addresses[before][1]
        return port

    async def refusals(self, port: int = A) -> None:
        """Three exchanges find that nobody listens at `port`, and are served by the other one."""
        self.world.loop.broken[port] = REFUSED
        found = 0
        while found < 3:
            found += await self.first_try() == port

    def failures(self) -> dict[int, int]:
        """Of whom there is something to say."""
        return {mark.backend.port: mark.failures for mark in self.world.health.by_backend().values()}

    def ejected(self) -> list[int]:
        return [mark.backend.port for mark in self.world.health.by_backend().values() if mark.is_ejected]


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """What portero's own log says: level and text."""
    return [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name.startswith("portero_py")
    ]


@pytest.fixture
def play(world: World) -> Play:
    return Play(world)


async def test_who_refuses_three_times_is_passed_over_until_a_trial_finds_it_well(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    world = play.world
    await play.refusals()
    assert world.counters.retries == {("app.example", "connect_failed"): 3}
    assert [await play.first_try() for _ in range(6)] == [B] * 6
    world.clock.now += 1
    assert [await play.first_try() for _ in range(6)].count(A) == 1, "one trial, which has failed"
    world.clock.now += 1
    assert [await play.first_try() for _ in range(6)] == [B] * 6
    world.loop.broken.clear()
    world.clock.now += 1
    assert [await play.first_try() for _ in range(6)].count(A) == 3
    assert world.counters.ejections == {"connect_failed": 2}
    error = "backend 127.0.0.1:9000 cannot be reached: Connection refused"
    assert play.evidence == [Evidence("app.example", "127.0.0.1", A, False, error)] * 2
    assert lines(caplog) == [
        (
            "WARNING",
            "backend 127.0.0.1:9000 of app.example: passed over for 1 s and until it answers again "
            "(connect_failed): " + error,
        ),
        ("INFO", "backend 127.0.0.1:9000 of app.example: back after 3.0 s"),
    ]
    assert all(done.status == 200 for done in world.done)


async def test_a_frozen_backend_costs_three_time_outs_and_control_hears_that_it_hangs(play: Play) -> None:
    world = play.world
    asked = [await play.ask() for _ in range(20)]  # they all begin before anybody knows
    for number in range(1, 20, 2):
        asked[number][1].send(OK)
    await world.pass_time(world.timeouts.upstream_head + 1)
    assert sorted(status for client, _ in asked for status in statuses(client.received)) == (
        [200] * 10 + [504] * 10
    )
    assert world.counters.ejections == {"upstream_timeout": 1}
    assert play.evidence == [
        Evidence("app.example", "127.0.0.1", A, True, error)
        for error in ("no answer within 2 s", "backend 127.0.0.1:9000 took too long")
    ]
    assert [await play.first_try() for _ in range(10)] == [B] * 10
    [mark] = world.health.by_backend().values()
    world.clock.now = mark.ejected_at + 2.9  # as long as a probe may take, and a while
    assert [await play.first_try() for _ in range(2)] == [B] * 2
    world.clock.now += 0.2
    assert [await play.first_try() for _ in range(2)].count(A) == 1


async def test_a_black_hole_is_passed_over_longer_than_a_probe_takes(play: Play) -> None:
    play.world.loop.broken[A] = TimeoutError()
    while not play.ejected():
        await play.first_try()
    assert [each.hangs for each in play.evidence] == [False]
    play.world.clock.now += 2.9
    assert [await play.first_try() for _ in range(4)] == [B] * 4


async def test_a_reset_before_the_head_counts_and_one_behind_it_does_not(play: Play) -> None:
    client, backend = await play.ask()
    backend.vanish()
    (await play.world.backend()).send(OK)
    assert statuses(client.received) == [200]
    assert play.failures() == {A: 1}
    client, backend = await play.ask()
    backend.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
    backend.vanish()
    assert client.closed
    assert play.failures() == {A: 1}
    client, backend = await play.ask()
    backend.send(b"no http\r\n\r\n")
    assert statuses(client.received) == [502]
    assert play.failures() == {A: 2}


async def test_an_answer_whatever_it_is_ends_the_row_but_for_the_statuses_that_are_named(play: Play) -> None:
    for _ in range(4):
        await play.first_try(UNAVAILABLE)
    assert play.failures() == {}
    play.world.configure(Config(log=Log(access="off"), health=Health(statuses=(503,))))
    client, backend = await play.ask()
    backend.send(UNAVAILABLE)
    assert statuses(client.received) == [503], "it is passed on all the same"
    assert play.failures() == {A: 1}
    await play.first_try()
    await play.first_try(b"HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\nok")
    assert play.failures() == {}
    for number in range(6):
        await play.first_try(OK if number % 2 else UNAVAILABLE)
    assert play.world.counters.ejections == {"status_503": 1}
    assert [await play.first_try() for _ in range(4)] == [A] * 4


async def test_a_long_answer_of_a_named_status_counts_at_its_head(play: Play) -> None:
    play.world.configure(Config(log=Log(access="off"), health=Health(statuses=(503,))))
    client, backend = await play.ask()
    backend.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 5\r\n\r\n")
    assert play.failures() == {A: 1}
    backend.send(b"later")
    assert statuses(client.received) == [503]


async def test_what_is_not_the_backends_fault_counts_for_nothing(play: Play) -> None:
    world = play.world
    client, backend = await play.ask()
    client.vanish()  # the client went away
    await settle()
    assert backend.aborted
    client, _ = await play.ask(post(b"abc", b"Expect: 100-continue\r\n")[:-3])
    client.send_end()  # and one in the middle of its body
    await settle()
    world.loop.broken = {A: OSError(errno.EMFILE, "Too many open files"), B: UnicodeError("no TLS name")}
    client = world.client()
    client.send(GET)
    await settle()
    assert statuses(client.received) == [502]
    assert play.failures() == {}
    assert isinstance(world.done[0].error, ClientGone)


async def test_a_stale_connection_says_nothing_and_its_retry_is_called_so(play: Play) -> None:
    world = play.world
    stale = await world.idle_backend()
    await world.idle_backend()
    client = world.client()
    client.send(GET)
    stale.vanish()
    (await world.backend()).send(OK)
    assert statuses(client.received) == [200]
    assert play.failures() == {}
    assert world.counters.retries == {("app.example", "stale"): 1}


async def test_a_tunnel_that_was_idle_for_too_long_says_nothing(play: Play) -> None:
    client, backend = await play.ask(get(b"/", b"Connection: Upgrade\r\nUpgrade: websocket\r\n"))
    backend.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
    play.world.clock.now += 4000
    await play.world.pass_time(2)
    assert client.closed
    assert play.failures() == {}


@pytest.mark.parametrize("how", ["client", "body", "reset"])
async def test_a_trial_without_a_verdict_lets_the_next_exchange_try(play: Play, how: str) -> None:
    world = play.world
    await play.refusals()
    world.loop.broken.clear()
    world.clock.now += 1
    for _ in range(2):  # whose turn it is, A or B
        client, backend = await play.ask(post(b"abc")[:-2] if how == "body" else GET)
        if world.loop.addresses[-1][1] == A:
            break
        client.vanish()
        await settle()
    [mark] = [mark for mark in world.health.by_backend().values() if mark.is_ejected]
    assert not mark.is_due(world.clock())
    assert [await play.first_try() for _ in range(4)] == [B] * 4, "it is tried by one only"
    play.forget_connections()
    if how == "reset":
        backend.vanish()
        assert world.counters.ejections == {"connect_failed": 1, "upstream_closed": 1}
        (await world.backend()).send(OK)
        return
    client.vanish()
    await settle()
    assert mark.is_due(world.clock())
    assert [await play.first_try() for _ in range(2)].count(A) == 1
    assert play.ejected() == []


async def test_with_one_backend_left_it_is_tried(play: Play) -> None:
    world = play.world
    world.register(1)
    world.loop.broken[A] = REFUSED
    client = world.client()
    for _ in range(5):
        client.send(GET)
        await settle()
    assert statuses(client.received) == [502] * 5
    assert len(world.loop.addresses) == 5
    assert play.ejected() == []
    assert len(play.evidence) == 1, "control hears of it once a second"
    world.loop.broken.clear()
    client.send(GET)
    (await world.backend()).send(OK)
    assert statuses(client.received)[-1] == 200
    assert play.failures() == {}


async def test_a_service_has_a_line_of_the_log_a_second(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    world = play.world
    world.register(8)
    world.loop.broken = {9000 + n: REFUSED for n in range(8)}
    client = world.client()
    for _ in range(8):
        client.send(GET)
        await asyncio.sleep(0.0)
        for _ in range(10):
            await settle()
    assert len(play.ejected()) == 4
    assert len(lines(caplog)) == 1
    world.loop.broken.clear()
    caplog.set_level(logging.INFO)
    world.clock.now += 1
    while len(lines(caplog)) < 2:
        await play.first_try()
    assert lines(caplog)[1][1].endswith("back after 1.0 s (3 more lines like this were left out)")


# Retries


async def test_a_post_whose_backend_died_is_a_502_and_a_get_is_served_by_another(play: Play) -> None:
    client, backend = await play.ask(post(b"abc"))
    assert backend.received.endswith(b"abc")
    backend.vanish()
    assert statuses(client.received) == [502]
    client, backend = await play.ask()
    backend.vanish()
    (await play.world.backend()).send(OK)
    assert statuses(client.received) == [200]
    assert play.world.counters.retries == {("app.example", "upstream_closed"): 1}


async def test_when_the_budget_is_used_up_the_client_gets_the_error_and_refused_connects_are_free(
    play: Play,
) -> None:
    world = play.world
    most = LEAST * WINDOW
    for number in range(most + 3):
        client, backend = await play.ask()
        world.health.marks.clear()  # nobody is ejected here
        backend.vanish()
        if number < most:
            (await world.backend()).send(OK)
        assert statuses(client.received) == [200 if number < most else 502]
    assert world.counters.retries["app.example", "upstream_closed"] == most
    assert world.counters.retries_refused == {"app.example": 3}
    assert world.counters.errors["upstream_closed"] == 3
    world.loop.outcomes = [REFUSED]
    await play.first_try()
    assert world.counters.retries["app.example", "connect_failed"] == 1


async def test_who_is_asked_much_may_send_much_again(play: Play) -> None:
    world = play.world
    for _ in range(1000):
        world.counters.exchange_done("app.example", b"GET", 200, 0.1)
    world.clock.now += 5
    asked = [await play.ask() for _ in range(100)]
    for number in range(0, 100, 2):
        play.forget_connections()
        asked[number][1].vanish()
        (await world.backend()).send(OK)
        asked[number + 1][1].send(OK)
    assert {status for client, _ in asked for status in statuses(client.received)} == {200}
    assert world.counters.ejections == {"upstream_closed": 1}


async def test_what_the_budgets_need_is_done_in_steps(play: Play) -> None:
    world = play.world
    for number in range(1200):
        world.counters.exchange_done(f"{number}.example", b"GET", 200, 0.1)
    for _ in range(1000):
        world.counters.exchange_done("app.example", b"GET", 200, 0.1)
    assert [world.outcomes.look(world.clock()) for _ in range(3)] == [False, False, True]
    world.counters.keep_only({"app.example": 0})
    assert [world.outcomes.look(world.clock()) for _ in range(2)] == [True, True]
    world.clock.now += 10
    granted = sum(world.outcomes.may_repeat("app.example", world.clock()) for _ in range(100))
    assert granted == LEAST * WINDOW, "what came before the last look is over"
