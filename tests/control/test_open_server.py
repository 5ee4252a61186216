"""A server for strangers does not wait for ever, nor for everybody, nor in the log."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from aiohttp import web

from portero_py.control import open_server
from portero_py.control.open_server import MOST_ASKED, Door, OpenSite, _Guest, quiet_logger
from tests.waiting import PATIENCE, until


async def hello(request: web.BaseRequest) -> web.Response:
    if request.path == "/bug":
        raise RuntimeError("a bug")
    return web.Response(text="hello")


@contextlib.asynccontextmanager
async def serving(
    door: Door, answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]] = hello
) -> AsyncIterator[int]:
    async def behind(request: web.BaseRequest) -> web.StreamResponse:
        response: web.StreamResponse = await door.busy(request, answer)
        return response

    runner = web.ServerRunner(web.Server(behind, access_log=None, logger=quiet_logger), shutdown_timeout=0.1)
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setblocking(False)
        await OpenSite(runner, sock, door).start()
        yield sock.getsockname()[1]
        await runner.cleanup()
    while len(door):
        await asyncio.sleep(0.001)
    assert not door._groups


async def sent(port: int, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    return reader, writer


async def rest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """What still comes until the server ends the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(PATIENCE):
            data = await reader.read()
    writer.close()
    with contextlib.suppress(ConnectionResetError):
        await writer.wait_closed()
    return data


REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


class Slow:
    """An answer that waits until it is told to go on."""

    def __init__(self) -> None:
        self.begun = 0
        self.go_on = asyncio.Event()

    async def __call__(self, request: web.BaseRequest) -> web.Response:
        self.begun += 1
        await self.go_on.wait()
        return web.Response(text="slow")

    async def has(self, begun: int) -> None:
        await until(lambda: self.begun >= begun)


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\nHost:"])
async def test_a_head_that_does_not_come_ends_the_connection(data: bytes) -> None:
    async with serving(Door("test", wait_seconds=0.05)) as port:
        assert await rest(*await sent(port, data)) == b""


async def test_so_does_the_next_head_and_an_answer_that_is_not_made() -> None:
    async with serving(Door("test", wait_seconds=0.05)) as port:
        assert (await rest(*await sent(port, REQUEST))).endswith(b"hello")
    async with serving(Door("test", busy_seconds=0.05), Slow()) as port:
        assert await rest(*await sent(port, REQUEST)) == b""


async def test_who_waits_longest_makes_way_for_who_has_something_to_say(
    caplog: pytest.LogCaptureFixture,
) -> None:
    door = Door("test", 4)
    async with serving(door) as port:
        strangers = [await sent(port, b"") for _ in range(20)]
        assert (await rest(*await sent(port, LAST))).endswith(b"hello")
        assert len(door) <= 4
        strangers[-1][1].write(LAST)
        assert (await rest(*strangers[-1])).endswith(b"hello")
        for stranger in strangers[:-3]:  # two were not in the way
            assert await rest(*stranger) == b""
        for _, writer in strangers[-3:-1]:
            writer.close()
            await writer.wait_closed()
    assert caplog.text.count("too many connections") == 1


async def test_nobody_who_is_busy_makes_way(caplog: pytest.LogCaptureFixture) -> None:
    slow = Slow()
    async with serving(Door("test", 4), slow) as port:
        busy = [await sent(port, LAST) for _ in range(4)]
        await slow.has(4)
        assert await rest(*await sent(port, LAST)) == b""
        slow.go_on.set()
        for each in busy:
            assert (await rest(*each)).endswith(b"slow")
        assert (await rest(*await sent(port, LAST))).endswith(b"slow")


def guest(door: Door, host: str, sock: socket.socket | None = None) -> tuple[_Guest, Transport]:
    made, transport = _Guest(door, asyncio.Protocol), Transport(host, sock)
    made.connection_made(transport)
    return made, transport


class Transport(asyncio.Transport):
    """As much of one as a door needs."""

    def __init__(self, host: str, sock: socket.socket | None = None) -> None:
        super().__init__({"peername": (host, 1), "socket": sock})
        self.is_gone = False

    def abort(self) -> None:
        self.is_gone = True


@pytest.mark.parametrize(
    ("hosts", "one"),
    [
        (["192.0.2.1", "::ffff:192.0.2.1"], "192.0.2.1"),
        (["2001:db8::1", "2001:db8::2:0:0:1"], "2001:db8::3"),
        (["fe80::1%eth0", "fe80::2%eth1"], "fe80::3"),
    ],
)
async def test_who_has_most_places_makes_way(hosts: list[str], one: str) -> None:
    door = Door("test", 4)
    others = [guest(door, "198.51.100.1"), guest(door, "198.51.100.2")]
    inside = [guest(door, host) for host in hosts]
    new, _ = guest(door, one)
    assert [transport.is_gone for _, transport in inside] == [True, False]
    assert not any(transport.is_gone for _, transport in others)
    assert len(door) == 4
    for each in (*(each for each, _ in (*inside, *others)), new):
        each.end()
        each.connection_lost(None)
        each.end()
    assert len(door) == 0


async def test_a_burst_of_those_who_have_something_to_say_is_heard() -> None:
    slow = Slow()
    async with serving(Door("test", 4), slow) as port:
        with contextlib.ExitStack() as open_ones:
            raw = [open_ones.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(4)]
            late = open_ones.enter_context(socket.create_connection(("127.0.0.1", port)))
            for each in raw:
                each.sendall(LAST)
            # All of this came before the server had its turn.
            await slow.has(4)
            late.setblocking(False)
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.get_running_loop().sock_recv(late, 1) == b""
            slow.go_on.set()
            for each in raw:
                each.setblocking(False)
                assert (await asyncio.get_running_loop().sock_recv(each, 4096)).startswith(b"HTTP/1.1 200")


@pytest.fixture
def spoken() -> Iterator[socket.socket]:
    """A socket with something to read."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"x")
        yield ours


async def test_unread_bytes_count_only_before_anything_was_read(spoken: socket.socket) -> None:
    door = Door("test", 1)
    talker, its_transport = guest(door, "192.0.2.1", spoken)
    turned_away, _ = guest(door, "192.0.2.2")
    assert len(door) == 1
    assert not its_transport.is_gone
    # It goes on and on, and takes no answer: there is always more to read.
    talker.data_received(b"x")
    talker.begin()
    talker.end()
    let_in, transport = guest(door, "192.0.2.2")
    assert its_transport.is_gone
    assert not transport.is_gone
    for each in (talker, turned_away, let_in):
        each.connection_lost(None)


async def test_who_was_just_heard_stays_until_its_request_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door("test", 1)
    heard, its_transport = guest(door, "192.0.2.1")
    heard.data_received(LAST)
    turned_away, transport = guest(door, "192.0.2.2")
    assert transport.is_gone
    assert not its_transport.is_gone
    # But for a moment only.
    monkeypatch.setattr(open_server, "HEARD_SECONDS", 0.0)
    let_in, let_in_transport = guest(door, "192.0.2.2")
    assert its_transport.is_gone
    # And half a head is no request.
    monkeypatch.setattr(open_server, "HEARD_SECONDS", 100.0)
    let_in.data_received(LAST[:-1])
    last, _ = guest(door, "192.0.2.3")
    assert let_in_transport.is_gone
    for each in (heard, turned_away, let_in, last):
        each.connection_lost(None)


async def test_who_does_not_take_its_answer_makes_way_first_even_when_busy() -> None:
    door = Door("test", 3)
    guests = [guest(door, "192.0.2.1") for _ in range(3)]
    guests[1][0].begin()
    guests[1][0].pause_writing()
    guests[2][0].begin()
    guests[2][0].pause_writing()
    guests[2][0].resume_writing()
    guests += [guest(door, "192.0.2.1")]
    assert [transport.is_gone for _, transport in guests] == [False, True, False, False]
    for each, _ in guests:
        each.connection_lost(None)
        each.pause_writing()
        each.resume_writing()
    assert len(door) == 0
    assert not door._movable


async def test_an_arrival_at_a_full_door_asks_about_a_few_only(
    spoken: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = Door("test", 500)
    asked: list[_Guest] = []
    has_spoken = _Guest.has_spoken

    def counted(self: _Guest) -> bool:
        asked.append(self)
        return has_spoken(self)

    monkeypatch.setattr(_Guest, "has_spoken", counted)
    guests = [guest(door, f"192.0.2.{number % 250}", spoken) for number in range(500)]
    assert not asked
    guests += [guest(door, "198.51.100.1")]
    assert len(asked) == MOST_ASKED
    for each, _ in guests:
        each.connection_lost(None)
    assert not door._movable


async def test_all_places_may_be_taken_by_many_addresses() -> None:
    door = Door("test", 4)
    guests = [guest(door, f"192.0.2.{number}") for number in range(5)]
    guests[1][0].begin()
    guests += [guest(door, "192.0.2.9")]
    # The second one was at work.
    assert [transport.is_gone for _, transport in guests] == [True, False, True, False, False, False]
    for each, _ in guests:
        each.connection_lost(None)
    assert len(door) == 0


async def test_a_bug_is_logged_and_a_malformed_request_is_not(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Door("test")) as port:
        assert b" 400 " in await rest(*await sent(port, b"no http\r\n\r\n"))
        assert not caplog.records
        request = b"GET /bug HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        assert b" 500 " in await rest(*await sent(port, request))
        assert "a bug" in caplog.text


async def test_an_answer_may_take_longer_and_hears_when_its_client_is_gone() -> None:
    door, lost = Door("test", busy_seconds=0.05), asyncio.Event()

    async def later(request: web.BaseRequest) -> web.Response:
        gone = door.may_take(request, 30)
        assert door.may_take(request, 30) is gone
        if request.path == "/lost":
            await gone
            lost.set()
        else:
            await asyncio.sleep(0.2)
            assert not gone.done()
        return web.Response(text="later")

    async with serving(door, later) as port:
        assert (await rest(*await sent(port, LAST))).endswith(b"later")
        _, writer = await sent(port, LAST.replace(b"/ ", b"/lost ", 1))
        async with asyncio.timeout(30):
            while not any(guest._lost for guest in door._inside.values()):
                await asyncio.sleep(0.001)
            writer.close()
            await lost.wait()
        await writer.wait_closed()


async def test_but_not_longer_than_it_said() -> None:
    door = Door("test")

    async def never(request: web.BaseRequest) -> web.Response:
        await door.may_take(request, 0.05)
        return web.Response()

    async with serving(door, never) as port:
        assert await rest(*await sent(port, REQUEST)) == b""
