"""The records of orders: written down before they are made, looked for, and removed whatever comes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from portero_py.config.model import Acme, Address
from portero_py.control.acme.dns01 import records as module
from portero_py.control.acme.dns01.records import FIRST_PAUSE, MAX_PAUSE, DnsRecords
from portero_py.control.acme.dns01.zones import Server
from portero_py.control.acme.files import AcmeFiles
from portero_py.control.acme.locks import Lock
from portero_py.core.acme.dns_records import TxtRecord, record_value
from portero_py.errors import DnsFailed, StateUnwritable
from tests.waiting import until

NAME = "*.a.example"
AT = "_acme-challenge.a.example"
SERVER = Address("192.0.2.1", 53)


class Dns:
    """Zones and updates in memory. `late` is how often a look finds nothing yet."""

    def __init__(self) -> None:
        self.values: list[TxtRecord] = []
        self.asked: list[tuple[str, TxtRecord]] = []
        self.refuses = False
        self.late = 0
        self.alias = ""
        self.before: Callable[[], object] = lambda: None

    def aliases(self, name: str) -> list[str]:
        return [name, self.alias] if self.alias else [name]

    def servers_of(self, name: str) -> list[Server]:
        return [Server("ns1.test", (SERVER,))]

    def missing(self, name: str, values: list[str], servers: list[Server]) -> str:
        if self.late:
            self.late -= 1
            return "ns1.test does not have it"
        here = {record.value for record in self.values if record.name == name}
        return "" if set(values) <= here else "ns1.test has another value"

    def present(self, record: TxtRecord) -> None:
        self.before()
        self._ask("present", record)
        if record not in self.values:
            self.values.append(record)

    def cleanup(self, record: TxtRecord) -> None:
        self._ask("cleanup", record)
        if record in self.values:
            self.values.remove(record)

    def _ask(self, verb: str, record: TxtRecord) -> None:
        self.asked.append((verb, record))
        if self.refuses:
            raise DnsFailed("REFUSED")


class Desk:
    def __init__(self, folder: Path) -> None:
        self.files = AcmeFiles(folder, "https://ca.example/dir")
        self.dns = Dns()
        self.now = time.time()
        self.beats = 0

    async def beat(self) -> None:
        self.beats += 1

    @asynccontextmanager
    async def records(self, **more: Any) -> AsyncIterator[DnsRecords]:
        config = Acme(**{"dns_server": SERVER, **more})
        made = DnsRecords(config, self.files, asyncio.to_thread, lambda: self.now)
        made._tools = (self.dns, self.dns)  # type: ignore[assignment]
        task = asyncio.create_task(made.run())
        try:
            yield made
        finally:
            task.cancel()
            await asyncio.wait([task])
            made.close()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    return Desk(tmp_path)


async def test_a_record_is_written_down_before_it_is_made_and_until_it_is_gone(desk: Desk) -> None:
    expected = [TxtRecord(AT, record_value("p1")), TxtRecord(AT, record_value("p2"))]
    kept: list[list[TxtRecord]] = []
    desk.dns.before = lambda: kept.append(desk.files.dns_records(NAME))
    async with desk.records() as records:
        await records.show(NAME, [(NAME, "p1"), ("a.example", "p2")], desk.beat)
        assert desk.dns.values == expected
        assert kept == [expected, expected]
        await records.hide(NAME, desk.beat)
    assert desk.dns.values == []
    assert desk.files.dns_records(NAME) == []
    assert not (desk.files.folder(NAME) / "dns.json").exists()


async def test_the_end_of_the_aliases_is_what_is_kept(desk: Desk) -> None:
    desk.dns.alias = "a.acme.example"
    async with desk.records() as records:
        await records.show(NAME, [(NAME, "p")], desk.beat)
        desk.dns.alias = "elsewhere.example"  # somebody changes it meanwhile
        await records.hide(NAME, desk.beat)
    assert [(verb, record.name) for verb, record in desk.dns.asked] == [
        ("present", "a.acme.example"),
        ("cleanup", "a.acme.example"),
    ]


@pytest.mark.parametrize("alias", ["--option.example", "a b.example", "a\\;b.example", "x" * 256])
async def test_an_alias_that_could_mislead_a_program_is_refused(desk: Desk, alias: str) -> None:
    desk.dns.alias = alias
    async with desk.records() as records:
        with pytest.raises(DnsFailed, match="is an alias of a name that nobody wants to change"):
            await records.show(NAME, [(NAME, "p")], desk.beat)
    assert desk.dns.asked == []


async def test_it_is_waited_for_until_all_servers_have_it(desk: Desk) -> None:
    desk.dns.late = 5
    async with desk.records() as records:
        await records.show(NAME, [(NAME, "p")], desk.beat)
    assert desk.dns.late == 0
    assert desk.beats >= 5


async def test_what_is_not_there_in_time_is_an_error_that_names_the_server(desk: Desk) -> None:
    desk.dns.late = 1_000_000
    async with desk.records(dns_seconds=0.05) as records:
        with pytest.raises(
            DnsFailed, match=f"{AT} is not at all servers of its zone within 0.05 s: ns1.test"
        ):
            await records.show(NAME, [(NAME, "p")], desk.beat)
        await records.hide(NAME, desk.beat)
    assert desk.dns.values == []


async def test_a_removal_that_fails_is_tried_again_with_growing_pauses(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with desk.records() as records:
        await records.show(NAME, [(NAME, "p")], desk.beat)
        desk.dns.refuses = True
        await records.hide(NAME, desk.beat)
        tries = len(desk.dns.asked)
        pause = FIRST_PAUSE
        for number in range(1, 9):
            assert f"again in {pause:.0f} s: {AT} TXT" in caplog.text
            desk.now += pause - 1
            records._sooner.set()
            await asyncio.sleep(0.02)
            assert len(desk.dns.asked) == tries + number - 1
            desk.now += 1
            records._sooner.set()
            await until(lambda: len(desk.dns.asked) == tries + number)  # noqa: B023
            pause = min(2 * pause, MAX_PAUSE)
            await until(lambda: caplog.text.count("not removed yet") == number + 1)  # noqa: B023
        assert pause == MAX_PAUSE
        desk.dns.refuses = False
        desk.now += pause
        records._sooner.set()
        await until(lambda: not desk.files.dns_records(NAME))
    assert desk.dns.values == []


async def test_what_an_earlier_process_left_is_removed_when_no_order_is_at_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = TxtRecord(AT, "left")
    desk.files.save_dns_records(NAME, [record])
    desk.dns.values.append(record)
    order = Lock(desk.files.lock(NAME))
    order.acquire(desk.now)
    async with desk.records() as records:
        records.left_behind(NAME)
        await until(lambda: records._left[NAME][1])  # it is busy
        assert desk.dns.asked == []
        order.release()
        desk.now += records._left[NAME][1]
        records._sooner.set()
        await until(lambda: not desk.files.dns_records(NAME))
    assert desk.dns.values == []


async def test_without_a_way_to_remove_it_somebody_is_told_what_to_remove(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    desk.files.save_dns_records(NAME, [TxtRecord(AT, "left")])
    async with desk.records(dns_server=None) as records:
        records.left_behind(NAME)
        await until(lambda: f"remove by hand what was made for it once: {AT} TXT left" in caplog.text)
    assert desk.files.dns_records(NAME)  # the next start says so again, or removes it


async def test_a_disk_that_is_full_fails_what_is_to_be_shown_and_not_what_was(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StateUnwritable("no space left")

    async with desk.records() as records:
        await records.show(NAME, [(NAME, "p")], desk.beat)
        with monkeypatch.context() as patch:
            patch.setattr(desk.files, "save_dns_records", full)
            with pytest.raises(StateUnwritable):
                await records.show(NAME, [(NAME, "other")], desk.beat)
            await records.hide(NAME, desk.beat)  # it is gone, which could not be written down
        assert len(desk.dns.asked) == 2
        desk.now += MAX_PAUSE
        records._sooner.set()
        await until(lambda: not desk.files.dns_records(NAME))


async def test_a_damaged_list_counts_as_none(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    for text in ("{", "[1]", '[{"name": "--option", "value": "$(id)"}]'):
        desk.files.save_dns_records(NAME, [TxtRecord(AT, "x")])
        (desk.files.folder(NAME) / "dns.json").write_text(text)
        assert desk.files.dns_records(NAME) == []
    assert caplog.text.count("is damaged") == 3


async def test_whoever_waits_for_a_program_says_now_and_then_that_it_lives(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    program = tmp_path / "hook"
    program.write_text(f'#!/bin/sh\n[ "$1" = cleanup ] || until [ -e {tmp_path}/go ]; do sleep 0.01; done\n')
    program.chmod(0o755)

    async def beat() -> None:
        desk.beats += 1
        if desk.beats == 5:
            (tmp_path / "go").touch()

    desk.dns.values.append(TxtRecord(AT, record_value("p")))  # as if the program had made it
    async with desk.records(dns_server=None, dns_hook=(str(program),)) as records:
        await records.show(NAME, [(NAME, "p")], beat)
        await records.hide(NAME, desk.beat)
    assert desk.beats >= 5
    assert desk.files.dns_records(NAME) == []


async def test_at_the_end_a_program_is_killed_and_its_record_stays_written_down(
    desk: Desk, tmp_path: Path
) -> None:
    program = tmp_path / "hook"
    program.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid\nsleep 1000\n"
    )
    program.chmod(0o755)
    async with desk.records(dns_server=None, dns_hook=(str(program),)) as records:
        task = asyncio.create_task(records.show(NAME, [(NAME, "p")], desk.beat))
        await until((tmp_path / "pid").exists)
        pid = int((tmp_path / "pid").read_text())
        task.cancel()
        await asyncio.wait([task])
        await until(lambda: _is_dead(pid))
    assert desk.files.dns_records(NAME) == [TxtRecord(AT, record_value("p"))]


def _is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True
