"""Files of the configuration that change in all the ways in which people and machines change files."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from portero_py.config.files import Seen
from portero_py.control import file_watch
from portero_py.control.file_watch import FileWatch
from tests.waiting import until


class Reader:
    """What reads the configuration: a file, and those that a pattern matches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked = 0
        self.answers = True
        self.text: dict[str, str] = {}
        self.watch: FileWatch | None = None
        self.seen = self.read()

    def read(self) -> Seen:
        seen = Seen()
        main = str(self.folder / "portero.toml")
        seen.file(main)
        self.text = {}
        for path in (main, *seen.matches(str(self.folder / "services.d" / "*.toml"))):
            seen.file(path)
            with contextlib.suppress(FileNotFoundError):
                self.text[Path(path).name] = Path(path).read_text()
        return seen

    def ask(self) -> None:
        self.asked += 1
        if self.answers:
            asyncio.get_running_loop().call_soon(self.answer)

    def answer(self) -> None:
        assert self.watch is not None
        self.watch.follow(self.read())


@contextlib.asynccontextmanager
async def watching(folder: Path, rescan_seconds: float = 60.0) -> AsyncIterator[Reader]:
    """A watch over a folder in which everything is there."""
    (folder / "services.d").mkdir(exist_ok=True)
    if not (folder / "portero.toml").exists():
        (folder / "portero.toml").write_text("first")
    reader = Reader(folder)
    reader.watch = FileWatch(reader.ask, reader.seen, rescan_seconds=rescan_seconds, step_seconds=0.01)
    running = asyncio.create_task(reader.watch.run())
    try:
        yield reader
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_a_file_that_is_written_or_replaced_is_read_again(tmp_path: Path) -> None:
    async with watching(tmp_path) as reader:
        (tmp_path / "portero.toml").write_text("second")
        await until(lambda: reader.text["portero.toml"] == "second")
        (tmp_path / "new").write_text("third")
        (tmp_path / "new").rename(tmp_path / "portero.toml")
        await until(lambda: reader.text["portero.toml"] == "third")


async def test_included_files_come_change_and_go(tmp_path: Path) -> None:
    async with watching(tmp_path) as reader:
        (tmp_path / "services.d" / "a.toml").write_text("a")
        await until(lambda: reader.text.get("a.toml") == "a")
        (tmp_path / "services.d" / "a.toml").write_text("b")
        await until(lambda: reader.text.get("a.toml") == "b")
        (tmp_path / "services.d" / "a.toml").unlink()
        await until(lambda: "a.toml" not in reader.text)


async def test_a_file_in_which_nothing_is_read_asks_for_nothing(tmp_path: Path) -> None:
    async with watching(tmp_path) as reader:
        (tmp_path / "services.d" / ".a.toml.swp").write_text("x")
        (tmp_path / "other").write_text("x")
        (tmp_path / "portero.toml").write_text("second")  # after those
        await until(lambda: reader.text["portero.toml"] == "second")
        assert reader.asked == 1


async def test_a_mounted_folder_whose_link_is_swapped_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "services.d"
    folder.mkdir()

    def publish(version: int) -> None:
        data = folder / f"..{version}"
        data.mkdir()
        (data / "a.toml").write_text(str(version))
        (folder / "..tmp").symlink_to(data.name)
        (folder / "..tmp").rename(folder / "..data")

    publish(1)
    (folder / "a.toml").symlink_to("..data/a.toml")
    async with watching(tmp_path) as reader:
        assert reader.text["a.toml"] == "1"
        for version in (2, 3, 4):
            publish(version)
            await until(lambda: reader.text["a.toml"] == str(version))  # noqa: B023


async def test_the_target_of_a_link_elsewhere_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("one")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "portero.toml").symlink_to(tmp_path / "real" / "file")
    async with watching(tmp_path / "here") as reader:
        (tmp_path / "real" / "file").write_text("two")
        await until(lambda: reader.text["portero.toml"] == "two")


async def test_a_folder_that_appears_later_or_is_replaced_is_found(tmp_path: Path) -> None:
    async with watching(tmp_path, rescan_seconds=0.2) as reader:
        (tmp_path / "services.d").rmdir()
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "a.toml").write_text("a")
        (tmp_path / "other").rename(tmp_path / "services.d")
        await until(lambda: reader.text.get("a.toml") == "a")
        (tmp_path / "services.d" / "b.toml").write_text("b")
        await until(lambda: reader.text.get("b.toml") == "b")


async def test_a_change_in_the_middle_of_a_reading_is_another_reading(tmp_path: Path) -> None:
    async with watching(tmp_path) as reader:
        reader.answers = False
        (tmp_path / "portero.toml").write_text("second")
        await until(lambda: reader.asked == 1)
        seen = reader.read()
        (tmp_path / "portero.toml").write_text("third, of another length")
        await asyncio.sleep(0.3)
        assert reader.asked == 1  # one at a time
        reader.answers = True
        assert reader.watch is not None
        reader.watch.follow(seen)
        await until(lambda: reader.text["portero.toml"] == "third, of another length")


async def test_a_flood_of_changes_is_a_few_readings(tmp_path: Path) -> None:
    async with watching(tmp_path) as reader:
        for number in range(300):
            (tmp_path / "portero.toml").write_text(f"{number:04}")
            await asyncio.sleep(0.001)
        await until(lambda: reader.text["portero.toml"] == "0299")
        await asyncio.sleep(0.5)
        assert reader.asked < 100


async def test_where_nobody_answers_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file_watch, "PATIENCE", 0.01)
    async with watching(tmp_path, rescan_seconds=0.05) as reader:
        reader.answers = False
        (tmp_path / "portero.toml").write_text("second")
        await until(lambda: reader.asked >= 2)
        assert "nobody answered" in caplog.text


async def test_who_is_told_nothing_new_asks_ever_more_rarely(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with watching(tmp_path, rescan_seconds=0.02) as reader:
        asked_at: list[float] = []
        former = reader.seen

        def ask() -> None:
            assert reader.watch is not None
            asked_at.append(asyncio.get_running_loop().time())
            reader.watch.follow(former)

        assert reader.watch is not None
        reader.watch._ask = ask
        (tmp_path / "portero.toml").write_text("second")
        await until(lambda: len(asked_at) >= 6)
        pauses = [later - sooner for sooner, later in itertools.pairwise(asked_at)]
        assert all(pause >= 0.02 * 2**number for number, pause in enumerate(pauses))
        (tmp_path / "portero.toml").write_text("third, which is news")
        asked = len(asked_at)
        await until(lambda: len(asked_at) > asked)
        assert caplog.text == ""


async def test_folders_that_cannot_be_watched_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_watch(*_: object, **__: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(file_watch, "awatch", no_watch)
    async with watching(tmp_path, rescan_seconds=0.05) as reader:
        (tmp_path / "portero.toml").write_text("second")
        await until(lambda: reader.text["portero.toml"] == "second")
        (tmp_path / "portero.toml").write_text("third, of another length")
        await until(lambda: reader.text["portero.toml"] == "third, of another length")
    assert caplog.text.count("cannot be watched") == 1


def test_a_pipe_is_no_file_to_follow(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    seen = Seen()
    seen.file(str(tmp_path / "pipe"))
    assert not seen
    assert seen.folders() == {}
