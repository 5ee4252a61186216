"""An independent HTTP/2 client (the `h2` package) in front of the core, and clients that are no clients."""

from __future__ import annotations

import h2.config
import h2.connection
import h2.errors
import h2.events
from hypothesis import given
from hypothesis import strategies as st

from portero_py.errors import ClientGone, PorteroError
from portero_py.wire.http2.frames import PREFACE, SETTINGS
from portero_py.wire.http2.heads import HeadLimits
from portero_py.wire.http2.server import ServerConnection
from portero_py.wire.http2.server_stream import ServerStream
from portero_py.wire.message import Fields, RequestHead, ResponseHead
from tests.wire.http2.dialogue import GET, POST, Dialogue, frame, split_frames


class Echo(ServerStream):
    """Answers with the request's own body and trailers."""

    def on_head(self, head: RequestHead) -> None:
        fields = [(b"X-Path", head.target), (b"X-Method", head.method)]
        self.send_head(ResponseHead(200, b"OK", fields, -1))
        if self.received:
            self.send_end(None)

    def on_body(self, data: bytes) -> None:
        self.send_body(data)

    def on_end(self, trailers: Fields | None) -> None:
        self.send_end(trailers)

    def on_lost(self, error: PorteroError) -> None:
        assert isinstance(error, ClientGone)

    def on_held_up(self) -> None:
        self.pause_body()

    def on_relieved(self) -> None:
        self.resume_body()


class Talk:
    """A client of the `h2` package and the core, passing bytes to each other until both are silent."""

    def __init__(self) -> None:
        self.client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self.client.initiate_connection()
        self.server = ServerConnection(lambda: None, Echo, HeadLimits(8192, 32768, 100), 100)
        self.events: list[h2.events.Event] = []

    def run(self) -> None:
        while True:
            sent = self.client.data_to_send()
            if sent:
                self.server.receive(sent, 1.0)
            answer = self.server.output.take()
            self.server.output.pump()
            if answer:
                for event in self.client.receive_data(answer):
                    self.events.append(event)
                    if isinstance(event, h2.events.DataReceived) and event.flow_controlled_length:
                        self.client.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif not sent:
                return

    def body(self, stream: int) -> bytes:
        return b"".join(
            one.data
            for one in self.events
            if isinstance(one, h2.events.DataReceived) and one.stream_id == stream
        )

    def ended(self, stream: int) -> bool:
        return any(isinstance(one, h2.events.StreamEnded) and one.stream_id == stream for one in self.events)


def test_an_independent_client_is_served_many_requests() -> None:
    talk = Talk()
    for stream in range(1, 600, 2):
        talk.client.send_headers(stream, [*GET[:3], (":path", f"/{stream}")], end_stream=True)
        if stream % 100 == 99:
            talk.run()
    talk.run()
    responses = [one for one in talk.events if isinstance(one, h2.events.ResponseReceived)]
    assert [dict(one.headers)[b"x-path"] for one in responses] == [b"/%d" % n for n in range(1, 600, 2)]
    assert talk.ended(599)


def test_a_large_upload_comes_back_through_both_windows() -> None:
    talk = Talk()
    talk.run()
    body = bytes(range(256)) * 8192  # 2 MiB
    talk.client.send_headers(1, [*POST, ("content-length", str(len(body)))])
    sent = 0
    while sent < len(body):
        room = min(
            talk.client.local_flow_control_window(1), talk.client.max_outbound_frame_size, len(body) - sent
        )
        assert room > 0
        talk.client.send_data(1, body[sent : sent + room])
        sent += room
        talk.run()
    talk.client.send_headers(1, [("x-sum", "7")], end_stream=True)
    talk.run()
    assert talk.body(1) == body
    trailers = [one for one in talk.events if isinstance(one, h2.events.TrailersReceived)]
    assert [one.headers for one in trailers] == [[(b"x-sum", b"7")]]
    assert talk.ended(1)


def test_padding_pings_resets_and_a_smaller_table_are_understood() -> None:
    talk = Talk()
    talk.run()
    talk.client.send_headers(1, POST)
    talk.client.send_data(1, b"padded", pad_length=200)
    talk.client.ping(b"12345678")
    talk.client.update_settings({1: 0, 4: 10, 5: 20000})
    talk.run()
    assert talk.body(1) == b"padded"
    talk.client.send_headers(3, POST)
    talk.client.reset_stream(3, h2.errors.ErrorCodes.CANCEL)
    talk.client.send_headers(5, GET, end_stream=True)
    talk.client.end_stream(1)
    talk.run()
    assert any(isinstance(one, h2.events.PingAckReceived) for one in talk.events)
    assert talk.ended(1)
    assert talk.ended(5)
    assert talk.server.streams == {}


def script() -> bytes:
    """A client's bytes with a bit of everything."""
    dialogue = Dialogue()
    return b"".join(
        [
            PREFACE,
            frame(SETTINGS, 0, 0),
            frame(1, 5, 1, dialogue.encoder.encode(GET)),
            frame(1, 0x2C, 3, b"\x03" + bytes(5) + dialogue.encoder.encode(POST) + bytes(3)),
            frame(0, 8, 3, b"\x02body\0\0"),
            frame(6, 0, 0, b"pingpong"),
            frame(8, 0, 0, b"\0\0\1\0"),
            frame(0, 0, 3, b"more"),
            frame(1, 0, 3 + 2, dialogue.encoder.encode(POST)),
            frame(9, 4, 5, b""),
            frame(3, 0, 5, bytes(4)),
            frame(1, 5, 3, dialogue.encoder.encode([("x-t", "1")])),
            frame(1, 5, 7, dialogue.encoder.encode([*GET, ("te", "gzip")])),
            frame(1, 5, 9, dialogue.encoder.encode(GET)),
            frame(0, 0, 9, b"behind the end"),
        ]
    )


SCRIPT = script()


def played(pieces: list[bytes]) -> tuple[list[tuple[object, ...]], bytes]:
    dialogue = Dialogue(greet=False)
    for piece in pieces:
        dialogue.send(piece)
    return dialogue.said, dialogue.connection.output.take()


@given(st.lists(st.integers(0, len(SCRIPT)), max_size=30).map(sorted))
def test_any_split_of_the_bytes_says_the_same(cuts: list[int]) -> None:
    pieces = [SCRIPT[a:b] for a, b in zip([0, *cuts], [*cuts, len(SCRIPT)], strict=True)]
    assert played(pieces) == played([SCRIPT])


def test_one_byte_at_a_time_says_the_same() -> None:
    said, answer = played([bytes([byte]) for byte in SCRIPT])
    assert (said, answer) == played([SCRIPT])
    assert len([one for one in said if one[0] == "head"]) == 4


FRAMES = st.builds(
    frame,
    st.integers(0, 10),
    st.integers(0, 255),
    st.integers(0, 9) | st.integers(0, 2**32 - 1),
    st.binary(max_size=30),
)


@given(st.binary(max_size=200), st.lists(FRAMES | st.binary(max_size=40), max_size=12))
def test_garbage_ends_in_nothing_worse_than_a_goaway(start: bytes, rest: list[bytes]) -> None:
    dialogue = Dialogue(greet=False)
    dialogue.send(start)
    dialogue = Dialogue()
    dialogue.answer = ResponseHead(200, b"OK", [], 5)
    for data in rest:
        dialogue.send(data)
    split_frames(dialogue.connection.output.take())


@given(st.integers(0, len(SCRIPT) - 1), st.integers(0, 255))
def test_one_wrong_byte_ends_in_nothing_worse_than_a_goaway(place: int, value: int) -> None:
    _, answer = played([SCRIPT[:place] + bytes([value]) + SCRIPT[place + 1 :]])
    split_frames(answer)
