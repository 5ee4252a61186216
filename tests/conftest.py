"""Every test process watches the state machines: an illegal step fails the test in which it happens."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from portero_py.run import debugging, main_process

#: Illegal steps that have not failed a test yet: whoever raises into an event loop may not be heard.
ILLEGAL: list[debugging.IllegalTransition] = []


@pytest.fixture(scope="session", autouse=True)
def _watched_states() -> None:
    debugging.watch(ILLEGAL.append)


@pytest.fixture(autouse=True)
def _no_generation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that runs the program in this process must not fork it: then there would be two of the tests."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    monkeypatch.setattr(main_process, "begin", lambda environ: object())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, former)


@pytest.fixture
def illegal_steps() -> list[debugging.IllegalTransition]:
    """Those of this test; whoever meant them takes them out."""
    return ILLEGAL


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    yield
    if ILLEGAL:
        illegal = ILLEGAL[0]
        ILLEGAL.clear()
        raise illegal
