"""A program that makes DNS records: real ones, which do what programs do."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from portero_py.control.acme.dns01.hook import CLEANUP, MAX_LINES, PRESENT, HookRun, environment, unfit
from portero_py.control.acme.locks import open_lock
from portero_py.core.acme.dns_records import TxtRecord
from portero_py.errors import DnsFailed

RECORD = TxtRecord("_acme-challenge.a.example", "x-_9")
#: Seconds that a busy machine may take.
PATIENCE = 60.0

Program = Callable[[str], HookRun]


class Shop:
    """Makes programs, and calls of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program = folder / "hook"
        self.lock = folder / "lock"

    def call(self, script: str, *words: str, seconds: float = PATIENCE, **environ: str) -> HookRun:
        """One call of a shell script, whose `$here` is a folder of its own."""
        self.program.write_text(f"#!/bin/sh\nhere={self.folder}\n{script}\n")
        self.program.chmod(0o755)
        command = (str(self.program), *words)
        return HookRun(command, PRESENT, RECORD, seconds, self.lock, environ or None)

    def read(self, name: str) -> str:
        """What a program wrote there."""
        return (self.folder / name).read_text()


@pytest.fixture
def shop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Shop:
    caplog.set_level(logging.INFO)
    return Shop(tmp_path)


def until(check: Callable[[], object]) -> None:
    ends = time.monotonic() + PATIENCE
    while not check():
        assert time.monotonic() < ends, "it did not come about"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process runs: one that is dead and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_it_is_called_with_its_words_the_verb_the_name_and_the_value(shop: Shop) -> None:
    shop.call('printf "%s\\n" "$@" > $here/words', "a b", "$(id)", ";").run()
    assert shop.read("words").splitlines() == ["a b", "$(id)", ";", PRESENT, RECORD.name, RECORD.value]
    HookRun((str(shop.program),), CLEANUP, RECORD, PATIENCE, shop.lock).run()
    assert shop.read("words").splitlines() == [CLEANUP, RECORD.name, RECORD.value]


def test_it_sees_nothing_of_our_environment_but_path_home_and_the_locale(shop: Shop) -> None:
    shop.call(
        "env > $here/env; pwd > $here/pwd; readlink /proc/self/fd/0 > $here/stdin; "
        "grep SigBlk /proc/self/status > $here/blocked",
        *(),
        PORTERO_REGISTER_SECRET="secret",
        JWT_HMAC_KEY="secret",
        CREDENTIALS_DIRECTORY="/secret",
        HOME="/var/lib/portero",
        LANG="C.UTF-8",
        PATH=os.environ["PATH"],
    ).run()
    found = dict(each.split("=", 1) for each in shop.read("env").splitlines())
    assert found["HOME"] == "/var/lib/portero"
    assert set(found) <= {"PATH", "HOME", "LANG", "PWD", "OLDPWD", "SHLVL", "_"}
    assert "secret" not in shop.read("env")
    assert shop.read("pwd") == "/\n"
    assert shop.read("stdin") == "/dev/null\n"
    assert re.fullmatch(r"SigBlk:\s+0+\n", shop.read("blocked"))


def test_without_a_path_of_our_own_it_has_the_usual_one() -> None:
    assert "/usr/bin" in environment({})["PATH"].split(":")


def test_what_it_writes_is_in_the_log_line_by_line(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    shop.call('echo one; echo two >&2; printf "three\\033[31m"').run()
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"acme.dns_hook present {RECORD.name}: {word}" for word in ("one", "two", "three [31m")]


def test_megabytes_are_read_and_dropped(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DnsFailed, match=r"exit status 3: the last word$"):
        shop.call("head -c 20000000 /dev/zero; yes | head -n 3000000; echo the last word; exit 3").run()
    assert len(caplog.records) == MAX_LINES + 1
    assert all(len(record.getMessage()) < 700 for record in caplog.records)
    assert re.search(r": \d+ lines more$", caplog.records[-1].getMessage())


def test_a_status_that_is_not_zero_is_an_error_with_its_last_line(shop: Shop) -> None:
    with pytest.raises(DnsFailed, match=r"acme.dns_hook present .*: exit status 7: no such zone$"):
        shop.call("echo begun; echo no such zone >&2; exit 7").run()
    with pytest.raises(DnsFailed, match=r": exit status 1$"):
        shop.call("exit 1").run()


def test_a_program_that_is_killed_is_an_error(shop: Shop) -> None:
    with pytest.raises(DnsFailed, match="it was killed by SIGTERM"):
        shop.call("kill -TERM $$").run()


def test_a_program_that_hangs_is_killed_with_its_whole_group(shop: Shop) -> None:
    with pytest.raises(DnsFailed, match=r"no end within 5 s, it was killed: hanging$"):
        shop.call(
            "trap '' TERM INT HUP; "
            "sleep 1000 & echo $! > $here/child; echo $$ > $here/own; echo hanging; wait",
            seconds=5,
        ).run()
    for name in ("own", "child"):
        pid = int(shop.read(name))
        until(lambda: not is_alive(pid))  # noqa: B023


def test_what_it_leaves_behind_is_killed_and_nobody_waits_for_it(shop: Shop) -> None:
    shop.call("sleep 1000 & echo $! > $here/child; echo done").run()
    pid = int(shop.read("child"))
    until(lambda: not is_alive(pid))


def test_a_program_that_left_its_group_and_keeps_our_pipe_does_not_hold_us_up(shop: Shop) -> None:
    shop.call(
        "setsid sh -c 'echo $$ > $0/child; while :; do echo more; sleep 0.01; done' $here & "
        "until [ -s $here/child ]; do sleep 0.01; done"
    ).run()
    pid = int(shop.read("child"))
    assert is_alive(pid)
    os.kill(pid, 9)


def test_a_program_that_closes_its_output_is_waited_for(shop: Shop) -> None:
    shop.call("exec >&- 2>&-; sleep 0.3; touch $here/done; exit 0").run()
    assert (shop.folder / "done").exists()


def test_at_portero_s_end_it_is_killed_at_once(shop: Shop) -> None:
    run = shop.call("echo $$ > $here/own; exec sleep 1000")
    errors: list[DnsFailed] = []

    def call() -> None:
        try:
            run.run()
        except DnsFailed as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    until(lambda: (shop.folder / "own").exists() and shop.read("own").strip())
    pid = int(shop.read("own"))
    run.stop()
    until(lambda: not is_alive(pid))
    thread.join(PATIENCE)
    assert errors


def test_a_call_that_was_given_up_before_it_began_ends_at_once(shop: Shop) -> None:
    run = shop.call("sleep 1000")
    run.stop()
    with pytest.raises(DnsFailed):
        run.run()


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.write_text("no program"), Path.mkdir])
def test_a_program_that_cannot_be_run_is_an_error(
    shop: Shop, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    program = tmp_path / "odd"
    make(program)
    with pytest.raises(DnsFailed, match=f"cannot run {program}: "):
        HookRun((str(program),), PRESENT, RECORD, PATIENCE, shop.lock).run()
    assert unfit(str(program)).startswith(str(program))
    assert unfit("/bin/sh") == unfit("sh") == ""


# One at a time


def test_two_at_one_record_run_one_after_the_other(shop: Shop) -> None:
    script = (
        "[ ! -e $here/at ] || touch $here/both; touch $here/at; sleep 0.2; rm $here/at; echo x >> $here/done"
    )
    runs = [shop.call(script) for _ in range(3)]
    threads = [threading.Thread(target=run.run) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert shop.read("done") == "x\nx\nx\n"
    assert not (shop.folder / "both").exists()


def test_one_that_outlived_us_is_waited_for(shop: Shop) -> None:
    """As after SIGKILL: we are gone, the program has the lock."""
    descriptor = open_lock(shop.lock)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    run = shop.call("touch $here/ran")
    thread = threading.Thread(target=run.run)
    thread.start()
    time.sleep(0.3)
    assert not (shop.folder / "ran").exists()
    os.close(descriptor)
    thread.join(PATIENCE)
    assert (shop.folder / "ran").exists()


def test_what_a_program_left_behind_holds_up_the_next_one_no_longer_than_one_may_take(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    descriptor = open_lock(shop.lock)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        shop.call("touch $here/ran; sleep 0", seconds=5).run()
    finally:
        os.close(descriptor)
    assert (shop.folder / "ran").exists()
    assert "an earlier one has left a process behind" in caplog.text


def test_the_lock_is_the_owners_and_is_inherited(shop: Shop) -> None:
    shop.call("ls -l /proc/self/fd > $here/fds").run()
    assert str(shop.lock) in shop.read("fds")
    assert stat.S_IMODE(shop.lock.stat().st_mode) == 0o600
