"""What both roles of a connection have in common knows neither, and what a role must say has no default."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

from portero_py.errors import ClientGone
from portero_py.wire import http2
from portero_py.wire.http2.blocks import HeaderBlocks
from portero_py.wire.http2.connection import Connection
from portero_py.wire.http2.frames import END_HEADERS, HEADERS, PREFACE, PUSH_PROMISE, settings_frame
from portero_py.wire.http2.heads import HeadLimits, HeadReader
from portero_py.wire.http2.output import Output, Waiting
from portero_py.wire.http2.server_stream import ServerStream
from portero_py.wire.http2.stream import DONE, Carrier, Stream
from portero_py.wire.http2.streams import Streams
from portero_py.wire.message import RequestHead
from tests.wire.http2.dialogue import Dialogue, frame

FOLDER = Path(http2.__file__).parent
LIMITS = HeadLimits(8192, 32768, 100)


@pytest.mark.parametrize("name", ["output", "stream", "streams", "connection", "blocks", "ended", "floods"])
def test_what_serves_both_roles_knows_neither_requests_nor_responses(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    imported = {
        alias.name for found in ast.walk(tree) if isinstance(found, ast.ImportFrom) for alias in found.names
    }
    roles = {"RequestHead", "ResponseHead", "RequestReader", "BadRequest", "ClientGone"}
    assert imported & roles == set()


def _call_nothing() -> None:
    """A connection without a shell."""


def test_what_a_role_or_its_user_must_say_has_no_default() -> None:
    waiting, carrier = Waiting(), Carrier()
    streams = Streams(Output(_call_nothing), DONE)
    blocks = HeaderBlocks(HeadReader[RequestHead](), LIMITS.list_bytes)
    connection = Connection(_call_nothing, blocks, LIMITS, b"", PREFACE, DONE)
    role_free, stream = Stream(connection, 1, 0), ServerStream(connection, 1, 0)
    calls: list[Callable[[], object]] = [
        lambda: HeadReader[RequestHead]().read([], ends=True),
        lambda: waiting.next_piece(1),
        lambda: waiting.piece_sent(1, 0, last=True),
        lambda: carrier.forget(stream, reset=True),
        lambda: carrier.leave_early(stream),
        lambda: carrier.give_back(stream),
        lambda: streams._peer_fault("why"),
        lambda: connection._on_block(1, 0, b""),
        lambda: connection._last_taken(),
        lambda: connection._peer_reset(8),
        lambda: role_free.on_sent(),
        lambda: stream.on_head(RequestHead(b"GET", b"/", b"a", b"2", [])),
        lambda: stream.on_refused(ClientGone()),
        lambda: stream.on_body(b""),
        lambda: stream.on_end(None),
        lambda: stream.on_lost(ClientGone()),
        lambda: stream.on_held_up(),
        lambda: stream.on_relieved(),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError):
            call()


@pytest.mark.parametrize("kind", [HEADERS, PUSH_PROMISE])
def test_nobody_opens_even_streams(kind: int) -> None:
    dialogue = Dialogue(greet=False)
    dialogue.send(PREFACE + settings_frame(()))
    dialogue.send(frame(kind, END_HEADERS, 2, bytes(4)))
    assert dialogue.connection.fault is not None
