"""Words between the main process and a generation: in order, with their descriptors, and to the end."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator

import pytest

from portero_py.run.channel import Channel, Word
from portero_py.run.generation import TICKETS, VARIABLE, Generation
from tests.own_process import alone

Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = Channel.pair()
    yield one, other
    one.close()
    other.close()


def test_words_arrive_in_order_and_apart(pair: Pair) -> None:
    one, other = pair
    one.say(Word.PREPARED)
    one.say(Word.READY, patience=3.5)
    assert [(each.word, each.fields) for each in other.heard()] == [
        (Word.PREPARED, {}),
        (Word.READY, {"patience": 3.5}),
    ]
    assert other.heard() == []
    assert not other.is_over


def test_a_descriptor_is_a_copy_that_nobody_else_inherits(pair: Pair) -> None:
    one, other = pair
    with socket.create_server(("127.0.0.1", 0)) as sock:
        one.say(Word.HOLD, [sock.fileno()], name="https")
        [message] = other.heard()
        [descriptor] = message.descriptors
        assert descriptor != sock.fileno()
        assert not os.get_inheritable(descriptor)
        copy = socket.socket(fileno=os.dup(descriptor))
        assert copy.getsockname() == sock.getsockname()
        copy.close()
        message.close()
        assert message.descriptors == []


def test_a_word_of_another_version_is_skipped_and_its_descriptors_are_closed(pair: Pair) -> None:
    one, other = pair
    with socket.create_server(("127.0.0.1", 0)) as sock:
        for content in (b'{"word":"of another version"}', b"no JSON", b"[]", b"{}"):
            socket.send_fds(one._socket, [content], [sock.fileno()])
        one.say(Word.GO, added=1)
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count
        assert [each.word for each in other.heard()] == [Word.GO]
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_the_end_of_one_is_heard_by_the_other_behind_its_last_words(pair: Pair) -> None:
    one, other = pair
    one.say(Word.YIELDED)
    one.close()
    assert [each.word for each in other.heard()] == [Word.YIELDED]
    assert other.is_over
    other.say(Word.GO)  # to nobody
    one.say(Word.GO)  # from nobody
    assert one.heard() == other.heard() == []


@alone
def test_who_waits_for_signals_hears_of_words_and_of_the_end() -> None:
    one, other = Channel.pair()
    other.signal_arrivals()
    for expected in ((1, False), (1, False), (0, True)):
        one.say(Word.GO) if expected[0] else one.close()
        assert signal.sigwait([signal.SIGIO]) is signal.SIGIO
        assert (len(other.heard()), other.is_over) == expected


@alone
def test_who_wants_no_signals_any_more_lives_on_with_its_former_mask() -> None:
    former = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    one, other = Channel.pair()
    other.signal_arrivals()
    one.say(Word.GO)
    other.stop_signals()
    assert signal.sigwait([signal.SIGIO]) is signal.SIGIO
    signal.pthread_sigmask(signal.SIG_SETMASK, former)
    assert signal.SIGIO not in former
    one.say(Word.GO)
    one.close()
    assert [len(other.heard()), other.is_over] == [2, True]


def test_a_generation_takes_what_was_held_and_wipes_the_keys_of_sessions(pair: Pair) -> None:
    main, other = pair
    tickets = os.memfd_create("tickets")
    os.pwrite(tickets, b"secret", 0)
    ours, theirs = os.dup(other.fileno()), os.dup(tickets)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        held = [["https+", os.dup(sock.fileno())], [TICKETS, theirs], ["of another version", os.dup(tickets)]]
        environ = {VARIABLE: json.dumps({"channel": ours, "main": 7, "held": held}), "LISTEN_PID": "7"}
        place = Generation.inherited(environ)
        assert place is not None
        assert (place.main_pid, place.is_first, environ) == (7, False, {"LISTEN_PID": "7"})
        kept, former = place.inherited_sockets(environ)
        [found] = kept["https"]
        assert found.getsockname() == sock.getsockname()
        found.close()
        assert not any([kept["register"], kept["http"], *former.values()])
        assert place.tickets() == b"secret"
        assert os.pread(tickets, 100, 0) == bytes(6)
        place.drop_rest()
        place.prepared()
        assert [each.word for each in main.heard()] == [Word.PREPARED]
        place.channel.close()
    os.close(tickets)
    assert Generation.inherited({}) is None
