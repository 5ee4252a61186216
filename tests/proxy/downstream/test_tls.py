"""The layer between a client's socket and its protocol, on real sockets, on asyncio and on uvloop.

After each scene the same questions: was every protocol told once that its connection is gone, and does the
wheel watch nothing any more?
"""

from __future__ import annotations

import asyncio
import gc
import shutil
import socket
import ssl
import subprocess
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import cast

import pytest

from portero_py.config.model import Tls
from portero_py.proxy.deadlines import Deadlines
from portero_py.proxy.downstream.sni import FrontSSLObject, FrontTls
from portero_py.proxy.downstream.tls import PIECE, RECORD, TlsTransport
from tests.proxy.downstream.tls_listener import Play, accepting, client, issued, table
from tests.proxy.downstream.tls_wire import (
    APPLICATION_DATA,
    ASK_FOR_NEW_KEYS,
    HANDSHAKE,
    NOTIFIED,
    RAGGED,
    RESET,
    ForgingWire,
    Wire,
    narrow_socket,
)
from tests.waiting import until

A = issued("a.example")
MUCH = bytes(range(256)) * 12_000  # 3 MB
VERSIONS = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])


class Above(asyncio.Protocol):
    """The protocol above: remembers what it is told, and does what the test says."""

    def __init__(self, transport: TlsTransport, on_data: Callable[[Above, bytes], None] | None) -> None:
        self.transport = transport
        self.received = bytearray()
        self.reads = 0
        self.thrown_away = 0
        self.ends = 0  # of the client's side
        self.ended = False  # write_eof was called
        self.full = False
        self.pauses = 0
        self.lost: list[Exception | None] = []
        self._on_data = on_data

    def data_received(self, data: bytes) -> None:
        assert not self.lost
        if self.ended:
            self.thrown_away += len(data)
            return
        self.reads += 1
        self.received += data
        if self._on_data is not None:
            self._on_data(self, data)

    def eof_received(self) -> None:
        assert not self.lost
        self.ends += 1

    def pause_writing(self) -> None:
        assert not self.full
        self.full = True
        self.pauses += 1

    def resume_writing(self) -> None:
        assert self.full
        self.full = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


class Layer:
    """The layer on a port, and the protocols above it."""

    def __init__(
        self, tls: FrontTls, on_data: Callable[[Above, bytes], None] | None, kind: type[Above]
    ) -> None:
        self.tls = tls
        self.port = 0
        self.deadlines: Deadlines
        self.made: list[Above] = []
        self._on_data = on_data
        self._kind = kind

    def opened(self, transport: TlsTransport) -> Above:
        above = self._kind(transport, self._on_data)
        transport.set_protocol(above)
        self.made.append(above)
        return above

    async def above(self) -> Above:
        """The only protocol, once it is there."""
        await until(lambda: bool(self.made))
        (above,) = self.made
        return above

    async def lost(self) -> None:
        """Wait until the only connection is gone."""
        above = await self.above()
        await until(lambda: bool(above.lost))

    def wire(self, version: ssl.TLSVersion | None = None) -> Wire:
        return Wire(self.port, client(highest=version))

    def pass_time(self, seconds: float) -> None:
        """Let the wheel believe so."""
        self.deadlines.advance(asyncio.get_running_loop().time() + seconds)


@asynccontextmanager
async def layer(
    on_data: Callable[[Above, bytes], None] | None = None,
    *,
    kind: type[Above] = Above,
    certified: bool = True,
) -> AsyncIterator[Layer]:
    front = FrontTls(Tls())
    if certified:
        front.apply(table(A))
    found = Layer(front, on_data, kind)
    async with accepting(front, found.opened, 5) as (found.port, found.deadlines):
        yield found
        await until(lambda: not len(found.deadlines) and all(above.lost for above in found.made))
        await asyncio.sleep(0)
        assert [len(above.lost) for above in found.made] == [1] * len(found.made)


def echo(above: Above, data: bytes) -> None:
    above.transport.write(data)


def answer_and_close(above: Above, data: bytes) -> None:
    above.transport.write(b"answer to " + data)
    above.transport.close()


class EchoUnderPressure(Above):
    """Echoes, and does not read while its client does not."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.transport.write(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.transport.resume_reading()


# Bytes


@VERSIONS
def test_much_passes_both_ways_unharmed_and_a_client_that_does_not_read_is_felt_above(
    play: Play, version: ssl.TLSVersion
) -> None:
    async def scene() -> None:
        async with layer(kind=EchoUnderPressure) as found:
            reads = threading.Event()
            much = MUCH * 3

            def talk() -> bytes:
                with found.wire(version) as wire:
                    return wire.shake().converse(much, reads.is_set)

            talking = asyncio.create_task(asyncio.to_thread(talk))
            above = await found.above()
            await until(lambda: above.full)
            taken = len(above.received)
            assert taken < len(much)
            await asyncio.sleep(0.05)
            assert len(above.received) == taken
            reads.set()
            assert await talking == much
            assert above.received == much

    play(scene)


@VERSIONS
def test_reading_stops_and_goes_on_in_the_middle_of_an_upload(play: Play, version: ssl.TLSVersion) -> None:
    def pause(above: Above, data: bytes) -> None:
        above.transport.pause_reading()

    async def scene() -> None:
        async with layer(pause) as found:

            def upload() -> str:
                with found.wire(version) as wire:
                    wire.shake().send(MUCH)
                    return wire.read_all()[1]

            uploading = asyncio.create_task(asyncio.to_thread(upload))
            above = await found.above()
            seen = 0
            while len(above.received) < len(MUCH):
                await until(lambda seen=seen: len(above.received) > seen)  # type: ignore[misc]
                seen = len(above.received)
                await asyncio.sleep(0.005)
                assert len(above.received) == seen, "it reads on"
                above.transport.resume_reading()
            above.transport.close()
            assert await uploading == NOTIFIED
            assert above.received == MUCH

    play(scene)


@VERSIONS
def test_a_handshake_may_come_byte_by_byte(play: Play, version: ssl.TLSVersion) -> None:
    def slowly(wire: Wire, data: bytes) -> None:
        for position in range(len(data)):
            wire.socket.sendall(data[position : position + 1])

    async def scene() -> None:
        async with layer(echo) as found:

            def talk() -> bytes:
                with found.wire(version) as wire:
                    slowly(wire, wire.hello())
                    wire.shake(lambda data: slowly(wire, data))
                    slowly(wire, wire.seal(b"slow"))
                    return wire.read(4)

            assert await asyncio.to_thread(talk) == b"slow"

    play(scene)


def test_a_request_may_come_with_the_last_packet_of_the_handshake(play: Play) -> None:
    async def scene() -> None:
        async with layer(echo) as found:

            def talk() -> tuple[bytes, bool]:
                with found.wire() as wire:
                    last = wire.shake_but_last()
                    wire.socket.sendall(last + wire.seal(b"early"))
                    got = wire.read(5)
                    session = wire.tls.session
                    return got, session is not None and session.has_ticket

            assert await asyncio.to_thread(talk) == (b"early", True)

    play(scene)


def test_a_large_body_may_come_with_the_last_packet_of_the_handshake(play: Play) -> None:
    """More than is given to OpenSSL at once; read in one go, because the listener looks only then."""
    body = bytes(range(256)) * 800

    async def scene() -> None:
        async with layer(None) as found:
            with found.wire() as wire:
                last = await asyncio.to_thread(wire.shake_but_last)
                wire.socket.sendall(last + wire.seal(body))  # the loop stands still meanwhile
                above = await found.above()
                await until(lambda: len(above.received) >= len(body))
                assert above.received == body

    play(scene)


def test_a_part_of_a_request_may_come_with_the_last_packet_of_the_handshake(play: Play) -> None:
    async def scene() -> None:
        async with layer(echo) as found:

            def begin(wire: Wire) -> bytes:
                last, record = wire.shake_but_last(), wire.seal(b"in two parts")
                wire.socket.sendall(last + record[:7])
                return record[7:]

            with found.wire() as wire:
                rest = await asyncio.to_thread(begin, wire)
                above = await found.above()
                assert not above.received
                wire.socket.sendall(rest)
                assert await asyncio.to_thread(wire.read, 12) == b"in two parts"

    play(scene)


def test_a_resumed_tls_1_2_client_may_send_its_request_with_its_last_words(play: Play) -> None:
    async def scene() -> None:
        async with layer(echo) as found:
            context = client(highest=ssl.TLSVersion.TLSv1_2)

            def talk() -> tuple[bool | None, bytes]:
                with Wire(found.port, context) as wire:
                    session = wire.shake().tls.session
                    wire.send(b"first")
                    assert wire.read(5) == b"first"
                with Wire(found.port, context, session) as wire:
                    last = wire.shake_but_last()
                    wire.socket.sendall(last + wire.seal(b"again"))
                    return wire.tls.session_reused, wire.read(5)

            assert await asyncio.to_thread(talk) == (True, b"again")

    play(scene)


def test_a_ticket_comes_without_a_request_too(play: Play) -> None:
    async def scene() -> None:
        async with layer() as found:
            context = client()

            def talk() -> bool | None:
                with Wire(found.port, context) as wire:
                    wire.shake()
                    while not wire.tls.session.has_ticket:  # type: ignore[union-attr]
                        wire.incoming.write(wire.socket.recv(65536))
                        with suppress(ssl.SSLWantReadError):
                            wire.tls.read(1)
                    session = wire.tls.session
                with Wire(found.port, context, session) as wire:
                    return wire.shake().tls.session_reused

            assert await asyncio.to_thread(talk)

    play(scene)


@VERSIONS
def test_many_records_are_passed_on_in_one_piece(play: Play, version: ssl.TLSVersion) -> None:
    async def scene() -> None:
        async with layer() as found:
            with found.wire(version) as wire:
                await asyncio.to_thread(wire.shake)
                above = await found.above()
                wire.socket.sendall(b"".join(wire.seal(b"%03d" % number) for number in range(300)))
                await until(lambda: len(above.received) == 900)
                assert above.received == b"".join(b"%03d" % number for number in range(300))
                assert above.reads == 1

    play(scene)


@VERSIONS
def test_a_record_may_come_in_any_two_parts(play: Play, version: ssl.TLSVersion) -> None:
    async def scene() -> None:
        async with layer() as found:
            with found.wire(version) as wire:
                await asyncio.to_thread(wire.shake)
                above = await found.above()
                whole = b""
                for cut in (1, 5, 6, 15, 30):
                    record = wire.seal(b"a record that is cut")
                    wire.socket.sendall(record[:cut])
                    await asyncio.sleep(0.005)
                    assert above.received == whole
                    wire.socket.sendall(record[cut:])
                    whole += b"a record that is cut"
                    await until(lambda whole=whole: above.received == whole)  # type: ignore[misc]

    play(scene)


@VERSIONS
def test_whatever_is_bytes_may_be_written(play: Play, version: ssl.TLSVersion) -> None:
    pieces = (
        b"",
        b"bytes ",
        bytearray(b"bytearray "),
        memoryview(b"memoryview "),
        bytearray(),
        memoryview(b""),
    )
    large = (bytearray(MUCH[:100_000]), memoryview(MUCH)[7:200_000], MUCH[:16_384], MUCH[:16_385])

    def answer(above: Above, data: bytes) -> None:
        for piece in (*pieces, *large):
            above.transport.write(piece)
        above.transport.close()

    async def scene() -> None:
        async with layer(answer) as found:

            def talk() -> tuple[bytes, str]:
                with found.wire(version) as wire:
                    wire.shake().send(b"?")
                    return wire.read_all()

            assert await asyncio.to_thread(talk) == (b"".join((*pieces, *large)), NOTIFIED)

    play(scene)


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_a_client_may_ask_for_small_records(play: Play, version: str) -> None:
    """RFC 6066, 4: what is one record for others is 32 for it."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl is not installed")
    answers = [
        b"%d:" % size + bytes(range(48, 58)) * (size // 10) + b"\n" for size in (100, 5000, 16_000, 50_000)
    ]

    def answer(above: Above, data: bytes) -> None:
        for one in answers:
            above.transport.write(one)
        above.transport.close()

    async def scene() -> None:
        async with layer(answer) as found:

            def talk() -> bytes:
                command = [
                    program,
                    "s_client",
                    "-quiet",
                    version,
                    "-maxfraglen",
                    "512",
                    "-servername",
                    "a.example",
                ]
                command += ["-connect", f"127.0.0.1:{found.port}"]
                done = subprocess.run(command, input=b"?\n", capture_output=True, timeout=10, check=False)
                return done.stdout

            assert await asyncio.to_thread(talk) == b"".join(answers)

    play(scene)


# Broken records


@VERSIONS
def test_what_came_before_a_broken_record_arrives_then_the_alert_then_the_end(
    play: Play, version: ssl.TLSVersion
) -> None:
    async def scene() -> None:
        async with layer() as found:

            def talk() -> tuple[bytes, str, str]:
                with found.wire(version) as wire:
                    wire.shake()
                    whole, broken = wire.seal(b"whole"), bytearray(wire.seal(b"broken"))
                    broken[-1] ^= 1
                    wire.socket.sendall(whole + broken)
                    return *wire.read_all(), wire.end()

            data, alert, end = await asyncio.to_thread(talk)
            assert (data, alert, end) == (b"", "SSLV3_ALERT_BAD_RECORD_MAC", "FIN")
            assert (await found.above()).received == b"whole"

    play(scene)


def test_an_answer_to_what_came_before_a_broken_record_is_no_reason_to_stumble(play: Play) -> None:
    def answer(above: Above, data: bytes) -> None:
        above.transport.write(b"answer")
        above.ended = True
        above.transport.write_eof()

    async def scene() -> None:
        async with layer(answer) as found:

            def talk() -> None:
                with found.wire() as wire:
                    wire.shake()
                    whole, broken = wire.seal(b"whole"), bytearray(wire.seal(b"broken"))
                    broken[-1] ^= 1
                    wire.socket.sendall(whole + broken)
                    wire.read_all()

            await asyncio.to_thread(talk)
            assert (await found.above()).received == b"whole"

    play(scene)


def test_bytes_that_are_no_record_end_the_connection(play: Play) -> None:
    async def scene() -> None:
        async with layer() as found:

            def talk() -> str:
                with found.wire() as wire:
                    wire.shake()
                    wire.socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    return wire.read_all()[1]

            assert "ALERT" in await asyncio.to_thread(talk)

    play(scene)


# The end, said by us


@VERSIONS
def test_close_sends_everything_then_the_end_of_tls_then_that_of_tcp(
    play: Play, version: ssl.TLSVersion
) -> None:
    def answer(above: Above, data: bytes) -> None:
        above.transport.write(MUCH * 3)
        above.transport.close()

    async def scene() -> None:
        async with layer(answer) as found:

            def talk() -> tuple[bytes, str]:
                with (
                    narrow_socket(found.port) as plain,
                    client(highest=version).wrap_socket(
                        plain, server_hostname="a.example", suppress_ragged_eofs=False
                    ) as secure,
                ):
                    secure.sendall(b"?")
                    stuck.wait(10)
                    got = bytearray()
                    while part := secure.recv(20_000):
                        got += part
                    secure.unwrap()
                    return bytes(got), NOTIFIED

            stuck = threading.Event()
            talking = asyncio.create_task(asyncio.to_thread(talk))
            above = await found.above()
            await until(lambda: above.full)
            stuck.set()
            assert await talking == (MUCH * 3, NOTIFIED)

    play(scene)


@VERSIONS
def test_after_write_eof_the_client_gets_everything_and_what_it_sends_is_thrown_away(
    play: Play, version: ssl.TLSVersion
) -> None:
    def refuse(above: Above, data: bytes) -> None:
        if not above.ended:
            above.ended = True
            above.transport.write(MUCH)
            above.transport.write_eof()

    async def scene() -> None:
        async with layer(refuse) as found:

            def talk() -> tuple[bytes, str, str]:
                with found.wire(version) as wire:
                    wire.shake().send(MUCH)
                    wire.send(MUCH)
                    return *wire.read_all(), wire.end()

            assert await asyncio.to_thread(talk) == (MUCH, NOTIFIED, "FIN")
            await found.lost()
            above = await found.above()
            assert MUCH.startswith(above.received)
            assert above.thrown_away > len(MUCH)
            assert above.transport._incoming.pending == 0

    play(scene)


def test_the_end_of_tls_after_write_eof_is_thrown_away_too(play: Play) -> None:
    def refuse(above: Above, data: bytes) -> None:
        above.ended = True
        above.transport.write_eof()

    async def scene() -> None:
        async with layer(refuse) as found:

            def talk() -> tuple[bytes, str]:
                with found.wire() as wire:
                    wire.shake().send(b"?")
                    answer = wire.read_all()
                    wire.socket.sendall(wire.farewell())
                    return answer

            assert await asyncio.to_thread(talk) == (b"", NOTIFIED)

    play(scene)


def test_abort_ends_at_once_and_without_a_word(play: Play) -> None:
    def cut_off(above: Above, data: bytes) -> None:
        above.transport.write(MUCH * 3)
        above.transport.abort()

    async def scene() -> None:
        async with layer(cut_off) as found:

            def talk() -> tuple[bytes, str]:
                with found.wire() as wire:
                    wire.shake().send(b"?")
                    return wire.read_all()

            data, end = await asyncio.to_thread(talk)
            assert len(data) < 3 * len(MUCH)
            assert (MUCH * 3).startswith(data)
            assert end in (RAGGED, RESET)

    play(scene)


@pytest.mark.parametrize("way", ["close", "abort", "write_eof"])
def test_nothing_that_is_done_after_the_end_raises(play: Play, way: str) -> None:
    def everything(transport: TlsTransport) -> None:
        for again in ("write_eof", "close", "abort"):
            transport.write(b"too late")
            transport.write(MUCH)
            transport.pause_reading()
            transport.resume_reading()
            transport.get_write_buffer_size()
            transport.get_extra_info("peername")
            getattr(transport, again)()
            getattr(transport, again)()

    def end(above: Above, data: bytes) -> None:
        above.ended = True
        getattr(above.transport, way)()
        everything(above.transport)

    async def scene() -> None:
        async with layer(end) as found:

            def talk() -> bytes:
                with found.wire() as wire:
                    wire.shake().send(b"?")
                    return wire.read_all()[0]

            assert await asyncio.to_thread(talk) == b""
            above = await found.above()
            await found.lost()
            assert above.transport.is_closing()
            everything(above.transport)

    play(scene)


# The end, said by the client


@VERSIONS
def test_a_client_that_says_goodbye_is_answered_in_kind(play: Play, version: ssl.TLSVersion) -> None:
    async def scene() -> None:
        async with layer() as found:

            def talk() -> tuple[bytes, str, str]:
                with found.wire(version) as wire:
                    wire.shake()
                    wire.socket.sendall(wire.seal(b"last words") + wire.farewell())
                    return *wire.read_all(), wire.end()

            assert await asyncio.to_thread(talk) == (b"", NOTIFIED, "FIN")
            assert (await found.above()).received == b"last words"

    play(scene)


def test_an_answer_to_the_last_words_still_reaches_the_client(play: Play) -> None:
    async def scene() -> None:
        async with layer(answer_and_close) as found:

            def talk() -> tuple[bytes, str]:
                with found.wire() as wire:
                    wire.shake()
                    wire.socket.sendall(wire.seal(b"last words") + wire.farewell())
                    return wire.read_all()

            assert await asyncio.to_thread(talk) == (b"answer to last words", NOTIFIED)

    play(scene)


@VERSIONS
def test_a_client_that_only_ends_its_tcp_is_gone(play: Play, version: ssl.TLSVersion) -> None:
    async def scene() -> None:
        async with layer(echo) as found:

            def talk() -> tuple[bytes, str]:
                with found.wire(version) as wire:
                    wire.shake().send(b"last words")
                    wire.read(10)
                    wire.socket.shutdown(socket.SHUT_WR)
                    return wire.read_all()

            assert await asyncio.to_thread(talk) == (b"", RAGGED)
            assert (await found.above()).lost == [None]

    play(scene)


@pytest.mark.parametrize("way", ["goodbye", "FIN"])
def test_the_protocol_hears_of_the_clients_end_even_when_bytes_are_left_that_nobody_takes(
    play: Play, way: str
) -> None:
    def answer(above: Above, data: bytes) -> None:
        while not above.full:
            above.transport.write(MUCH[:16_000])

    async def scene() -> None:
        async with layer(answer) as found:
            with found.wire() as wire:
                await asyncio.to_thread(wire.shake)
                wire.send(b"?")
                above = await found.above()
                await until(lambda: above.full)
                if way == "goodbye":
                    wire.socket.sendall(wire.farewell())
                else:
                    wire.socket.shutdown(socket.SHUT_WR)
                await until(lambda: above.ends == 1)
                assert above.transport.is_closing()
                assert not above.lost
                above.transport.abort()
                await found.lost()
                assert above.ends == 1

    play(scene)


@pytest.mark.parametrize("moment", ["at once", "after the hello", "after the handshake", "in a response"])
def test_a_client_may_vanish_at_any_moment(play: Play, moment: str) -> None:
    def answer(above: Above, data: bytes) -> None:
        for _ in range(20):
            above.transport.write(MUCH[:200_000])

    async def scene() -> None:
        async with layer(answer) as found:

            def vanish() -> None:
                wire = found.wire()
                if moment == "after the hello":
                    wire.socket.sendall(wire.hello())
                    wire.socket.recv(10)
                elif moment != "at once":
                    wire.shake()
                if moment == "in a response":
                    wire.send(b"?")
                    wire.read(10)
                wire.reset()

            await asyncio.to_thread(vanish)
            await until(lambda: sum(found.tls.counters.handshakes.values()) == 1)

    play(scene)


@pytest.mark.parametrize("said", ["hello", "garbage", "alert"])
def test_a_client_that_vanished_before_its_words_were_read_is_no_fault(play: Play, said: str) -> None:
    async def scene() -> None:
        async with layer() as found:
            for _ in range(5):
                wire = found.wire()
                hello = wire.hello()
                alert = b"\x15\x03\x01\x00\x02\x02\x30"  # fatal, unknown_ca
                wire.socket.sendall(
                    {"hello": hello, "garbage": b"\x16\x03\x01\x00\x05hello", "alert": alert}[said]
                )
                wire.reset()  # not a turn of the loop between
            await until(lambda: sum(found.tls.counters.handshakes.values()) == 5)

    play(scene)


def test_a_request_of_a_client_that_vanished_meanwhile_may_be_answered(play: Play) -> None:
    """The answer's first piece meets the reset, and there are more."""

    def answer(above: Above, data: bytes) -> None:
        for _ in range(10):
            above.transport.write(MUCH)
        above.ended = True
        above.transport.write_eof()

    async def scene() -> None:
        async with layer(answer) as found:
            wire = found.wire()
            await asyncio.to_thread(wire.shake)
            await found.above()
            wire.socket.sendall(wire.seal(b"?"))
            wire.reset()

    play(scene)


def test_a_response_to_a_client_that_vanished_meanwhile_may_be_ended(play: Play) -> None:
    async def scene() -> None:
        for way in ("write_eof", "close", "abort", "write"):
            async with layer() as found:
                wire = found.wire()
                await asyncio.to_thread(wire.shake)
                above = await found.above()
                wire.reset()
                time.sleep(0.01)  # not a turn of the loop: only the kernel knows
                if way == "write":
                    above.transport.write(MUCH)
                else:
                    getattr(above.transport, way)()
                above.transport.write(MUCH)
                above.transport.write_eof()
                above.transport.close()

    play(scene)


# New keys


def test_a_client_may_change_its_keys(play: Play) -> None:
    async def scene() -> None:
        async with layer(echo) as found:

            def talk() -> bytes:
                with ForgingWire(found.port) as wire:
                    got = b""
                    for number in range(5):
                        wire.socket.sendall(
                            wire.ask_for_new_keys() + wire.forge(APPLICATION_DATA, b"%d" % number)
                        )
                        got += wire.read(1)
                    return got

            assert await asyncio.to_thread(talk) == b"01234"

    play(scene)


def test_a_client_that_asks_for_new_keys_and_reads_nothing_cannot_fill_our_memory(play: Play) -> None:
    async def scene() -> None:
        async with layer() as found:
            most = 0

            def flood(wire: ForgingWire) -> None:
                with suppress(ConnectionError):
                    while True:
                        wire.socket.sendall(b"".join(wire.ask_for_new_keys() for _ in range(1000)))

            with await asyncio.to_thread(ForgingWire, found.port) as wire:
                above = await found.above()
                kernel = above.transport.get_extra_info("socket")
                kernel.setsockopt(
                    socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
                )  # or it would take megabytes first
                flooding = asyncio.create_task(asyncio.to_thread(flood, wire))
                while not above.lost:
                    held = above.transport._outgoing.pending + above.transport.get_write_buffer_size()
                    most = max(most, held)
                    await asyncio.sleep(0)
                await flooding
            assert most < 600_000

    play(scene)


def test_a_client_that_asks_for_new_keys_and_takes_them_goes_on(play: Play) -> None:
    """One that only sends for a long time, without an answer from above."""

    async def scene() -> None:
        async with layer() as found:

            def ask(wire: ForgingWire) -> None:
                wire.socket.sendall(b"".join(wire.ask_for_new_keys() for _ in range(3000)))
                wire.take(60_000)
                wire.socket.sendall(wire.forge(APPLICATION_DATA, b"still here"))

            with await asyncio.to_thread(ForgingWire, found.port) as wire:
                above = await found.above()
                await asyncio.to_thread(ask, wire)
                await until(lambda: above.received == b"still here")

    play(scene)


def test_words_in_the_middle_of_a_key_update_end_the_connection(play: Play) -> None:
    """OpenSSL can write nothing then."""

    async def scene() -> None:
        async with layer() as found:
            with await asyncio.to_thread(ForgingWire, found.port) as wire:
                above = await found.above()
                wire.socket.sendall(
                    wire.forge(APPLICATION_DATA, b"now") + wire.forge(HANDSHAKE, ASK_FOR_NEW_KEYS[:4])
                )
                await until(lambda: above.received == b"now")
                above.transport.write(b"answer")
                assert above.transport.is_closing()

    play(scene)


def test_openssl_changes_keys_in_the_middle_of_a_conversation(play: Play) -> None:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl is not installed")

    async def scene() -> None:
        async with layer(echo) as found:

            def talk() -> None:
                command = [
                    program,
                    "s_client",
                    "-connect",
                    f"127.0.0.1:{found.port}",
                    "-servername",
                    "a.example",
                ]
                with subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                ) as process:
                    giving_up = threading.Timer(10, process.kill)
                    giving_up.start()
                    assert process.stdin is not None
                    assert process.stdout is not None
                    for line in (b"first\n", b"K\n", b"second\n", b"k\n", b"third\n"):
                        process.stdin.write(line)
                        process.stdin.flush()
                        if len(line) > 2:
                            while process.stdout.readline() not in (line, b""):
                                pass
                        else:
                            while process.stdout.readline() not in (b"KEYUPDATE\n", b""):
                                pass
                    process.stdin.close()
                    giving_up.cancel()

            await asyncio.to_thread(talk)
            assert (await found.above()).received == b"first\nsecond\nthird\n"

    play(scene)


# Handshakes that come to nothing


def test_a_client_that_was_refused_gets_its_alert_and_is_ended_when_it_stays(play: Play) -> None:
    async def scene() -> None:
        async with layer(certified=False) as found:

            def refused(wire: Wire) -> str:
                with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
                    wire.shake()
                return wire.end()

            with found.wire() as wire:
                assert await asyncio.to_thread(refused, wire) == "FIN"
                assert len(found.deadlines) == 1
                found.pass_time(3)
                await asyncio.sleep(0.01)
                assert len(found.deadlines) == 1
                found.pass_time(7)
                await until(lambda: not len(found.deadlines))

    play(scene)


@pytest.mark.parametrize("sent", [0, 1, 5, 100, 10_000])
def test_a_handshake_that_stalls_is_ended(play: Play, sent: int) -> None:
    async def scene() -> None:
        async with layer() as found:
            with found.wire() as wire:
                wire.socket.sendall(wire.hello()[:sent])
                await until(lambda: len(found.deadlines) == 1)
                found.pass_time(3)
                await asyncio.sleep(0.01)
                assert len(found.deadlines) == 1
                found.pass_time(7)
                await until(lambda: not len(found.deadlines))
                assert found.tls.counters.handshakes == {("", "", "gone"): 1}

    play(scene)


def test_a_client_whose_handshake_is_complete_has_no_deadline_here(play: Play) -> None:
    async def scene() -> None:
        async with layer(echo) as found:
            with found.wire() as wire:
                await asyncio.to_thread(wire.shake)
                await found.above()
                assert len(found.deadlines) == 0
                found.pass_time(1000)
                wire.send(b"still here")
                assert await asyncio.to_thread(wire.read, 10) == b"still here"

    play(scene)


# What is left


@contextmanager
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("way", ["goodbye", "FIN", "reset", "close", "refused", "stalled"])
def test_a_connection_that_is_gone_leaves_no_cycle(play: Play, way: str) -> None:
    async def scene() -> None:
        async with layer(answer_and_close if way == "close" else None, certified=way != "refused") as found:
            born: list[weakref.ref[FrontSSLObject]] = []
            choose = found.tls.context.sni_callback
            assert choose is not None

            def remember(tls: FrontSSLObject, *rest: object) -> int | None:
                born.append(weakref.ref(tls))
                return choose(tls, *rest)  # type: ignore[arg-type]

            found.tls.context.sni_callback = remember  # type: ignore[assignment]

            def come_and_go() -> None:
                with found.wire() as wire:
                    if way == "stalled":
                        wire.socket.sendall(wire.hello())
                        wire.socket.recv(10)
                        wire.socket.recv(65536)
                        wire.reset()
                        return
                    if way == "refused":
                        with suppress(ssl.SSLError):
                            wire.shake()
                        return
                    wire.shake().send(b"?")
                    if way == "goodbye":
                        wire.socket.sendall(wire.farewell())
                    elif way == "FIN":
                        wire.socket.shutdown(socket.SHUT_WR)
                    elif way == "reset":
                        wire.reset()
                        return
                    wire.read_all()

            with no_collection():
                await asyncio.to_thread(come_and_go)
                await until(lambda: not len(found.deadlines) and all(above.lost for above in found.made))
                found.made.clear()
                await until(lambda: bool(born) and all(tls() is None for tls in born))

    play(scene)


class Seen:
    """One of the layer's buffers, and the most that was in it at once."""

    def __init__(self, buffer: ssl.MemoryBIO) -> None:
        self._buffer = buffer
        self.most = 0

    @property
    def pending(self) -> int:
        return self._buffer.pending

    def write(self, data: bytes) -> int:
        written = self._buffer.write(data)
        self.most = max(self.most, self._buffer.pending)
        return written

    def read(self) -> bytes:
        self.most = max(self.most, self._buffer.pending)
        return self._buffer.read()


def test_large_bodies_leave_no_large_buffers_behind(play: Play) -> None:
    """OpenSSL's never shrink: what was in them once is what an idle connection keeps."""

    async def scene() -> None:
        async with layer(None) as found:
            with found.wire() as wire:
                await asyncio.to_thread(wire.shake)
                above = await found.above()
                transport = above.transport
                incoming, outgoing = Seen(transport._incoming), Seen(transport._outgoing)
                transport._incoming, transport._outgoing = (
                    cast("ssl.MemoryBIO", incoming),
                    cast("ssl.MemoryBIO", outgoing),
                )
                await asyncio.to_thread(wire.send, MUCH)
                await until(lambda: len(above.received) >= len(MUCH))
                transport.write(MUCH)
                assert await asyncio.to_thread(wire.read, len(MUCH)) == MUCH
                assert 0 < outgoing.most <= RECORD + 300
                assert RECORD < incoming.most <= PIECE + RECORD + 300

    play(scene)
