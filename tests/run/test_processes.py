"""Children that are forked, watched, reaped and forked again; on real forks, with times as arguments."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable

import pytest

from portero_py.run.processes import (
    FIRST_PAUSE,
    HANG_SECONDS,
    MAX_PAUSE,
    STEADY_SECONDS,
    Backoff,
    Board,
    Child,
)
from tests.e2e.waiting import eventually


def child(work: Callable[[bool], int], slots: int = 1) -> tuple[Board, Child]:
    board = Board(slots)
    return board, Child(0, "child", board, work)


def reaped(one: Child, now: float = 0.0) -> int | None:
    """Its status, when it has ended."""
    eventually(lambda: one.reap(now), "it has ended")
    return one.status


def wait_for_ever(again: bool) -> int:
    signal.pause()
    return 0


class TestBackoff:
    def test_the_first_death_costs_no_pause_and_a_series_doubles_it_up_to_a_limit(self) -> None:
        backoff = Backoff()
        pauses = [backoff.pause(0.1) for _ in range(40)]
        assert pauses[:4] == [0.0, FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE]
        assert pauses[-1] == MAX_PAUSE

    def test_a_steady_life_ends_the_series(self) -> None:
        backoff = Backoff()
        for _ in range(5):
            backoff.pause(0.1)
        assert backoff.pause(STEADY_SECONDS) == 0.0
        assert backoff.pause(0.1) == FIRST_PAUSE


class TestBoard:
    def test_slots_do_not_touch_each_other(self) -> None:
        board = Board(3)
        for slot in range(3):
            board.clear(slot, 1.0)
        board.beat(1, 2.5)
        board.ready(1)
        board.complain(1, "x" * 5000)
        board.count_restart(1)
        assert [board.last_beat(slot) for slot in range(3)] == [1.0, 2.5, 1.0]
        assert [board.is_ready(slot) for slot in range(3)] == [False, True, False]
        assert [board.restarts(slot) for slot in range(3)] == [0, 1, 0]
        assert [len(board.complaint(slot)) for slot in range(3)] == [0, 1004, 0]
        assert not board.stopping
        board.stop()
        assert board.stopping

    def test_a_new_child_has_said_nothing_yet_but_restarts_stay_counted(self) -> None:
        board = Board(1)
        board.ready(0)
        board.complain(0, "no such directory")
        board.count_restart(0)
        board.clear(0, 7.0)
        assert (board.last_beat(0), board.is_ready(0), board.complaint(0)) == (7.0, False, "")
        assert board.restarts(0) == 1


# pytest's own threads are none of the children's business.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
class TestChild:
    def test_what_a_child_writes_on_the_board_its_parent_reads(self) -> None:
        def work(again: bool) -> int:
            board.beat(0, 123.0)
            board.complain(0, "--tls-cert-dir: not there")
            return 2

        board, one = child(work)
        one.fork(1.0)
        assert reaped(one) == 2
        assert board.last_beat(0) == 123.0
        assert one.complaint == "--tls-cert-dir: not there"

    def test_a_child_that_dies_is_due_at_once_then_later_and_knows_that_it_is_another(self) -> None:
        board, one = child(lambda again: 7 if again else 5)
        assert one.fork_at == 0.0
        assert not one.fork(10.0)
        assert one.fork_at is None
        assert (reaped(one, 10.5), one.fork_at) == (5, 10.5)
        assert one.fork(10.5)
        assert (reaped(one, 11.0), one.fork_at) == (7, 11.0 + FIRST_PAUSE)
        assert board.restarts(0) == 1

    def test_a_child_that_raises_ends_with_status_1_and_never_in_its_parent_s_code(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        parent = os.getpid()

        def work(again: bool) -> int:
            raise RuntimeError("a fault")

        _, one = child(work)
        one.fork(0.0)
        assert os.getpid() == parent
        assert reaped(one) == 1

    def test_a_fork_that_the_system_refuses_is_tried_again_later_and_later(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refuse() -> int:
            raise OSError(errno.EAGAIN, "no")

        _, one = child(lambda again: 7 if again else 5)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fork", refuse)
            assert not one.fork(10.0)
            assert (one.pid, one.fork_at) == (0, 10.0 + FIRST_PAUSE)
            one.fork(11.0)
            one.fork(12.0)
            assert one.fork_at == 12.0 + 2 * FIRST_PAUSE
        assert "child cannot be started: Resource temporarily unavailable" in caplog.text
        assert not one.reap(12.0)
        assert not one.is_ready
        assert not one.fork(13.0)  # the first one that lives replaces nobody
        assert reaped(one) == 5

    def test_a_status_that_somebody_else_took_is_a_death_all_the_same(self) -> None:
        _, one = child(lambda again: 0)
        one.fork(0.0)
        os.waitpid(one.pid, 0)
        assert reaped(one) == 1
        assert one.fork_at is not None

    def test_output_that_nobody_takes_keeps_nothing_from_being_forked(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Gone:
            def flush(self) -> None:
                raise BrokenPipeError

        _, one = child(lambda again: 0)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Gone())
            one.fork(0.0)
        assert reaped(one) == 0

    def test_a_signal_ends_it_and_its_status_says_so(self) -> None:
        _, one = child(wait_for_ever)
        one.fork(0.0)
        assert not one.reap(0.0)
        one.signal(signal.SIGKILL)
        assert reaped(one) == -signal.SIGKILL
        one.signal(signal.SIGKILL)  # harmless: there is nobody
        assert not one.reap(0.0)

    def test_it_hangs_when_no_heartbeat_came_in_time_and_the_parent_was_there(self) -> None:
        board, one = child(wait_for_ever)
        assert not one.hangs(1000.0)  # there is none yet
        one.fork(100.0)
        try:
            assert not one.hangs(100.0 + HANG_SECONDS)
            assert one.hangs(100.1 + HANG_SECONDS)
            board.beat(0, 105.0)
            assert not one.hangs(105.0 + HANG_SECONDS)
            assert one.hangs(105.1 + HANG_SECONDS)
            one.forgive(200.0)
            assert not one.hangs(200.0 + HANG_SECONDS)
        finally:
            one.signal(signal.SIGKILL)
            reaped(one)

    def test_it_is_ready_only_while_it_lives(self) -> None:
        board, one = child(wait_for_ever)
        one.fork(0.0)
        assert not one.is_ready
        board.ready(0)
        assert one.is_ready
        one.signal(signal.SIGKILL)
        reaped(one)
        assert not one.is_ready
        assert not board.is_ready(0)  # as the other children see it
