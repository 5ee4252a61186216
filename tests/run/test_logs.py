"""The operator's log, line by line."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Iterator

import pytest

from portero_py.run import logs, tuning
from portero_py.run.logs import LineFormatter


def record(
    message: str, *args: object, name: str = "portero_py.run.supervisor", level: int = logging.INFO
) -> logging.LogRecord:
    made = logging.LogRecord(name, level, "file", 1, message, args, None)
    made.created, made.msecs = 86400.25, 250.0
    return made


def test_a_line_has_time_level_module_and_message() -> None:
    line = LineFormatter(journal=False).format(record("listening on %s", "[::]:443"))
    assert line == "1970-01-02T00:00:00.250Z INFO    supervisor: listening on [::]:443"


def test_the_journal_gets_a_priority_and_adds_the_time_itself() -> None:
    formatter = LineFormatter(journal=True)
    assert formatter.format(record("x", level=logging.ERROR)) == "<3>supervisor: x"
    assert formatter.format(record("x", name="asyncio", level=logging.WARNING)) == "<4>asyncio: x"


def test_what_a_client_sent_cannot_begin_a_line_of_its_own() -> None:
    line = LineFormatter(journal=False).format(record("host %s", "a\r\n2026 ERROR forged\x1b[0m\x85\u2028"))
    assert "\n" not in line
    assert line.isprintable()
    assert "a\\x0d\\x0a2026 ERROR forged\\x1b[0m\\x85\\x2028" in line


def test_a_traceback_follows_and_every_line_of_it_keeps_the_priority() -> None:
    made = record("it broke", level=logging.ERROR)
    try:
        raise ValueError("why")  # noqa: TRY301 - it has to be raised to have a traceback
    except ValueError:
        made.exc_info = sys.exc_info()
    lines = LineFormatter(journal=True).format(made).split("\n")
    assert lines[0] == "<3>supervisor: it broke"
    assert lines[-1] == "<3>  ValueError: why"
    assert all(line.startswith("<3>") for line in lines)


@pytest.fixture
def untouched_logging() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("portero_py")
    before = root.handlers[:], root.level, own.level
    yield
    root.handlers[:], root.level, own.level = before


@pytest.mark.usefixtures("untouched_logging")
def test_setting_up_twice_logs_once_and_the_level_holds(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info", {})
    logs.set_up("warning", {})
    logging.getLogger("portero_py.x").info("quiet")
    logging.getLogger("portero_py.x").warning("loud")
    logs.set_level("debug")
    logging.getLogger("portero_py.x").debug("deep")
    logging.getLogger("asyncio").info("a library's chatter")
    said = capsys.readouterr().err.splitlines()
    assert [line.rpartition(" ")[2] for line in said] == ["loud", "deep"]


@pytest.mark.usefixtures("untouched_logging")
def test_the_journal_is_known_by_the_stream_it_named(capfd: pytest.CaptureFixture[str]) -> None:
    status = os.fstat(2)
    logs.set_up("info", {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
    logging.getLogger("portero_py.x").info("hello")
    logs.set_up("info", {"JOURNAL_STREAM": "1:1"})
    logging.getLogger("portero_py.x").info("hello")
    first, second = capfd.readouterr().err.splitlines()
    assert first == "<6>x: hello"
    assert second.endswith("Z INFO    x: hello")


def test_the_limit_of_open_files_is_raised_as_far_as_it_goes() -> None:
    limit = tuning.raise_open_files()
    assert limit >= 1024
    assert tuning.raise_open_files() == limit


def test_malloc_is_tuned_where_glibc_is() -> None:
    assert tuning.tune_malloc() is (platform.libc_ver()[0] == "glibc")


@pytest.mark.parametrize("files", [64, 256, 1024, 4096, 65536, 1 << 20])
def test_descriptors_are_shared_out_with_some_in_reserve(files: int) -> None:
    both = tuning.shares(files, control=True, traffic=True)
    given = both.registration + both.plain_http + both.probes + 2 * both.clients
    assert given + min(64, files // 4) <= files
    assert min(both.registration, both.plain_http, both.clients, both.probes) > 0
    assert both.probes <= 256
    assert both.registration <= 256
    assert both.clients >= files // 8
    alone = tuning.shares(files, control=False, traffic=True)
    assert alone.clients > both.clients
    assert (alone.registration, alone.plain_http, alone.probes) == (0, 0, 0)
    assert tuning.shares(files, control=True, traffic=False).clients == 0
