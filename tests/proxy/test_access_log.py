"""One line an exchange, which never waits for its reader."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import orjson
import pytest

from portero_py.core.counters import Counters
from portero_py.proxy import access_log
from portero_py.proxy.access_log import AccessLog
from portero_py.proxy.downstream.http1 import Http1Downstream
from tests.proxy.dialogue import OK, World, get

if TYPE_CHECKING:
    from portero_py.proxy.endpoints import Record


class Timers:
    """A loop that keeps what it should call later."""

    def __init__(self) -> None:
        self.waiting: list[object] = []

    def call_later(self, delay: float, callback: object) -> None:
        self.waiting.append(callback)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    for descriptor in (reading, writing):
        try:
            os.close(descriptor)
        except OSError:
            pass


def open_log(style: str, descriptor: int, counters: Counters | None = None) -> tuple[AccessLog, Timers]:
    timers = Timers()
    loop = cast("asyncio.AbstractEventLoop", timers)
    return AccessLog(loop, counters or Counters(), style, descriptor), timers


async def finished(world: World, request: bytes) -> Record:
    client = world.client()
    client.send(request)
    (await world.backend()).send(OK)
    return world.done[-1]


async def test_a_json_line_says_what_happened_and_no_secret(world: World, pipe: tuple[int, int]) -> None:
    exchange = await finished(world, get(b"/a?token=secret", b"Cookie: secret\r\nAuthorization: secret\r\n"))
    log, timers = open_log("json", pipe[1])
    log.exchange(exchange)
    log.exchange(exchange)
    assert len(timers.waiting) == 1
    log.close()
    lines = os.read(pipe[0], 65536).splitlines()
    assert len(lines) == 2
    assert b"secret" not in lines[0]
    entry = orjson.loads(lines[0])
    assert list(entry) == [
        *("time", "client", "method", "host", "path", "protocol", "status", "bytes_in", "bytes_out"),
        *("duration", "service", "backend", "upstream_status", "upstream_time", "retries", "request_id"),
        *("tls_version", "sni", "reason", "error"),
    ]
    assert entry["time"].endswith("Z")
    assert {**entry, "time": 0, "duration": 0, "upstream_time": 0} == {
        "time": 0,
        "client": "192.0.2.7",
        "method": "GET",
        "host": "app.example",
        "path": "/a",
        "protocol": "HTTP/1.1",
        "status": 200,
        "bytes_in": 0,
        "bytes_out": 2,
        "duration": 0,
        "service": "app.example",
        "backend": "127.0.0.1:9000",
        "upstream_status": 200,
        "upstream_time": 0,
        "retries": 0,
        "request_id": "id-1",
        "tls_version": "",
        "sni": "",
        "reason": "",
        "error": "",
    }


async def test_a_text_line_has_one_word_a_field_whatever_the_client_sent(
    world: World, pipe: tuple[int, int]
) -> None:
    client = world.client()
    client.send(get(b'/"x"\xe4'.replace(b"\xe4", b""), host=b"nowhere.example"))
    log, _ = open_log("text", pipe[1])
    log.exchange(world.done[0])
    log.close()
    line = os.read(pipe[0], 65536).decode()
    assert line.count("\n") == 1
    words = line.split(" ")
    assert words[1:5] == ["192.0.2.7", "GET", "nowhere.example", '"/\\"x\\""']
    assert words[10:12] == ["-", "-"]
    assert words[18] == "no_such_service"
    assert line.endswith('"no service is registered for this host"\n')


async def test_bytes_that_were_no_request_have_their_line_too(world: World, pipe: tuple[int, int]) -> None:
    client = world.client()
    assert isinstance(client.protocol, Http1Downstream)
    about = client.protocol._peer
    client.send(b"garbage\r\n\r\n")
    log, _ = open_log("json", pipe[1])
    log.refused(about, world.refused[0], b"id-9", b"1.1")
    log.refused(about, world.refused[0], b"id-10", b"2")
    log.close()
    entry, other = map(orjson.loads, os.read(pipe[0], 65536).splitlines())
    assert (entry["status"], entry["reason"], entry["request_id"]) == (400, "bad_request", "id-9")
    assert (entry["protocol"], other["protocol"]) == ("HTTP/1.1", "HTTP/2")


def test_a_log_that_is_off_opens_nothing() -> None:
    log, _ = open_log("off", -1)
    assert not log.enabled
    log.close()


def write(log: AccessLog, text: str) -> None:
    log._write({"text": text})


def test_lines_are_dropped_and_counted_when_the_reader_is_too_far_behind(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_log, "QUEUE_BYTES", 1_000_000)
    counters = Counters()
    log, _ = open_log("json", pipe[1], counters)
    for _ in range(40):
        write(log, "x" * 100_000)
        log._hand_over()
    assert 20 <= counters.access_log_dropped <= 31
    write(log, "a")
    write(log, "b")
    os.close(pipe[0])  # the reader goes away: the writer ends
    log.close()
    dropped = counters.access_log_dropped
    write(log, "c")
    write(log, "d")
    log._hand_over()
    assert counters.access_log_dropped == dropped + 2


def test_a_reader_that_went_away_does_not_stop_the_traffic(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    counters = Counters()
    log, _ = open_log("json", pipe[1], counters)
    write(log, "x")
    log._hand_over()
    assert log._writer is not None
    log._writer._thread.join(timeout=10)
    assert not log._writer._thread.is_alive()
    write(log, "y")
    log._hand_over()
    assert counters.access_log_dropped == 1
    log.close()


def test_a_descriptor_that_somebody_made_non_blocking_loses_nothing(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 4096)
    log, _ = open_log("json", pipe[1])
    write(log, "x" * 500_000)
    log._hand_over()
    received = bytearray()

    def read() -> None:
        while not received.endswith(b"\n"):
            received.extend(os.read(pipe[0], 65536))

    reader = threading.Thread(target=read)
    reader.start()
    reader.join(timeout=10)
    assert orjson.loads(received) == {"text": "x" * 500_000}
    log.close()


def test_a_full_disk_costs_lines_that_are_counted_and_not_the_log(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write = os.write
    full = True

    def write_when_there_is_room(descriptor: int, data: bytes) -> int:
        if full and descriptor == pipe[1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(descriptor, data)

    monkeypatch.setattr(os, "write", write_when_there_is_room)
    counters = Counters()
    log, _ = open_log("json", pipe[1], counters)
    write(log, "x")
    write(log, "y")
    log._hand_over()
    assert log._writer is not None
    while log._writer._pieces or not log._writer._lost:
        pass
    full = False
    write(log, "z")
    log._hand_over()
    assert counters.access_log_dropped == 2
    log.close()
    assert b"z" in os.read(pipe[0], 65536)
