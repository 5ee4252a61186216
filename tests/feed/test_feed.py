"""Tables go out to every worker, counters come back from all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from portero_py.core.certificates import Certificate, CertificateTable
from portero_py.core.challenges import Challenges
from portero_py.core.counters import Counters
from portero_py.core.model import Backend, LeaseRequest, Standing
from portero_py.core.registry import LINGER, Registry
from portero_py.core.routing_table import RoutingTable
from portero_py.feed.client import FeedClient
from portero_py.feed.feed import Feed
from portero_py.feed.messages import (
    Ack,
    Ask,
    AskCertificates,
    CertificateUpdate,
    Departed,
    FrameReader,
    Hello,
    TableUpdate,
    encode,
)
from portero_py.feed.server import FeedServer
from portero_py.run.sockets import Rendezvous
from tests.waiting import PATIENCE, until


class Worker:
    """Writes down what it gets."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.got: list[object] = []
        self.standing: list[Standing] = []

    def apply(self, table: RoutingTable) -> None:
        self.got.append(table)

    def apply_certificates(self, certificates: Any) -> None:
        self.got.append(certificates)

    def apply_challenges(self, challenges: Any) -> None:
        self.got.append(challenges)

    def standings(self, service: str) -> list[Standing]:
        return self.standing


async def test_every_subscriber_has_a_table_when_its_publication_returns() -> None:
    feed, workers, table = Feed(), [Worker(), Worker()], RoutingTable(1)
    for worker in workers:
        feed.subscribe(worker)
    await feed.publish(table)
    certificates: Any = "certificates"
    await feed.publish_certificates(certificates)
    challenges: Any = "challenges"
    await feed.publish_challenges(challenges)
    assert [worker.got for worker in workers] == [[table, "certificates", "challenges"]] * 2


async def test_who_comes_late_gets_what_was_published_last() -> None:
    feed, early, late = Feed(), Worker(), Worker()
    feed.subscribe(early)
    assert early.got == []
    certificates: Any = "certificates"
    await feed.publish_certificates(certificates)
    await feed.publish(RoutingTable(1))
    await feed.publish(RoutingTable(2))
    challenges: Any = "challenges"
    await feed.publish_challenges(challenges)
    feed.subscribe(late)
    # Certificates first: a handshake comes before a route.
    assert late.got == ["certificates", "challenges", RoutingTable(2)]


async def test_standings_are_the_sum_of_what_all_workers_say() -> None:
    feed, one, other = Feed(), Worker(), Worker()
    feed.subscribe(one)
    feed.subscribe(other)
    one.standing = [Standing("a.example", "::1", 1, 2), Standing("a.example", "::1", 2, 1, error="refused")]
    other.standing = [Standing("a.example", "::1", 1, 3, is_ejected=True)]
    found = await feed.standings("a.example")
    assert [found.in_flight_at("a.example", "::1", port) for port in (1, 2, 3)] == [5, 1, 0]
    assert found.ejected["a.example", "::1", 1] == 1
    assert found.errors == {("a.example", "::1", 2): "refused"}
    assert found.is_complete


async def test_who_cannot_be_asked_for_standings_is_missing_in_them(caplog: pytest.LogCaptureFixture) -> None:
    feed, worker, faults = Feed(), Worker(), list[str]()
    feed.count_fault = faults.append
    feed.subscribe(Broken())
    feed.subscribe(worker)
    worker.standing = [Standing("a.example", "::1", 1, 2)]
    found = await feed.standings()
    assert found.in_flight_at("a.example", "::1", 1) == 2
    assert not found.is_complete
    assert faults == ["feed"]
    assert "a fault" in caplog.text


async def test_an_older_table_never_replaces_a_newer_one() -> None:
    feed, worker = Feed(), Worker()
    feed.subscribe(worker)
    for version in (2, 1, 2, 3):
        await feed.publish(RoutingTable(version))
    assert worker.got == [RoutingTable(2), RoutingTable(2), RoutingTable(3)]


async def test_who_left_gets_nothing_more_and_cannot_leave_twice() -> None:
    feed, worker = Feed(), Worker()
    feed.subscribe(worker)
    feed.unsubscribe(worker)
    await feed.publish(RoutingTable(1))
    assert worker.got == []
    with pytest.raises(ValueError, match="not in list"):
        feed.unsubscribe(worker)


def test_counters_are_the_sum_and_never_fall_when_a_worker_leaves() -> None:
    feed, one, two = Feed(), Worker(), Worker()
    for worker in (one, two):
        feed.subscribe(worker)
        worker.counters.exchange_done("app.example", b"GET", 200, 0.1)
        worker.counters.connections_open = 3
        worker.counters.exchanges_in_flight = 2
        worker.counters.queued["app.example"] = 4
        worker.counters.tasks = 7
    assert feed.counters().services["app.example"].by_status()["GET", 200] == 2
    assert (feed.counters().connections_open, feed.counters().tasks, feed.subscribers) == (6, 14, 2)
    feed.unsubscribe(two)
    total = feed.counters()
    assert (total.tasks, feed.subscribers) == (7, 1)
    assert total.services["app.example"].by_status()["GET", 200] == 2
    assert (total.connections_open, total.exchanges_in_flight) == (3, 2)
    assert total.queued == {"app.example": 4}
    assert feed.counters().services == total.services  # asking does not count
    assert one.counters.services["app.example"].by_status()["GET", 200] == 1


# Workers in other processes


class Control:
    """A control process's end of the feed, on a socket as the supervisor makes it."""

    def __init__(self, rendezvous: Rendezvous, workers: int = 2, ack_seconds: float = 5.0) -> None:
        self.feed = Feed(ack_seconds=ack_seconds)
        self.serving: list[int] = []
        self.server = FeedServer(self.feed, rendezvous.socket.dup(), workers, self.serving.append)


class Desk:
    """Control processes and workers that meet, all on this loop."""

    def __init__(self) -> None:
        self.rendezvous = Rendezvous()
        self.controls: list[Control] = []
        self.clients: list[tuple[FeedClient, asyncio.Task[None]]] = []

    async def control(self, workers: int = 2, ack_seconds: float = 5.0) -> Control:
        """Start one."""
        control = Control(self.rendezvous, workers, ack_seconds)
        self.controls.append(control)
        await control.server.start()
        return control

    def worker(self, number: int = 0) -> tuple[Worker, FeedClient]:
        """Start one; it connects when there is a control."""
        worker = Worker()
        client = FeedClient(worker, self.rendezvous.path, number, asyncio.get_running_loop().time)
        self.clients.append((client, asyncio.create_task(client.run())))
        return worker, client

    async def end(self, client: FeedClient) -> None:
        """End one worker in good order."""
        [running] = [task for each, task in self.clients if each is client]
        running.cancel()
        await asyncio.wait([running])
        await client.close()

    async def close(self) -> None:
        """End everything."""
        for client, _ in self.clients:
            await self.end(client)
        for control in self.controls:
            await control.server.close()
        self.rendezvous.close()


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    found = Desk()
    yield found
    await found.close()


def certificate(not_before: float) -> Certificate:
    end = not_before + 90.0
    return Certificate("a.example", b"chain", b"key", (), not_before, end, "ab", "a CA", 1, False, "/certs/a")


def registry_with(*services: str) -> Registry:
    registry = Registry()
    for number, service in enumerate(services):
        registry.register(LeaseRequest(service, Backend("::1", 8000 + number), 60), 0.0)
    return registry


async def test_a_publication_returns_when_every_process_has_applied_it(desk: Desk) -> None:
    control, (one, _), (two, _) = await desk.control(), desk.worker(0), desk.worker(1)
    await until(lambda: control.server.connected == 2)
    registry = registry_with("a.example")
    await control.feed.publish(registry.table)
    assert [one.got, two.got] == [[registry.table]] * 2
    registry.register(LeaseRequest("b.example", Backend("::1", 1), 60), 0.0)
    await control.feed.publish(registry.table)
    assert one.got[-1] == two.got[-1] == registry.table


async def test_a_process_that_comes_late_gets_certificates_challenges_and_table(desk: Desk) -> None:
    control = await desk.control()
    table, challenges = registry_with("a.example").table, Challenges(7, {}, {"token": "key"})
    await control.feed.publish(table)
    await control.feed.publish_challenges(challenges)
    await control.feed.publish_certificates(CertificateTable((), 3))
    worker, client = desk.worker()
    async with asyncio.timeout(30):
        await client.supplied()
    [certificates, got, supplied] = worker.got
    assert isinstance(certificates, CertificateTable)
    assert isinstance(got, Challenges)
    assert got.http == challenges.http
    assert supplied == table


@pytest.mark.parametrize("not_before", [100.0, 300.0])
async def test_control_can_ask_which_certificates_the_workers_present(desk: Desk, not_before: float) -> None:
    control, published, other = await desk.control(), certificate(200.0), certificate(not_before)
    desk.worker(0)
    await until(lambda: control.server.connected == 1)
    assert await control.server.certificates_of(["a.example"]) == []
    await control.feed.publish_certificates(CertificateTable([published], 1))
    assert await control.server.certificates_of(["a.example", "b.example"]) == [published]
    assert await control.server.certificates_of(["b.example"]) == []
    # Another one presents another one: the later one counts.
    reader, writer = await asyncio.open_unix_connection(desk.rendezvous.path)
    writer.write(encode(Hello(1, True, TableUpdate.between(None, RoutingTable()), Counters(), Departed())))
    await until(lambda: control.server.connected == 2)
    asked = asyncio.create_task(control.server.certificates_of(["a.example"]))
    frames, question = FrameReader(), AskCertificates(("a.example",))
    while question not in [message for _, message in frames.feed(await reader.read(1 << 16))]:
        pass
    writer.write(encode(CertificateUpdate(1, (other,))))
    assert await asked == [max(published, other, key=lambda each: each.not_before)]
    # And one that leaves instead of answering holds nobody up.
    asked = asyncio.create_task(control.server.certificates_of(["a.example"]))
    await reader.read(1 << 16)
    writer.close()
    assert await asked == [published]
    await writer.wait_closed()


async def test_control_without_workers_learns_of_no_certificates(desk: Desk) -> None:
    control = await desk.control()
    assert await control.server.certificates_of(["a.example"]) == []


async def test_a_process_that_does_not_answer_holds_nobody_up_for_long(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    control, (worker, _) = await desk.control(ack_seconds=0.05), desk.worker()
    await until(lambda: control.server.connected == 1)
    reader, writer = await asyncio.open_unix_connection(desk.rendezvous.path)
    writer.write(encode(Hello(1, True, TableUpdate(0, "", ()), Counters(), Departed())))
    await until(lambda: control.server.connected == 2)
    registry = registry_with("a.example")
    async with asyncio.timeout(PATIENCE):
        await control.feed.publish(registry.table)
    assert worker.got == [registry.table]
    # It reads again: what it was sent is all there, in order.
    frames = FrameReader()
    [(number, update)] = frames.feed(await reader.read(99999))
    assert isinstance(update, TableUpdate)
    assert update.applied_to(RoutingTable()) == registry.table
    writer.write(encode(Ack(), number))
    registry.register(LeaseRequest("b.example", Backend("::1", 1), 60), 0.0)
    publishing = asyncio.create_task(control.feed.publish(registry.table))
    [(number, update)] = frames.feed(await reader.read(99999))
    writer.write(encode(Ack(), number))
    await publishing
    assert isinstance(update, TableUpdate)
    assert [service.name for service in update.changed] == ["b.example"]
    writer.close()
    await writer.wait_closed()


async def test_counters_of_processes_are_the_sum_and_stay_when_one_dies(desk: Desk) -> None:
    control, (one, _), (two, client) = await desk.control(), desk.worker(0), desk.worker(1)
    await until(lambda: control.server.connected == 2)
    for worker in (one, two):
        worker.counters.exchange_done("a.example", b"GET", 200, 0.1)
        worker.counters.connections_open = 3
    await control.server.refresh()
    assert control.feed.counters().services["a.example"].by_status()["GET", 200] == 2
    assert control.feed.counters().connections_open == 6
    two.counters.exchange_done("a.example", b"GET", 200, 0.1)
    assert one.counters.tasks + two.counters.tasks == control.feed.counters().tasks > 0
    await desk.end(client)  # in good order: its last word is its counters
    await until(lambda: control.server.connected == 1)
    assert control.feed.counters().services["a.example"].by_status()["GET", 200] == 3
    assert control.feed.counters().connections_open == 3


async def test_it_is_known_how_many_serve(desk: Desk) -> None:
    control, (_, one), (_, two) = await desk.control(), desk.worker(0), desk.worker(1)
    await until(lambda: control.server.connected == 2)
    assert control.server.serving == 0
    one.serving()
    two.serving()
    await until(lambda: control.serving[-1] == 2)
    await desk.end(one)
    await until(lambda: control.serving[-1] == 1)


async def test_a_new_control_takes_leases_and_counts_over_from_the_workers(desk: Desk) -> None:
    control, (one, feeds_one), (two, _) = await desk.control(), desk.worker(0), desk.worker(1)
    await until(lambda: control.server.connected == 2)
    two.counters.exchange_done("a.example", b"GET", 200, 0.1)
    feeds_one.serving()
    gone, its_feed = desk.worker(2)
    await until(lambda: control.server.connected == 3)
    gone.counters.exchange_done("a.example", b"GET", 200, 0.1)
    await desk.end(its_feed)
    registry = registry_with("a.example", "b.example")
    await control.feed.publish(registry.table)
    await control.server.close()
    successor = await desk.control()
    table = await successor.server.recover()
    assert table == registry.table
    await until(lambda: successor.server.serving == 1)
    await successor.server.refresh()
    assert successor.feed.counters().services["a.example"].by_status()["GET", 200] == 2
    # From here on it goes as before, and no worker refuses what a younger control says.
    again = Registry()
    again.restore(table.services.values(), table.version, 0.0)
    await successor.feed.publish(again.table)
    assert one.got[-1] == two.got[-1] == again.table
    # What they had already was not sent again.
    former, latest = one.got[-2:]
    assert isinstance(former, RoutingTable)
    assert isinstance(latest, RoutingTable)
    assert latest.services["a.example"] is former.services["a.example"]


async def test_what_departed_workers_counted_outlives_several_controls(desk: Desk) -> None:
    first, (_, stays), (gone, goes) = await desk.control(), desk.worker(0), desk.worker(1)
    await until(lambda: first.server.connected == 2)
    gone.counters.exchange_done("a.example", b"GET", 200, 0.1)
    await desk.end(goes)
    await until(lambda: first.server.connected == 1)
    control = first
    for _ in range(2):
        await control.server.close()
        control = await desk.control(workers=1)
        assert await control.server.recover() is None
        assert control.feed.counters().services["a.example"].by_status()["GET", 200] == 1
    late, _ = desk.worker(1)
    await until(lambda: control.server.connected == 2)
    assert late.got == []
    assert stays is not goes


class Slow:
    """A worker that served, and that says hello to a new control process when the test wants it to."""

    def __init__(self, desk: Desk, number: int, table: RoutingTable, departed: Departed) -> None:
        self._desk = desk
        self._hello = Hello(number, True, TableUpdate.between(None, table), Counters(), departed)

    async def report(self) -> asyncio.StreamWriter:
        _, writer = await asyncio.open_unix_connection(self._desk.rendezvous.path)
        writer.write(encode(self._hello))
        return writer


def departed(version: int) -> Departed:
    counters = Counters()
    counters.exchange_done("a.example", b"GET", 200, 0.1)
    return Departed(version, counters)


def noted(looks: list[int], number: int) -> bool:
    looks.append(number)
    return True


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is not known to be slow is not waited for."""
    monkeypatch.setattr("portero_py.feed.server.ANY_SECONDS", 0.01)
    monkeypatch.setattr("portero_py.feed.server.OTHERS_SECONDS", 0.01)
    monkeypatch.setattr("portero_py.feed.server.LOOK_SECONDS", 0.01)


@pytest.mark.usefixtures("hasty")
async def test_a_worker_that_was_just_forked_does_not_speak_for_one_that_is_slow(desk: Desk) -> None:
    registry, looks = registry_with("a.example"), list[int]()
    slow, control = Slow(desk, 0, registry.table, departed(7)), await desk.control()
    young, _ = desk.worker(1)
    recovering = asyncio.create_task(control.server.recover(lambda n: noted(looks, n) and n == 0, 1000.0))
    await until(lambda: control.server.connected == 1 and len(looks) > 3)
    assert not recovering.done()
    writer = await slow.report()
    assert await recovering == registry.table
    assert control.feed.counters().services["a.example"].by_status()["GET", 200] == 1
    assert young.got == []
    writer.close()
    await writer.wait_closed()


@pytest.mark.usefixtures("hasty")
async def test_slow_workers_are_waited_for_also_when_nobody_has_reported(desk: Desk) -> None:
    registry, looks = registry_with("a.example"), list[int]()
    control = await desk.control()
    recovering = asyncio.create_task(control.server.recover(lambda n: noted(looks, n), 1000.0))
    await until(lambda: len(looks) > 3)
    writers = [await Slow(desk, number, registry.table, Departed()).report() for number in (0, 1)]
    assert await recovering == registry.table
    for writer in writers:
        writer.close()
        await writer.wait_closed()


@pytest.mark.usefixtures("hasty")
async def test_nobody_waits_for_a_slow_worker_that_is_replaced_or_silent_for_too_long(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    lives, looks = {0}, list[int]()
    control = await desk.control()
    desk.worker(1)
    recovering = asyncio.create_task(control.server.recover(lambda n: noted(looks, n) and n in lives, 1000.0))
    await until(lambda: len(looks) > 3)
    lives.clear()
    assert await recovering is None
    assert "do not report" not in caplog.text
    assert await control.server.recover(lambda n: n == 0, 0.02) is None
    assert "they do not report: [0]" in caplog.text


@pytest.mark.usefixtures("hasty")
async def test_what_a_worker_has_said_stays_said_when_it_dies_while_another_is_waited_for(desk: Desk) -> None:
    registry, lives = registry_with("a.example"), {0, 1}
    control = await desk.control()
    recovering = asyncio.create_task(control.server.recover(lambda n: n in lives, 1000.0))
    writer = await Slow(desk, 1, registry.table, departed(7)).report()
    await until(lambda: control.server.connected == 1)
    writer.close()
    await writer.wait_closed()
    await until(lambda: control.server.connected == 0)
    young, _ = desk.worker(1)
    await until(lambda: control.server.connected == 1)
    lives.clear()
    assert await recovering == registry.table
    # The next control process learns it from the one that is left.
    await control.feed.publish(registry.table)
    assert young.got == [registry.table]
    await control.server.close()
    successor = await desk.control()
    assert await successor.server.recover(lambda n: n == 1, 1000.0) == registry.table
    assert successor.feed.counters().services["a.example"].by_status()["GET", 200] == 1


@pytest.mark.usefixtures("hasty")
async def test_a_worker_that_reports_late_is_heard_once_and_only_with_what_is_newer(desk: Desk) -> None:
    registry, late = registry_with("a.example"), list[RoutingTable]()
    older = registry.table
    registry.register(LeaseRequest("b.example", Backend("::1", 1), 60), 0.0)
    control = await desk.control()
    control.server.on_late = late.append
    first = await Slow(desk, 0, older, Departed()).report()
    assert await control.server.recover(lambda n: n == 0, 1000.0) == older
    writers = [first]
    for number, table in ((1, registry.table), (1, registry.table), (0, registry.table), (2, older)):
        writers.append(await Slow(desk, number, table, Departed()).report())
        await until(lambda: control.server.connected == len(writers))
    assert late == [registry.table]
    for writer in writers:
        writer.close()
        await writer.wait_closed()


async def test_challenges_of_a_new_control_replace_those_of_the_old_one(desk: Desk) -> None:
    control, (worker, _) = await desk.control(), desk.worker()
    await until(lambda: control.server.connected == 1)
    await control.feed.publish_challenges(Challenges(50, {}, {"old": "key"}))
    await control.server.close()
    successor = await desk.control()
    await until(lambda: successor.server.connected == 1)
    await successor.feed.publish_challenges(Challenges(1, {}, {"new": "key"}))
    first, second = worker.got
    assert isinstance(first, Challenges)
    assert isinstance(second, Challenges)
    assert second.version > first.version
    assert second.http == {"new": "key"}


@pytest.mark.parametrize("frame", [b"\xff\xff\xff\xff", encode(Ask()), b"\0\0\0\x01x"])
async def test_a_connection_that_makes_no_sense_is_ended_and_does_no_harm(
    desk: Desk, frame: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    control, (worker, _) = await desk.control(), desk.worker()
    await until(lambda: control.server.connected == 1)
    reader, writer = await asyncio.open_unix_connection(desk.rendezvous.path)
    writer.write(frame)
    async with asyncio.timeout(30):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    await control.feed.publish(RoutingTable(1))
    assert worker.got == [RoutingTable(1)]
    assert len(caplog.records) == 1


async def test_a_worker_that_is_far_behind_gets_one_update_when_it_reads_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portero_py.feed.remote_worker.MAX_UNSENT", -1)
    control, (worker, _) = await desk.control(), desk.worker()
    await until(lambda: control.server.connected == 1)
    registry = registry_with("a.example")
    await control.feed.publish(registry.table)
    registry.register(LeaseRequest("b.example", Backend("::1", 1), 60), 0.0)
    await control.feed.publish(registry.table)
    assert worker.got == []
    monkeypatch.setattr("portero_py.feed.remote_worker.MAX_UNSENT", 1 << 20)
    await control.feed.publish_challenges(Challenges(1))  # any answer shows that it reads
    await until(lambda: worker.got[-1] == registry.table)
    assert len(worker.got) == 2


async def test_a_worker_that_a_new_control_found_and_that_dies_later_is_gone_for_good(desk: Desk) -> None:
    control, (stays, _), (_, goes) = await desk.control(), desk.worker(0), desk.worker(1)
    await until(lambda: control.server.connected == 2)
    registry = registry_with("a.example")
    await control.feed.publish(registry.table)
    await control.server.close()
    successor = await desk.control()
    table = await successor.server.recover()
    assert table is not None
    await desk.end(goes)
    await until(lambda: successor.server.connected == 1)
    again = Registry()
    again.restore(table.services.values(), table.version, 0.0)
    await successor.feed.publish(again.table)
    assert stays.got[-1] == again.table
    await successor.server.refresh()
    emptied = asyncio.create_task(successor.server.emptied())
    await successor.server.close()
    async with asyncio.timeout(30):
        await emptied


class Broken(Worker):
    """Raises whatever it is given."""

    def apply(self, table: Any) -> None:
        raise RuntimeError("a fault")

    def apply_certificates(self, certificates: Any) -> None:
        raise RuntimeError("a fault")

    def apply_challenges(self, challenges: Any) -> None:
        raise RuntimeError("a fault")

    def standings(self, service: str) -> list[Standing]:
        raise RuntimeError("a fault")


async def test_a_publication_never_fails_for_one_subscriber(caplog: pytest.LogCaptureFixture) -> None:
    feed, worker, faults = Feed(), Worker(), list[str]()
    feed.count_fault = faults.append
    for each in (Broken(), worker, Broken()):
        feed.subscribe(each)
    certificates: Any = "certificates"
    challenges: Any = "challenges"
    await feed.publish(RoutingTable(1))
    await feed.publish_certificates(certificates)
    await feed.publish_challenges(challenges)
    feed.subscribe(Broken())  # one that comes late holds nobody up either
    assert worker.got == [RoutingTable(1), "certificates", "challenges"]
    assert faults == ["feed"] * 9
    assert "a fault" in caplog.text


async def test_an_update_that_a_worker_cannot_take_ends_neither_the_worker_nor_its_connection(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    control, (worker, _) = await desk.control(ack_seconds=0.05), desk.worker()
    await until(lambda: control.server.connected == 1)

    def refuse(certificates: Any) -> None:
        raise RuntimeError("a fault")

    worker.apply_certificates = refuse  # type: ignore[method-assign]
    await control.feed.publish_certificates(CertificateTable((), 1))
    await control.feed.publish(RoutingTable(1))
    assert worker.got == [RoutingTable(1)]
    assert control.server.connected == 1
    assert worker.counters.errors["feed"] == 1
    assert "a fault" in caplog.text


async def test_counts_of_a_service_that_is_gone_are_not_in_the_sum_and_begin_anew_when_it_comes_back() -> (
    None
):
    feed, one, gone = Feed(), Worker(), Worker()
    for worker in (one, gone):
        feed.subscribe(worker)
        worker.counters.exchange_done("a.example", b"GET", 200, 0.1)
        worker.counters.exchange_done("", b"GET", 404, 0.1)
        worker.counters.retries["a.example", "stale"] += 1
    feed.unsubscribe(gone)
    registry = registry_with("a.example")
    await feed.publish(registry.table)
    assert feed.counters().services["a.example"].by_status() == {("GET", 200): 2}
    registry.release("a.example", host="::1", port=8000, now=0.0)
    await feed.publish(registry.table)  # it lingers, and its counts are still seen
    assert feed.counters().services["a.example"].by_status() == {("GET", 200): 2}
    registry.expire(LINGER)
    await feed.publish(registry.table)
    total = feed.counters()
    assert set(total.services) == {""}
    assert total.services[""].by_status() == {("GET", 404): 2}
    assert total.retries == {}
    assert feed.departed.services.keys() == {""}
    one.counters.keep_only(registry.table.services)  # as a worker does with that table
    registry.register(LeaseRequest("a.example", Backend("::1", 1), 60), LINGER)
    await feed.publish(registry.table)
    assert "a.example" not in feed.counters().services
    one.counters.exchange_done("a.example", b"GET", 200, 0.1)
    assert feed.counters().services["a.example"].by_status() == {("GET", 200): 1}


async def test_a_worker_of_the_generation_before_is_a_guest() -> None:
    """It gets every table and counts, but nobody takes anything over from it, and it makes nobody ready."""
    loop = asyncio.get_running_loop()
    feed, own, former = Feed(), Rendezvous(), Rendezvous()
    told: list[int] = []
    server = FeedServer(feed, own.socket, 1, told.append)
    late: list[RoutingTable] = []
    server.on_late = late.append
    before = Counters()
    before.connections_total = 5
    server.counted_before(before)
    await server.start()
    assert await server.recover() is None
    await server.welcome(former.socket)
    registry = Registry()
    registry.register(LeaseRequest("a.example", Backend("192.0.2.1", 80), 60), 0.0)
    await feed.publish(registry.table)
    worker = Worker()
    worker.counters.connections_total = 2
    client = FeedClient(worker, former.path, 0, loop.time)
    client._table = RoutingTable(99)
    presented = certificate(1.0)
    client.presents(CertificateTable([presented]))
    client.serving()
    running = asyncio.create_task(client.run())
    try:
        async with asyncio.timeout(20):
            await server.welcomed()
            # What it has from its own control is asked for before it is given anything.
            assert await server.certificates_of([presented.name]) == [presented]
            assert worker.got == []
            server.feed_guests()
            await client.supplied()
            assert worker.got == [RoutingTable(registry.table.version, registry.table.services)]
            assert (server.serving, server.connected, late) == (0, 0, [])
            assert feed.counters().connections_total == 7
            worker.counters.connections_total = 3
            await server.refresh()
            assert feed.counters().connections_total == 8
            running.cancel()
            await asyncio.wait([running])
            worker.counters.connections_total = 4
            await client.close()
            while feed.subscribers:
                await asyncio.sleep(0.001)
            assert feed.counters().connections_total == 9
    finally:
        running.cancel()
        await server.close()
        own.close()
        former.close()
