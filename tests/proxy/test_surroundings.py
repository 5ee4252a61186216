"""What connections and exchanges ask of their process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from portero_py.config.model import Config, Limits, Log, Timeouts
from portero_py.core.certificates import CertificateTable
from portero_py.errors import BadRequest
from portero_py.proxy.deadlines import Deadlines
from portero_py.proxy.downstream.connection import Connections
from portero_py.proxy.peer import Peer
from portero_py.proxy.surroundings import Surroundings
from portero_py.wire.headers import Forwarding
from tests.proxy.downstream.tls_listener import issued

QUIET = Config(log=Log(access="off"))


class Connection:
    """A client's connection that counts what it is asked."""

    deadline = 0.0

    def __init__(self) -> None:
        self.drains = 0
        self.kills = 0

    def start_drain(self) -> None:
        self.drains += 1

    def announce_drain(self) -> None: ...

    @property
    def is_tunnel(self) -> bool:
        return False

    def end_tunnel(self) -> None: ...

    def idle_seconds(self, now: float) -> float:
        return 0.0

    def kill(self) -> None:
        self.kills += 1

    def on_deadline(self, now: float) -> None: ...


@pytest.fixture
async def surroundings() -> AsyncIterator[Surroundings]:
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(loop)
    yield Surroundings(QUIET, loop, deadlines, Connections(loop, 8, lambda: 0))
    deadlines.close()


async def test_no_two_requests_have_the_same_id(surroundings: Surroundings) -> None:
    loop = asyncio.get_running_loop()
    another = Surroundings(QUIET, loop, surroundings.deadlines, surroundings.connections)
    ids = [each.next_request_id() for each in (surroundings, another) for _ in range(100)]
    assert len(set(ids)) == 200


async def test_a_host_is_misdirected_when_another_certificate_is_the_one_for_it(
    surroundings: Surroundings,
) -> None:
    one, other = issued("a.example"), issued("b.example")
    surroundings.certificates = CertificateTable([one, other], 1)
    assert surroundings.misdirected(one, b"b.example")
    assert not surroundings.misdirected(one, b"A.example:443")
    assert not surroundings.misdirected(one, b"nobody.example")
    assert not surroundings.misdirected(one, b"no host")


async def test_a_connection_is_watched_and_counted_as_long_as_it_lives(surroundings: Surroundings) -> None:
    connection, successor = Connection(), Connection()
    surroundings.connection_opened(connection)
    surroundings.connection_succeeded(connection, successor)
    assert surroundings.counters.connections_open == len(surroundings.deadlines) == 1
    surroundings.connections.start_drain()
    assert (connection.drains, successor.drains) == (0, 1)
    surroundings.connection_closed(successor)
    assert surroundings.counters.connections_open == len(surroundings.deadlines) == 0
    assert surroundings.counters.connections_total == 1


async def test_another_configuration_holds_at_once(
    surroundings: Surroundings, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    parser = surroundings.request_parser
    changed = replace(QUIET, log=Log(access="json"), timeouts=Timeouts(head=3), limits=Limits(body_bytes=7))
    surroundings.configure(changed)
    assert (surroundings.timeouts.head, surroundings.limits.body_bytes) == (3, 7)
    assert surroundings.request_parser is not parser
    log = surroundings.access_log
    surroundings.configure(replace(changed, limits=Limits()))
    assert surroundings.access_log is log
    peer = Peer("192.0.2.1", 5, Forwarding(b"192.0.2.1", b"http", trusted=False))
    surroundings.request_refused(peer, BadRequest("no request"), b"id-1")
    surroundings.configure(QUIET)  # the log is closed, and what it had was written
    assert surroundings.counters.errors == {"bad_request": 1}
    assert b'"reason":"bad_request"' in capfdbinary.readouterr().out
