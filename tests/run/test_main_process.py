"""What the main process makes of generations that die, or say things, at the wrong moment.

All of it in processes of their own: it blocks signals, and reaps whatever child it has.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
import sys

import pytest

from portero_py.run import main_process
from portero_py.run.channel import Channel, Word
from portero_py.run.main_process import MainProcess, Member, Stage
from portero_py.run.systemd import notify
from tests.own_process import alone, ended


class Other:
    """A generation: a process that only exists, until this one ends, and its end of the channel."""

    def __init__(self) -> None:
        ours, self.channel = Channel.pair()
        self.process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self.member = Member(self.process.pid, ours)

    def dies(self) -> None:
        """It is gone, and not reaped yet."""
        self.process.kill()
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

    def heard(self) -> list[Word]:
        return [message.word for message in self.channel.heard()]


def serving(current: Other) -> MainProcess:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "not here")

    pytest.MonkeyPatch().setattr(os, "execve", refuse)
    current.member.is_ready = True
    return MainProcess({}, current.member)


def taking_over(main: MainProcess, coming: Other) -> None:
    main._next = coming.member
    for stage in (Stage.OFFERING, Stage.PREPARING, Stage.YIELDING, Stage.TAKING_OVER):
        main._go_to(stage)


@alone
def test_a_new_version_that_says_ready_and_dies_does_not_take_the_place_of_the_old_one() -> None:
    old, new = Other(), Other()
    main = serving(old)
    taking_over(main, new)
    new.channel.say(Word.READY, patience=1)
    new.dies()
    main._reap()
    assert main._members() == [old.member]
    assert old.heard() == [Word.RESUME]


@alone
def test_who_is_given_up_is_not_heard_any_more() -> None:
    old, new = Other(), Other()
    main = serving(old)
    main._held = held = [("https", os.dup(0))]
    taking_over(main, new)
    main._fail("it takes too long")
    new.channel.say(Word.READY, patience=1)
    main._listen()
    assert main._held is held
    assert main._current is old.member
    main._let_go_of_all()


@alone
def test_without_descriptors_an_upgrade_fails_and_no_more() -> None:
    old = Other()
    main = serving(old)

    def fail() -> None:
        raise OSError(errno.ENFILE, "too many open files in system")

    pytest.MonkeyPatch().setattr(Channel, "pair", fail)
    main._go_to(Stage.OFFERING)
    main._start_next([ticket := os.dup(0)])
    assert main._members() == [old.member]
    assert main._stage is Stage.SERVING
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ticket)


@alone
def test_what_comes_to_be_kept_after_a_stop_is_let_go() -> None:
    old = Other()
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


# SIGIO, which ends a process that does not hold it back


def begun_for_a_generation_that_ends_at_once() -> None:
    """It ends when its main process is to hear of it, and has not begun to look yet."""

    class Late(MainProcess):
        def __init__(self, environ: dict[str, str], current: Member) -> None:
            current.channel.say(Word.LEAVE)
            os.waitid(os.P_PID, current.pid, os.WEXITED | os.WNOWAIT)
            super().__init__(environ, current)

    pytest.MonkeyPatch().setattr(main_process, "MainProcess", Late)
    place = main_process.begin({})
    if not isinstance(place, int):
        select.select([place.channel], [], [])
        os._exit(2)
    sys.exit(place)


def test_a_generation_that_ends_at_once_ends_its_main_process_with_its_own_status() -> None:
    assert ended(begun_for_a_generation_that_ends_at_once).returncode == 2
