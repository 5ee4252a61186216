"""Tasks that may not end: what fails is seen, counted and begun again."""

from __future__ import annotations

import asyncio

import pytest

from portero_py.control import tasks as module
from portero_py.control.tasks import Tasks
from tests.waiting import until


class Work:
    """Fails as often as told, then runs."""

    def __init__(self, *failures: BaseException | None) -> None:
        self.failures = list(failures)
        self.begun = 0
        self.ended = False

    async def run(self) -> None:
        self.begun += 1
        if self.failures:
            failure = self.failures.pop(0)
            if failure is not None:
                raise failure
            return
        try:
            await asyncio.Event().wait()
        finally:
            self.ended = True


async def test_what_raises_or_returns_is_counted_shown_and_begun_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counted: list[str] = []
    tasks, fails, runs = Tasks(counted.append, first_pause=0.001), Work(RuntimeError("odd"), None), Work()
    tasks.own(fails.run, "fails")
    tasks.own(runs.run, "runs")
    await until(lambda: fails.begun == 3)
    assert tasks.faults == ["fails"]
    assert counted == ["fails", "fails"]
    assert runs.begun == 1
    assert "odd" in caplog.text
    assert "fails ended" in caplog.text
    await tasks.close()
    assert fails.ended
    assert runs.ended


async def test_work_that_is_cancelled_by_what_it_waited_for_is_begun_again() -> None:
    counted: list[str] = []
    tasks, work = Tasks(counted.append, first_pause=0.001), Work(asyncio.CancelledError())
    tasks.own(work.run, "work")
    await until(lambda: work.begun == 2)
    assert (tasks.faults, counted) == (["work"], ["work"])
    await tasks.close()
    assert (work.begun, work.ended) == (2, True)


async def test_a_fault_is_history_when_the_task_has_run_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEADY_SECONDS", 0.5)
    tasks, work = Tasks(lambda _: None, first_pause=0.001), Work(RuntimeError("odd"))
    tasks.own(work.run, "work")
    await until(lambda: tasks.faults == ["work"])
    await until(lambda: tasks.faults == [])
    assert work.begun == 2
    await tasks.close()


async def test_closing_ends_what_waits_for_its_next_attempt_too() -> None:
    tasks, work = Tasks(lambda _: None, first_pause=1000.0), Work(RuntimeError("odd"))
    tasks.own(work.run, "work")
    await until(lambda: tasks.faults)
    await tasks.close()
    assert work.begun == 1
