"""Ticket keys by a clock of the test's own, and what clients with tickets of any age meet."""

from __future__ import annotations

import asyncio
import copy
import ctypes
import socket
import ssl
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from portero_py.config.model import Config, Registration
from portero_py.config.model import Tls as TlsConfig
from portero_py.proxy.downstream import ticket_keys
from portero_py.proxy.downstream.sni import FrontContext, FrontTls
from portero_py.proxy.downstream.ticket_keys import KEYS, NAME, PERIOD, TicketKeys, setter
from portero_py.proxy.downstream.tls import TlsTransport
from portero_py.run import preflight
from tests.proxy.downstream.tls_listener import Play, accepting, client, issued, table

A = issued("a.example")
VERSIONS = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


# Keys


def test_processes_that_share_a_beginning_share_the_keys_whenever_they_look(clock: Clock) -> None:
    parent = TicketKeys(clock=clock)
    busy, idle = (copy.copy(parent) for _ in range(2))
    for _ in range(3):
        clock.now += PERIOD
        assert busy.turn()
        assert not busy.turn()
    assert idle.turn()
    assert (idle.current, idle.former) == (busy.current, busy.former)
    forked_later = copy.copy(parent)
    assert forked_later.turn()
    assert (forked_later.current, forked_later.former) == (busy.current, busy.former)


def test_keys_change_at_the_end_of_their_period_and_not_before(clock: Clock) -> None:
    keys = TicketKeys(clock=clock)
    first = keys.current
    assert len(first) == len(keys.former) == KEYS
    clock.now += PERIOD - 0.001
    assert not keys.turn()
    assert keys.current == first
    clock.now += 0.001
    assert keys.turn()
    assert keys.former == first
    assert keys.former_name == first[:NAME]
    assert keys.current not in (first, keys.former)


def test_nothing_of_what_is_held_is_of_the_periods_before_the_last(clock: Clock) -> None:
    keys = TicketKeys(clock=clock)
    before = {value for value in vars(keys).values() if isinstance(value, bytes)}
    clock.now += 2 * PERIOD
    keys.turn()
    assert not before & {value for value in vars(keys).values() if isinstance(value, bytes)}


def test_a_successor_goes_on_with_the_keys_that_were_written(clock: Clock) -> None:
    keys = TicketKeys(clock=clock)
    clock.now += PERIOD
    keys.turn()
    clock.now += 7
    successor = TicketKeys(keys.written, clock=clock)
    for _ in range(3):
        assert (successor.current, successor.former) == (keys.current, keys.former)
        clock.now += PERIOD - 7
        assert keys.turn() == successor.turn()


def test_what_are_no_keys_is_as_if_nothing_was_written(clock: Clock) -> None:
    assert len({TicketKeys(written, clock=clock).current for written in (b"", b"x", b"x" * 999)}) == 3


def test_beginnings_differ(clock: Clock) -> None:
    assert TicketKeys(clock=clock).current != TicketKeys(clock=clock).current


def test_a_process_that_never_serves_can_forget_what_opens_tickets(clock: Clock) -> None:
    parent = TicketKeys(clock=clock)
    control = copy.copy(parent)
    control.forget()
    clock.now += PERIOD
    control.turn()
    parent.turn()
    assert not {control.current, control.former} & {parent.current, parent.former}


# OpenSSL


@pytest.fixture
def fresh_setter() -> Iterator[None]:
    setter.cache_clear()
    yield
    setter.cache_clear()


def test_this_python_lets_the_keys_be_set() -> None:
    assert setter() is not None


@pytest.mark.usefixtures("fresh_setter")
@pytest.mark.parametrize(
    "lack", ["version", "implementation", "symbol", "library", "name", "refusal", "ciphers"]
)
def test_where_keys_cannot_be_set_it_is_noticed(lack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self, _: str) -> None:
            if lack == "library":
                raise OSError("not found")
            if lack == "symbol":
                return

            def control(*_: object) -> int:
                return 0 if lack == "refusal" else 1  # says yes and does nothing

            self.SSL_CTX_ctrl: Any = control

    match lack:
        case "version":
            monkeypatch.setattr(ticket_keys, "_KNOWN", frozenset())
        case "implementation":
            monkeypatch.setattr(sys, "implementation", SimpleNamespace(name="pypy"))
        case "ciphers":
            monkeypatch.setattr(ssl.SSLContext, "set_ciphers", refuse)
        case _:
            monkeypatch.setattr(ctypes, "CDLL", Library)
    assert setter() is None


def refuse(*_: object) -> None:
    raise ssl.SSLError("no such cipher")


def test_several_workers_without_common_keys_are_warned_of(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(
        tls=TlsConfig(cert_dir=str(tmp_path_factory.getbasetemp())),
        registration=Registration(secret="s", hmac_keys=(("", "k" * 32),)),
        workers=2,
    )
    assert not any("ticket" in warning for warning in preflight.require(config))
    monkeypatch.setattr(preflight, "setter", lambda: None)
    assert any("session ticket keys" in warning for warning in preflight.require(config))


# Clients


class Hello(asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        """Nothing is asked."""


class Worker:
    """One process of several: a listener of its own, the keys that all began with."""

    def __init__(self, shared: TicketKeys) -> None:
        self.front = FrontTls(TlsConfig())
        self.front._keys = copy.copy(shared)
        self.front._use_keys()
        self.front.apply(table(A))
        self.port = 0

    def opened(self, transport: TlsTransport) -> Hello:
        transport.write(b"hello\n")
        return Hello()

    async def ask(
        self, context: ssl.SSLContext, session: ssl.SSLSession | None = None, cut: int = 0
    ) -> tuple[bool, ssl.SSLSession]:
        """Whether the session was resumed, and the next one; the hello is cut after `cut` bytes."""
        return await asyncio.to_thread(self._ask, context, session, cut)

    def _ask(
        self, context: ssl.SSLContext, session: ssl.SSLSession | None, cut: int
    ) -> tuple[bool, ssl.SSLSession]:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname="a.example", session=session)
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for step in (tls.do_handshake, tls.read):
                while True:
                    try:
                        step()
                        break
                    except ssl.SSLWantReadError:
                        sent = outgoing.read()
                        if cut and sent:
                            plain.sendall(sent[:cut])
                            self.pause()
                            sent, cut = sent[cut:], 0
                        plain.sendall(sent)
                        incoming.write(plain.recv(9999))
        assert tls.session is not None
        return bool(tls.session_reused), tls.session

    def pause(self) -> None:
        """Until the loop has read what was sent."""
        raise NotImplementedError


@VERSIONS
def test_a_ticket_is_taken_by_every_worker_for_its_time_and_then_no_more(
    play: Play, version: ssl.TLSVersion, clock: Clock
) -> None:
    async def scene() -> None:
        shared = TicketKeys(clock=clock)
        one, other = Worker(shared), Worker(shared)
        async with (
            accepting(one.front, one.opened, 5) as (one.port, _),
            accepting(other.front, other.opened, 5) as (other.port, _),
        ):
            context = client(highest=version)
            reused, session = await one.ask(context)
            assert not reused
            assert (await other.ask(context, session))[0]
            clock.now += PERIOD  # the keys of the period before
            assert (await one.ask(context, session))[0]
            reused, kept = await other.ask(context, session)
            assert reused
            assert kept.id == session.id, "the former keys make no tickets"
            fresh = (await one.ask(context))[1]
            assert (await other.ask(context, fresh))[0]
            clock.now += PERIOD  # those before that are forgotten: a whole handshake, and no error
            for worker in (one, other):
                assert not (await worker.ask(context, session))[0]
                assert (await worker.ask(context, fresh))[0]
            counted = {key[2] for key in (*one.front.counters.handshakes, *other.front.counters.handshakes)}
            assert counted == {"ok"}

    play(scene)


@VERSIONS
def test_a_ticket_that_comes_in_a_later_packet_is_no_error(
    play: Play, version: ssl.TLSVersion, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        worker = Worker(TicketKeys(clock=clock))
        async with accepting(worker.front, worker.opened, 5) as (worker.port, _):
            context = client(highest=version)
            _, session = await worker.ask(context)
            clock.now += PERIOD
            loop = asyncio.get_running_loop()
            seen: list[int] = []
            front = worker.front
            look = front.context_for

            def seeing(hello: bytes) -> FrontContext:
                seen.append(len(hello))
                return look(hello)

            monkeypatch.setattr(front, "context_for", seeing)

            async def until_seen() -> None:
                while not seen:
                    await asyncio.sleep(0.001)

            def pause() -> None:
                asyncio.run_coroutine_threadsafe(until_seen(), loop).result(20)

            monkeypatch.setattr(worker, "pause", pause)
            reused, _ = await worker.ask(context, session, cut=40)
            assert not reused
            assert seen == [40]

    play(scene)


@VERSIONS
def test_without_a_way_to_set_keys_a_fresh_context_takes_over_and_nothing_fails(
    play: Play, version: ssl.TLSVersion, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portero_py.proxy.downstream.sni.setter", lambda: None)

    async def scene() -> None:
        worker = Worker(TicketKeys(clock=clock))
        async with accepting(worker.front, worker.opened, 5) as (worker.port, _):
            context = client(highest=version)
            session = (await worker.ask(context))[1]
            assert (await worker.ask(context, session))[0]
            clock.now += PERIOD
            reused, fresh = await worker.ask(context, session)
            assert not reused
            assert (await worker.ask(context, fresh))[0]

    play(scene)
