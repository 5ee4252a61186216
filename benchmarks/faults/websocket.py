"""A WebSocket as the load speaks it (RFC 6455): it says something four times a second and wants it back."""

from __future__ import annotations

import asyncio
import base64
import os

from benchmarks.faults import http1
from benchmarks.faults.asks import MESSAGE_SECONDS, Ask, message
from benchmarks.faults.connections import Place
from benchmarks.faults.ledger import WRONG, Lost

_TEXT, _CLOSE, _PING, _PONG = 1, 8, 9, 10
_NORMAL = (1000).to_bytes(2, "big")


async def talk(place: Place, ask: Ask) -> int:
    """All messages out and back and an orderly end: 200. Another status than 101 is returned. Raises Lost.

    A close frame in the middle is lost as `told to leave` with its code: the client had more to say.
    """
    connection = await http1.Connection.open(place.port, place.tls)
    try:
        key = base64.b64encode(os.urandom(16)).decode()
        status, _ = await connection.ask(
            ask,
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Key: {key}",
        )
        if status != 101:
            return status
        await _converse(connection, ask)
    except (OSError, EOFError, RuntimeError) as error:
        raise Lost("cut") from error
    finally:
        connection.close()
    return 200


# Private


async def _converse(connection: http1.Connection, ask: Ask) -> None:
    for number in range(ask.size):
        said = message(ask.identity, number).encode()
        connection.writer.write(_frame(_TEXT, said))
        if await _hear(connection) != (_TEXT, said):
            raise Lost(WRONG)
        await asyncio.sleep(MESSAGE_SECONDS)
    connection.writer.write(_frame(_CLOSE, _NORMAL))
    code, _ = await _hear(connection, ends=True)
    if code != _CLOSE:  # its reason does not matter: both ends may have had enough at the same time
        raise Lost(WRONG)


async def _hear(connection: http1.Connection, *, ends: bool = False) -> tuple[int, bytes]:
    """The next message. Raises Lost, OSError, EOFError."""
    while True:
        first, length = await connection.reader.readexactly(2)
        if length == 126:
            length = int.from_bytes(await connection.reader.readexactly(2), "big")
        payload = await connection.reader.readexactly(length)
        code = first & 15
        if code == _PING:
            connection.writer.write(_frame(_PONG, payload))
        elif code == _CLOSE and not ends:
            connection.writer.write(_frame(_CLOSE, payload))
            raise Lost(f"told to leave ({int.from_bytes(payload[:2], 'big')})")
        elif code != _PONG:
            return code, payload


def _frame(code: int, payload: bytes) -> bytes:
    """Masked, as a client must; its mask is nobody's secret here."""
    assert len(payload) < 126
    mask = b"\x11\x22\x33\x44"
    covered = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
    return bytes((0x80 | code, 0x80 | len(payload))) + mask + covered
