"""The certificate store: a directory in, tables of certificates out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from watchfiles import awatch

from portero_py.control.certificates import files
from portero_py.control.certificates.store import CertificateStore
from portero_py.core.certificates import Certificate, CertificateTable
from portero_py.demo.self_signed import Authority, KeyPair
from portero_py.errors import BadCertificate, ConfigError
from tests.odd_pairs import signed
from tests.waiting import until

AUTHORITY = Authority()
A1 = AUTHORITY.issue("a.example")
A2 = AUTHORITY.issue("a.example")
B1 = AUTHORITY.issue("b.example")
#: As long as A1's and A2's on purpose: keys of one kind have one size.
EXPIRED = AUTHORITY.issue("old.example", days=-1)


class Clock:
    """Wall-clock time, well after whatever the file system says."""

    def __init__(self) -> None:
        self.now = time.time() + 60

    def __call__(self) -> float:
        return self.now


class Desk:
    """A directory, the store that looks after it, and what the store said."""

    def __init__(self, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.directory = directory
        self.tables: list[CertificateTable] = []
        self.results: Counter[str] = Counter()
        self.tried: list[str] = []  # fingerprints
        self.refused: set[str] = set()
        self.clock = Clock()
        self._caplog = caplog
        self.store = self.new_store()

    def new_store(self, rescan_seconds: float = 60) -> CertificateStore:
        return CertificateStore(
            self.directory,
            self.publish,
            trial=self.trial,
            count=lambda result: self.results.update([result]),
            rescan_seconds=rescan_seconds,
            retry_seconds=0,
            clock=self.clock,
        )

    def trial(self, certificate: Certificate) -> None:
        self.tried.append(certificate.fingerprint)
        if certificate.fingerprint in self.refused:
            raise BadCertificate("nobody likes it")

    async def publish(self, table: CertificateTable) -> None:
        self.tables.append(table)

    def put(self, name: str, pair: KeyPair) -> None:
        pair.write(self.directory / name)

    def served(self) -> dict[str, str]:
        """Name -> fingerprint, of the table published last."""
        table = self.tables[-1]
        return {certificate.name: certificate.fingerprint for certificate in table.certificates}

    def log(self) -> list[str]:
        """What was logged as a warning or an error since the last call."""
        lines = [
            record.getMessage()
            for record in self._caplog.records
            if record.levelno >= logging.WARNING and record.name.startswith("portero_py")
        ]
        self._caplog.clear()
        return lines


@pytest.fixture
def desk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Desk:
    directory = tmp_path / "certs"
    directory.mkdir()
    return Desk(directory, caplog)


# Layouts


async def test_every_layout_is_read(desk: Desk) -> None:
    desk.put("App.Example", A1)
    desk.put("_wildcard.one.example", B1)
    desk.put("*.two.example", B1)
    combined = desk.directory / "b.example.pem"
    combined.touch(mode=0o600)
    combined.write_bytes(B1.chain_pem + B1.key_pem)
    leaf_only = desk.directory / "leaf.example"
    AUTHORITY.issue("leaf.example").write(leaf_only)
    (leaf_only / "fullchain.pem").rename(leaf_only / "cert.pem")
    await desk.store.load()
    assert list(desk.served()) == [
        "*.one.example",
        "*.two.example",
        "app.example",
        "b.example",
        "leaf.example",
    ]


async def test_fullchain_wins_over_cert(desk: Desk) -> None:
    desk.put("a.example", A1)
    (desk.directory / "a.example" / "cert.pem").write_bytes(B1.chain_pem)
    await desk.store.load()
    assert desk.served() == {"a.example": A1.fingerprint}
    assert desk.log() == []


async def test_dot_folders_and_stray_files_are_ignored(desk: Desk) -> None:
    desk.put("a.example", A1)
    desk.put(".b.example", B1)
    desk.put("..2026_01_01", B1)
    (desk.directory / "README").write_text("hello")
    (desk.directory / "lost+found").mkdir()
    (desk.directory / "archive").mkdir()
    (desk.directory / ".c.example.pem").write_text("half")
    await desk.store.load()
    assert list(desk.served()) == ["a.example"]
    assert desk.log() == []


async def test_a_folder_that_waits_for_its_files_is_spoken_of(desk: Desk) -> None:
    desk.put("a.example", A1)
    (desk.directory / "new.example").mkdir()
    await desk.store.load()
    (line,) = desk.log()
    assert line.endswith("new.example cannot be used: there is no fullchain.pem or cert.pem in it")


async def test_a_folder_that_is_no_host_name_is_spoken_of_when_it_holds_a_pair(desk: Desk) -> None:
    desk.put("a.example", A1)
    desk.put("not a host", B1)
    await desk.store.load()
    assert list(desk.served()) == ["a.example"]
    (line,) = desk.log()
    assert '"not a host" is not a host name' in line


async def test_a_pair_without_its_folder_is_explained(desk: Desk) -> None:
    A1.write(desk.directory)
    await desk.store.load()
    lines = desk.log()
    assert sum("belongs into a folder that has the name of its host" in line for line in lines) == 2
    assert "no usable certificate" in lines[-1]


async def test_of_two_for_one_name_the_folder_is_served_and_the_other_is_named(desk: Desk) -> None:
    desk.put("a.example", A1)
    (desk.directory / "a.example.pem").write_bytes(A2.chain_pem + A2.key_pem)
    await desk.store.load()
    assert desk.served() == {"a.example": A1.fingerprint}
    (line,) = desk.log()
    assert "a.example.pem cannot be used" in line
    assert "serves this name already" in line


async def test_a_combined_file_steps_in_for_a_bad_folder(desk: Desk) -> None:
    desk.put("a.example", KeyPair(A1.chain_pem, B1.key_pem))
    (desk.directory / "a.example.pem").write_bytes(A2.chain_pem + A2.key_pem)
    await desk.store.load()
    assert desk.served() == {"a.example": A2.fingerprint}


async def test_certbot_links_and_their_renewal_work(desk: Desk, tmp_path: Path) -> None:
    live, archive = desk.directory / "a.example", tmp_path / "archive"
    live.mkdir()
    for number, pair in enumerate((A1, A2)):
        pair.write(archive / str(number))
    for file in ("fullchain.pem", "privkey.pem"):
        (live / file).symlink_to(archive / "0" / file)
    await desk.store.load()
    assert desk.served() == {"a.example": A1.fingerprint}
    for file in ("fullchain.pem", "privkey.pem"):
        (live / f"{file}.new").symlink_to(archive / "1" / file)
        (live / f"{file}.new").replace(live / file)
    await desk.store.rescan()
    assert desk.served() == {"a.example": A2.fingerprint}


async def test_kubernetes_swaps_of_a_whole_volume_work(desk: Desk) -> None:
    folder = desk.directory / "a.example"
    A1.write(folder / "..2026_01_01")
    A2.write(folder / "..2026_02_02")
    (folder / "..data").symlink_to("..2026_01_01")
    for file in ("fullchain.pem", "privkey.pem"):
        (folder / file).symlink_to(Path("..data") / file)
    await desk.store.load()
    assert desk.served() == {"a.example": A1.fingerprint}
    (folder / "..data_tmp").symlink_to("..2026_02_02")
    (folder / "..data_tmp").replace(folder / "..data")
    await desk.store.rescan()
    assert desk.served() == {"a.example": A2.fingerprint}


# Isolation


@pytest.mark.parametrize(
    "damage", ["empty", "half", "other key", "no key", "fifo", "huge", "folder", "dangling"]
)
async def test_one_bad_pair_leaves_the_others_and_its_own_last_good_version(desk: Desk, damage: str) -> None:
    desk.put("a.example", A1)
    desk.put("b.example", B1)
    await desk.store.load()
    key = desk.directory / "a.example" / "privkey.pem"
    key.unlink()
    match damage:
        case "empty":
            key.touch()
        case "half":
            key.write_bytes(A1.key_pem[:100])
        case "other key":
            key.write_bytes(B1.key_pem)
        case "fifo":
            os.mkfifo(key)
        case "huge":
            key.write_bytes(A1.key_pem + b" " * (1 << 20))
        case "folder":
            key.mkdir()
        case "dangling":
            key.symlink_to("nowhere")
    desk.put("b.example", B2 := AUTHORITY.issue("b.example"))  # noqa: N806
    await desk.store.rescan()
    assert desk.served() == {"a.example": A1.fingerprint, "b.example": B2.fingerprint}
    (line,) = desk.log()
    assert "a.example cannot be used: " in line
    assert line.endswith("; the one loaded before stays")


async def test_a_pair_is_tried_when_it_is_odd_or_takes_another_s_place_and_else_is_not(desk: Desk) -> None:
    desk.put("a.example", A1)
    desk.put("odd.example", odd := signed("odd.example", ec.SECP256K1()))
    await desk.store.load()
    assert desk.tried == [odd.fingerprint]
    desk.put("a.example", A2)
    await desk.store.rescan()
    assert desk.tried == [odd.fingerprint, A2.fingerprint]
    (desk.directory / "a.example" / "cert.pem").touch()
    await desk.store.rescan()  # the same bytes are not tried again
    assert desk.tried == [odd.fingerprint, A2.fingerprint]


async def test_a_pair_that_cannot_be_served_never_replaces_one_that_can(desk: Desk) -> None:
    desk.put("a.example", A1)
    desk.put("b.example", B1)
    await desk.store.load()
    desk.refused.add(A2.fingerprint)
    desk.put("a.example", A2)
    desk.put("b.example", B2 := AUTHORITY.issue("b.example"))  # noqa: N806
    await desk.store.rescan()
    assert desk.served() == {"a.example": A1.fingerprint, "b.example": B2.fingerprint}
    (line,) = desk.log()
    assert line.endswith("a.example cannot be used: nobody likes it; the one loaded before stays")


async def test_what_could_not_be_read_for_a_want_of_descriptors_is_read_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.put("a.example", A1)
    await desk.store.load()
    desk.put("a.example", A2)

    def exhausted(_: Path) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(files, "_read", exhausted)
        await desk.store.rescan()
    assert desk.served() == {"a.example": A1.fingerprint}
    await desk.store.rescan()
    assert desk.served() == {"a.example": A2.fingerprint}


@pytest.mark.parametrize("where", ["scan", "publish"])
async def test_a_fault_in_one_look_is_logged_and_the_next_look_comes(
    desk: Desk, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    desk.put("a.example", A1)
    await desk.store.load()
    desk.put("a.example", A2)

    async def fails(_: object) -> None:
        raise TypeError("a bug")

    def fails_at_once(_: object) -> None:
        raise TypeError("a bug")

    with monkeypatch.context() as patch:
        if where == "scan":
            patch.setattr(files, "_one_a_name", fails_at_once)
        else:
            patch.setattr(desk.store, "publish", fails)
        await desk.store.rescan()
    assert "the certificates loaded before stay" in caplog.text
    assert desk.served() == {"a.example": A1.fingerprint}
    assert desk.results["bad_certificate"] == 1
    await desk.store.rescan()
    assert desk.served() == {"a.example": A2.fingerprint}


async def test_a_fault_in_the_watch_leaves_the_looks_from_time_to_time(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> Any:
        raise TypeError("a bug")

    monkeypatch.setattr("portero_py.control.certificates.store.awatch", fails)
    desk.put("a.example", A1)
    desk.store = desk.new_store(rescan_seconds=0.01)
    await desk.store.load()
    following = asyncio.create_task(desk.store.run())
    desk.put("a.example", A2)
    await until(lambda: desk.served() == {"a.example": A2.fingerprint})
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following
    assert caplog.text.count("watching") == 1


async def test_a_bad_pair_at_the_start_leaves_the_others(desk: Desk) -> None:
    desk.put("a.example", KeyPair(A1.chain_pem, B1.key_pem))
    desk.put("b.example", B1)
    await desk.store.load()
    assert list(desk.served()) == ["b.example"]
    (line,) = desk.log()
    assert "does not belong to the certificate" in line
    assert desk.results == {"ok": 1, "bad_certificate": 1}


async def test_a_bad_pair_at_the_start_leaves_what_others_present_for_its_name(desk: Desk) -> None:
    desk.put("a.example", A1)
    desk.put("b.example", B1)
    await desk.store.load()
    presented = desk.store.table.certificates
    desk.put("a.example", KeyPair(A2.chain_pem, B1.key_pem))
    asked: list[list[str]] = []

    async def former(names: list[str]) -> list[Certificate]:
        asked.append(names)
        return list(presented)

    successor = desk.new_store()
    await successor.load(former)
    assert asked == [["a.example"]]
    assert desk.served() == {"a.example": A1.fingerprint, "b.example": B1.fingerprint}
    assert "the one loaded before stays" in desk.log()[-1]
    desk.put("a.example", A2)
    await successor.rescan()
    assert desk.served()["a.example"] == A2.fingerprint
    shutil.rmtree(desk.directory / "a.example")
    await successor.rescan()
    assert list(desk.served()) == ["b.example"]


async def test_nobody_is_asked_for_certificates_when_all_files_are_good(desk: Desk) -> None:
    desk.put("a.example", A1)

    async def former(names: list[str]) -> list[Certificate]:
        raise AssertionError(names)

    await desk.store.load(former)
    assert desk.served() == {"a.example": A1.fingerprint}


async def test_a_bad_state_of_files_is_logged_and_counted_once(desk: Desk) -> None:
    desk.put("a.example", KeyPair(A1.chain_pem, B1.key_pem))
    desk.put("b.example", B1)
    await desk.store.load()
    desk.log()
    for _ in range(3):
        await desk.store.rescan()
    assert desk.log() == []
    assert desk.results["bad_certificate"] == 1
    desk.put("a.example", KeyPair(A2.chain_pem, B1.key_pem))  # bad in another way
    await desk.store.rescan()
    assert len(desk.log()) == 1
    assert desk.results["bad_certificate"] == 2
    desk.put("a.example", A2)
    await desk.store.rescan()
    assert desk.log() == []
    assert desk.served()["a.example"] == A2.fingerprint


async def test_a_pair_torn_for_a_moment_is_read_again_without_a_word(desk: Desk) -> None:
    desk.put("a.example", A1)
    await desk.store.load()
    A2.write(desk.directory / "a.example")
    (desk.directory / "a.example" / "privkey.pem").write_bytes(A1.key_pem)
    published = asyncio.Event()

    async def finish_the_pair(table: CertificateTable) -> None:
        published.set()
        (desk.directory / "a.example" / "privkey.pem").write_bytes(A2.key_pem)

    # The good news about b go out between the two looks: that is when the writer finishes.
    desk.put("b.example", B1)
    desk.store.publish = finish_the_pair
    await desk.store.rescan()
    assert published.is_set()
    assert desk.log() == []
    assert desk.store.table.get("a.example") is not None
    assert desk.store.expiries().keys() == {"a.example", "b.example"}
    found = desk.store.table.get("a.example")
    assert found is not None
    assert found.fingerprint == A2.fingerprint


async def test_a_change_within_the_grain_of_file_times_is_seen(desk: Desk) -> None:
    desk.put("a.example", A1)
    desk.clock.now = time.time()
    await desk.store.load()
    folder = desk.directory / "a.example"
    times = [(folder / file, (folder / file).stat()) for file in ("fullchain.pem", "privkey.pem")]
    real_stat = Path.stat
    frozen = dict(times)

    def stat_of_a_coarse_clock(path: Path, **options: bool) -> os.stat_result:
        return frozen[path] if path in frozen else real_stat(path, **options)

    (folder / "fullchain.pem").write_bytes(A2.chain_pem)
    (folder / "privkey.pem").write_bytes(A2.key_pem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "stat", stat_of_a_coarse_clock)
        await desk.store.rescan()
    assert desk.served() == {"a.example": A2.fingerprint}


async def test_unchanged_files_are_not_opened_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.put("a.example", A1)
    await desk.store.load()

    def never(*_: object) -> int:
        raise AssertionError("opened")

    monkeypatch.setattr("portero_py.control.certificates.files.os.open", never)
    await desk.store.rescan()
    assert len(desk.tables) == 1


# Removal


async def test_a_removed_folder_removes_its_certificate(desk: Desk) -> None:
    desk.put("a.example", A1)
    desk.put("b.example", B1)
    await desk.store.load()
    shutil.rmtree(desk.directory / "a.example")
    await desk.store.rescan()
    assert list(desk.served()) == ["b.example"]
    assert desk.results == {"ok": 2, "removed": 1}
    assert desk.log() == []


async def test_a_folder_that_is_replaced_by_renaming_is_never_without_a_certificate(desk: Desk) -> None:
    desk.put("a.example", A1)
    await desk.store.load()
    A2.write(desk.directory / ".next")
    (desk.directory / "a.example").rename(desk.directory / ".former")
    # The new one comes between the two looks, as with `mv a.example .former; mv .next a.example`.
    desk.put("b.example", B1)

    async def put_the_new_one(table: CertificateTable) -> None:
        await desk.publish(table)
        if not (desk.directory / "a.example").exists():
            (desk.directory / ".next").rename(desk.directory / "a.example")

    desk.store.publish = put_the_new_one
    await desk.store.rescan()
    assert all(table.get("a.example") for table in desk.tables)
    assert desk.served()["a.example"] == A2.fingerprint


async def test_an_emptied_folder_keeps_its_last_good_certificate(desk: Desk) -> None:
    desk.put("a.example", A1)
    await desk.store.load()
    for file in (desk.directory / "a.example").iterdir():
        file.unlink()
    await desk.store.rescan()
    assert desk.store.table.get("a.example") is not None
    (line,) = desk.log()
    assert "there is no fullchain.pem or cert.pem in it; the one loaded before stays" in line


async def test_the_last_certificate_can_be_removed_too(desk: Desk) -> None:
    desk.put("a.example", A1)
    await desk.store.load()
    shutil.rmtree(desk.directory / "a.example")
    await desk.store.rescan()
    assert desk.served() == {}
    (line,) = desk.log()
    assert "TLS handshakes are refused until one appears" in line


# The directory itself


async def test_a_start_with_an_empty_directory_says_that_tls_waits(desk: Desk) -> None:
    await desk.store.load()
    assert desk.tables == []
    (line,) = desk.log()
    assert line == f"no usable certificate in {desk.directory}: TLS handshakes are refused until one appears"
    desk.put("a.example", A1)
    await desk.store.rescan()
    assert list(desk.served()) == ["a.example"]


async def test_a_start_without_the_directory_is_an_error_in_one_line(desk: Desk) -> None:
    desk.directory.rmdir()
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        await desk.store.load()
    desk.directory.touch()
    with pytest.raises(ConfigError, match="cannot be read: Not a directory"):
        await desk.store.load()


async def test_a_directory_that_vanishes_takes_nothing_with_it(desk: Desk) -> None:
    desk.put("a.example", A1)
    await desk.store.load()
    desk.directory.rename(desk.directory.with_name("elsewhere"))
    await desk.store.rescan()
    await desk.store.rescan()
    assert len(desk.tables) == 1
    (line,) = desk.log()
    assert line.endswith("No such file or directory; the certificates loaded before stay")
    desk.directory.mkdir()
    desk.put("a.example", A2)
    await desk.store.rescan()
    assert desk.served() == {"a.example": A2.fingerprint}


# Warnings and inventory


async def test_an_expired_certificate_is_served_with_a_warning(desk: Desk) -> None:
    desk.put("old.example", EXPIRED)
    await desk.store.load()
    assert list(desk.served()) == ["old.example"]
    (line,) = desk.log()
    assert line.endswith("old.example: it has expired")


async def test_a_certificate_near_its_end_is_spoken_of_once_a_day(desk: Desk) -> None:
    desk.put("a.example", AUTHORITY.issue("a.example", days=10))
    desk.put("b.example", AUTHORITY.issue("b.example", days=90))
    await desk.store.load()
    start = desk.clock.now
    assert desk.log() == []
    spoken = []
    for hours in range(200, 276, 6):
        desk.clock.now = start + hours * 3600
        await desk.store.rescan()
        spoken += [line for line in desk.log() if " ended " in line or " ends in " in line]
    assert [line.partition(" (")[0] for line in spoken] == [
        "certificate a.example ends in 1.7 days",
        "certificate a.example ends in 0.7 days",
        "certificate a.example ended 0.3 days ago",
        "certificate a.example ended 1.3 days ago",
    ]


async def test_a_certificate_that_expires_while_it_is_served_is_warned_about_once(desk: Desk) -> None:
    desk.put("a.example", A1)
    await desk.store.load()
    assert desk.log() == []
    desk.clock.now = desk.store.expiries()["a.example"]
    await desk.store.rescan()
    await desk.store.rescan()
    assert [line.split(": ")[-1] for line in desk.log()] == ["it has expired"]


async def test_a_key_that_everybody_can_read_is_warned_about(desk: Desk) -> None:
    desk.put("a.example", A1)
    (desk.directory / "a.example" / "privkey.pem").chmod(0o644)
    await desk.store.load()
    (line,) = desk.log()
    assert line.endswith("its private key can be read by every user of this machine")


async def test_no_log_line_holds_a_key(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.put("a.example", KeyPair(A1.chain_pem, A1.key_pem[:90]))
    desk.put("b.example", B1)
    await desk.store.load()
    assert len(caplog.records) >= 1
    assert A1.key_pem[30:60].decode() not in caplog.text


def test_the_inventory_lists_good_and_bad_without_an_event_loop(desk: Desk) -> None:
    desk.put("a.example", A1)
    desk.put("b.example", KeyPair(B1.chain_pem, A1.key_pem))
    desk.put("old.example", EXPIRED)
    inventory = desk.store.check()
    assert [entry.name for entry in inventory.entries] == ["a.example", "b.example", "old.example"]
    assert [bool(entry.certificate) for entry in inventory.entries] == [True, False, True]
    assert not inventory.ok
    (problem,) = inventory.problems
    assert "b.example cannot be used: the private key does not belong" in problem
    (warning,) = inventory.warnings
    assert warning.endswith("old.example: it has expired")
    assert desk.tables == []


def test_an_inventory_is_fine_with_warnings_but_not_without_certificates(desk: Desk) -> None:
    assert desk.store.check().problems == [f"no usable certificate in {desk.directory}"]
    desk.put("old.example", EXPIRED)
    assert desk.store.check().ok
    shutil.rmtree(desk.directory)
    (problem,) = desk.store.check().problems
    assert problem == f"the certificate directory {desk.directory} cannot be read: No such file or directory"


# Following the directory, with the real file system


@contextlib.asynccontextmanager
async def following(store: CertificateStore) -> AsyncIterator[None]:
    task = asyncio.ensure_future(store.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until_served(desk: Desk, served: dict[str, str], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not desk.tables or desk.served() != served:
            await asyncio.sleep(0.02)


async def test_a_change_is_seen_by_the_watch_long_before_the_rescan(desk: Desk) -> None:
    desk.put("a.example", A1)
    await desk.store.load()
    async with following(desk.store):
        desk.put("b.example", B1)
        await until_served(desk, {"a.example": A1.fingerprint, "b.example": B1.fingerprint})
        desk.put("a.example", A2)
        await until_served(desk, {"a.example": A2.fingerprint, "b.example": B1.fingerprint})
        shutil.rmtree(desk.directory / "b.example")
        await until_served(desk, {"a.example": A2.fingerprint})
    assert desk.log() == []


async def test_a_link_to_a_large_tree_is_watched_no_deeper_than_a_folder(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[str] = []

    def note(*paths: str, **options: Any) -> AsyncGenerator[object, None]:
        assert options["recursive"] is False
        watched.extend(paths)
        return awatch(*paths, **options)

    monkeypatch.setattr("portero_py.control.certificates.store.awatch", note)
    (tmp_path / "tree" / "much" / "deeper").mkdir(parents=True)
    (desk.directory / "old.example").symlink_to(tmp_path / "tree")
    (desk.directory / "gone.example").symlink_to(tmp_path / "nowhere")
    async with following(desk.store):
        desk.put("a.example", A1)
        await until_served(desk, {"a.example": A1.fingerprint})
        await until(lambda: str(desk.directory / "a.example") in watched)
    assert set(watched) == {str(desk.directory / name) for name in ("", "old.example", "a.example")}


async def test_a_directory_that_appears_and_is_replaced_is_watched_anew(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    watches = []

    def count_watches(*paths: Path, **options: Any) -> AsyncGenerator[object, None]:
        watches.append(paths)
        return awatch(*paths, **options)

    monkeypatch.setattr("portero_py.control.certificates.store.awatch", count_watches)
    desk.directory.rmdir()
    async with following(desk.new_store(rescan_seconds=0.2)):
        await asyncio.sleep(0.05)
        assert watches == []
        A1.write(desk.directory / "a.example")
        await until_served(desk, {"a.example": A1.fingerprint})
        await until(lambda: watches)  # a rescan may serve it before it is watched
        desk.directory.rename(desk.directory.with_name("former"))
        desk.put("a.example", A2)
        await until_served(desk, {"a.example": A2.fingerprint})
        await until(lambda: len(watches) >= 2)


async def test_a_directory_that_cannot_be_watched_is_still_rescanned(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_watch(*_: object, **__: object) -> AsyncIterator[None]:
        raise OSError("inotify limit reached")

    monkeypatch.setattr("portero_py.control.certificates.store.awatch", no_watch)
    store = desk.new_store(rescan_seconds=0.05)
    async with following(store):
        desk.put("a.example", A1)
        await until_served(desk, {"a.example": A1.fingerprint})
        await asyncio.sleep(0.2)
    watched = [line for line in desk.log() if "cannot be watched" in line]
    assert len(watched) == 1
