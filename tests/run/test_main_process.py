"""What the main process makes of generations that die, or say things, at the wrong moment."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator

import pytest

from portero_py.run.channel import Channel, Word
from portero_py.run.main_process import MainProcess, Member, Stage
from portero_py.run.systemd import notify


class Other:
    """A generation: a process that only exists, and its end of the channel."""

    def __init__(self) -> None:
        ours, self.channel = Channel.pair()
        self.process = subprocess.Popen(["sleep", "100"])
        self.member = Member(self.process.pid, ours)

    def dies(self) -> None:
        """It is gone, and not reaped yet."""
        self.process.kill()
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

    def heard(self) -> list[Word]:
        return [message.word for message in self.channel.heard()]


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Other]]:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "not here")

    monkeypatch.setattr(os, "execve", refuse)
    # Another thread of the tests may be given it, whose end it would be, and theirs.
    handler = signal.signal(signal.SIGIO, lambda *_: None)
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
    made: list[Other] = []

    def make() -> Other:
        made.append(Other())
        return made[-1]

    yield make
    for each in made:
        each.channel.close()
        each.member.channel.close()
        each.process.kill()
        each.process.wait()
    while signal.SIGIO in signal.sigpending():
        signal.sigwait({signal.SIGIO})
    signal.pthread_sigmask(signal.SIG_SETMASK, former)
    signal.signal(signal.SIGIO, handler)


def serving(current: Other) -> MainProcess:
    current.member.is_ready = True
    return MainProcess({}, current.member)


def taking_over(main: MainProcess, coming: Other) -> None:
    main._next = coming.member
    for stage in (Stage.OFFERING, Stage.PREPARING, Stage.YIELDING, Stage.TAKING_OVER):
        main._go_to(stage)


def test_a_new_version_that_says_ready_and_dies_does_not_take_the_place_of_the_old_one(
    other: Callable[[], Other],
) -> None:
    old, new = other(), other()
    main = serving(old)
    taking_over(main, new)
    new.channel.say(Word.READY, patience=1)
    new.dies()
    main._reap()
    assert main._members() == [old.member]
    assert old.heard() == [Word.RESUME]


def test_who_is_given_up_is_not_heard_any_more(other: Callable[[], Other]) -> None:
    old, new = other(), other()
    main = serving(old)
    main._held = held = [("https", os.dup(0))]
    taking_over(main, new)
    main._fail("it takes too long")
    new.channel.say(Word.READY, patience=1)
    main._listen()
    assert main._held is held
    assert main._current is old.member
    main._let_go_of_all()


def test_without_descriptors_an_upgrade_fails_and_no_more(
    other: Callable[[], Other], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = other()
    main = serving(old)

    def fail() -> None:
        raise OSError(errno.ENFILE, "too many open files in system")

    monkeypatch.setattr(Channel, "pair", fail)
    main._go_to(Stage.OFFERING)
    main._start_next([ticket := os.dup(0)])
    assert main._members() == [old.member]
    assert main._stage is Stage.SERVING
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ticket)


def test_what_comes_to_be_kept_after_a_stop_is_let_go(other: Callable[[], Other]) -> None:
    old = other()
    main = serving(old)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
        old.channel.say(Word.HOLD, [listening.fileno()], name="https")
        main._listen()
        old.channel.say(Word.HOLD, [listening.fileno()], name="https")
        main._stop()
        main._listen()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address).close()
    assert old.member.ends_at is not None


def test_systemd_is_told_nothing_when_there_is_no_descriptor_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(socket, "socket", fail)
    notify({"NOTIFY_SOCKET": "/run/nobody"}, "READY=1")
