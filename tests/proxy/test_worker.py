"""A worker's life: what it does with tables beside routing by them, and how it ends."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace

import pytest

from portero_py.config.model import Config, Limits
from portero_py.core.health import Evidence, Failure
from portero_py.core.model import Backend, LeaseRequest, Standing
from portero_py.core.registry import LINGER, Registry
from portero_py.errors import UpstreamTimeout
from portero_py.proxy.endpoints import Record
from portero_py.proxy.worker import Worker
from tests.waiting import until


async def test_it_forgets_what_it_counted_and_saw_of_services_that_are_gone() -> None:
    worker, registry = Worker(Config(), asyncio.get_running_loop(), log_descriptor=2), Registry()
    for service, ttl in (("gone.example", 1), ("stays.example", 10_000)):
        registry.register(LeaseRequest(service, Backend("::1", 1), ttl), 0.0)
        [lease] = registry.table.services[service].leases
        worker._surroundings.health.failed(lease, None, Failure.PROMPT, "refused", began=0.0, now=0.0)
        worker.counters.exchange_done(service, b"GET", 200, 0.1)
    try:
        registry.expire(1.0)
        worker.apply(registry.table)
        registry.expire(1.0 + LINGER)
        worker.apply(registry.table)
        await until(lambda: "gone.example" not in worker.counters.services)
        assert set(worker.counters.services) == {"stays.example"}
        assert len(worker._surroundings.health) == 1
    finally:
        await worker.drain(0.0)


async def test_a_drain_refuses_the_new_ends_the_idle_and_waits_for_those_at_work() -> None:
    worker, sock = Worker(Config(), asyncio.get_running_loop(), log_descriptor=2), socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    sock.setblocking(False)
    address = sock.getsockname()
    await worker.start([sock], tls=False)
    idle, idle_writer = await asyncio.open_connection(*address)
    idle_writer.write(b"GET / HTTP/1.1\r\nHost: nobody.example\r\n\r\n")
    assert (await idle.readuntil(b"for this host\n")).startswith(b"HTTP/1.1 404")
    busy, busy_writer = await asyncio.open_connection(*address)
    busy_writer.write(b"GET / HTTP/1.1\r\nHost: nobody.")
    draining = asyncio.create_task(worker.drain(30.0))
    assert await idle.read() == b""
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*address)
    assert not draining.done()
    busy_writer.write(b"example\r\n\r\n")
    assert (await busy.read()).startswith(b"HTTP/1.1 404")
    await draining
    for writer in (idle_writer, busy_writer):
        writer.close()
        await writer.wait_closed()


async def test_a_fault_while_it_forgets_what_is_gone_is_not_the_last_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker, registry = Worker(Config(), asyncio.get_running_loop(), log_descriptor=2), Registry()
    surroundings = worker._surroundings
    faults = [RuntimeError("a fault")]

    def prune() -> bool:
        if faults:
            raise faults.pop()
        return type(surroundings.pools).prune(surroundings.pools)

    monkeypatch.setattr(surroundings.pools, "prune", prune)
    worker.counters.exchange_done("gone.example", b"GET", 200, 0.1)
    worker.apply(registry.table)
    async with asyncio.timeout(30):
        while "was not forgotten" not in caplog.text:
            await asyncio.sleep(0.005)
        worker.apply(registry.table)
        while worker.counters.services:
            await asyncio.sleep(0.005)
    await worker.drain(0.0)


@pytest.mark.parametrize("limit", [0, 2])
async def test_clients_who_wait_at_a_full_listener_come_in_when_its_limit_is_raised(limit: int) -> None:
    config = Config(limits=Limits(connections_per_listener=1))
    worker, sock = Worker(config, asyncio.get_running_loop(), log_descriptor=2), socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    sock.setblocking(False)
    address = sock.getsockname()
    await worker.start([sock], tls=False)
    _, busy = await asyncio.open_connection(*address)
    busy.write(b"GET / HTTP/1.1\r\nHost: nobody.")
    await until(lambda: worker.counters.refused["listener_connections"])
    waits, writer = await asyncio.open_connection(*address)
    writer.write(b"GET / HTTP/1.1\r\nHost: nobody.example\r\n\r\n")
    worker.reconfigure(replace(config, limits=Limits(connections_per_listener=limit)))
    async with asyncio.timeout(30):
        assert (await waits.readuntil(b"for this host\n")).startswith(b"HTTP/1.1 404")
    await worker.drain(0.0)
    for each in (busy, writer):
        each.close()


async def test_a_drain_is_over_for_those_who_do_not_finish_in_time() -> None:
    worker, sock = Worker(Config(), asyncio.get_running_loop(), log_descriptor=2), socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    sock.setblocking(False)
    await worker.start([sock], tls=False)
    reader, writer = await asyncio.open_connection(*sock.getsockname())
    writer.write(b"GET / HTTP/1.1\r\nHost: nobody.")
    await asyncio.sleep(0)
    while not worker.counters.connections_open:
        await asyncio.sleep(0)
    await worker.drain(0.0)
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_it_tells_what_there_is_to_say_of_backends() -> None:
    worker, registry = Worker(Config(), asyncio.get_running_loop(), log_descriptor=2), Registry()
    told: list[Evidence] = []
    worker.tell(told.append)
    for service, port in (("one.example", 1), ("one.example", 2), ("two.example", 1)):
        registry.register(LeaseRequest(service, Backend("::1", port), None), 0.0)
    worker.apply(registry.table)
    surroundings = worker._surroundings
    try:
        for name, times in (("one.example", 3), ("two.example", 1)):
            of = registry.table.services[name]
            for _ in range(times):
                tried = Record()
                tried.lease = of.leases[0]
                late = UpstreamTimeout("too slow")
                surroundings.outcomes.failed(tried, registry.table, Failure.HANGS, late, None, 1.0)
        held = registry.table.services["one.example"].leases[1]
        pool = surroundings.pools.of(held, b"one.example")
        pool.claims += 2
        assert sorted(worker.standings(""), key=lambda each: (each.service, each.port)) == [
            Standing("one.example", "::1", 1, 0, True, "too slow"),
            Standing("one.example", "::1", 2, 2, False, ""),
            Standing("two.example", "::1", 1, 0, False, "too slow"),
        ]
        assert [each.port for each in worker.standings("two.example")] == [1]
        pool.claims -= 2
        assert told == [Evidence("one.example", "::1", 1, True, "too slow")]
    finally:
        await worker.drain(0.0)
