"""The certificate store: keeps the table of certificates equal to a directory, while both are in use.

The rules
- A change is seen at once by inotify, in the directory and in the folders (or links to such) directly in it,
  no deeper, and within `rescan_seconds` where inotify is blind (network file systems, targets of links, a
  directory that is replaced or appears later). Reading and parsing happen in a thread.
- What is good is published first. Then, if something is bad or gone, it is looked at again
  `retry_seconds` later: most often it was being replaced. Only what is still so is logged, once for each
  state of the files.
- A directory that cannot be read, or vanishes, changes nothing. At the start it is an error.
- Following the directory never ends: a fault in one look is logged, and the next look comes all the same.
- A certificate near its end is spoken of once a day, wherever it comes from.
- Without any usable certificate the proxy runs, says so in the log, and refuses TLS handshakes until one
  appears: what brings the certificate (an ACME client that uses the proxy's port 80, an orchestrator that
  waits for the proxy) may need it to run.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from watchfiles.main import FileChange, awatch

from portero_py.control.certificates.files import CertificateFiles, Entry, FileState, Scan, Trial
from portero_py.core.acme.schedule import ends_soon
from portero_py.core.certificates import Certificate, CertificateTable
from portero_py.errors import BadCertificate, ConfigError

_log = logging.getLogger(__name__)

RESCAN_SECONDS: Final = 30.0
RETRY_SECONDS: Final = 0.3
DAY: Final = 86400.0
#: A burst of changes is one change: it has ended when nothing came for a step, or after the whole of it.
_BURST_MS: Final = 1000
_STEP_MS: Final = 100

# What became of a pair of files: the label of `portero_certificate_reloads_total`.
LOADED: Final = "ok"
REMOVED: Final = "removed"
FAILED: Final = BadCertificate.reason

#: What others present for these names (normalised), who got it before this process was there.
Former = Callable[[list[str]], Awaitable[list[Certificate]]]
Publish = Callable[[CertificateTable], Awaitable[None]]


class _Complaint(NamedTuple):
    level: int
    text: str
    state: tuple[FileState, ...] = ()  # of the files: the same words about other files are news


@dataclass(frozen=True, slots=True)
class Inventory:
    """What `--check` and `certs` show. `problem` is about the directory itself; "" when it can be read."""

    directory: str
    entries: tuple[Entry, ...]
    problem: str = ""

    @property
    def problems(self) -> list[str]:
        """Everything that has to be put right, one line each."""
        lines = [f"{entry.origin} cannot be used: {entry.problem}" for entry in self.entries if entry.problem]
        if self.problem:
            lines.append(self.problem)
        elif not any(entry.certificate for entry in self.entries):
            lines.append(f"no usable certificate in {self.directory}")
        return lines

    @property
    def warnings(self) -> list[str]:
        """Everything that will displease some clients, one line each."""
        return [f"{entry.origin}: {warning}" for entry in self.entries for warning in entry.warnings]

    @property
    def ok(self) -> bool:
        """Whether every certificate can be served, and there is one."""
        return not self.problems


class CertificateStore:
    """The certificates of one directory.

    `publish` is awaited with each new table; `trial` refuses a pair that cannot be served (see
    `certificate_files`); `count` is called for each pair of files that changed, with
    LOADED, REMOVED or FAILED. Times are in seconds.
    """

    def __init__(
        self,
        directory: str | Path,
        publish: Publish | None = None,
        *,
        trial: Trial | None = None,
        count: Callable[[str], None] | None = None,
        rescan_seconds: float = RESCAN_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        # process
        self.publish = publish
        self.table = CertificateTable()
        self._count = count or _count_nothing
        self._directory = Path(directory)
        self._trial = trial
        self._files = CertificateFiles(self._directory, clock, trial)
        self._clock = clock
        self._rescan_seconds = rescan_seconds
        self._retry_seconds = retry_seconds
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._warned: dict[str, float] = {}  # name -> when its end was last spoken of
        # the last scan
        self._said: set[_Complaint] = set()

    def check(self) -> Inventory:
        """Look at the directory afresh, without touching what is served. Blocks; needs no event loop."""
        try:
            scan = CertificateFiles(self._directory, self._clock, self._trial).scan()
        except OSError as error:
            return Inventory(str(self._directory), (), self._unreadable(error))
        return Inventory(str(self._directory), scan.entries)

    def expiries(self) -> dict[str, float]:
        """Return the end of validity (epoch seconds) of every certificate that is served, by name."""
        return {certificate.name: certificate.not_after for certificate in self.table.certificates}

    async def load(self, former: Former | None = None) -> CertificateTable:
        """Read the directory for the first time and publish what it holds.

        With `former`, what others present already stays where the files are bad just now.
        Raises ConfigError when the directory is missing or cannot be read. Bad certificates are only logged.
        """
        async with self._turn:
            try:
                scan = await self._scan(former)
            except OSError as error:
                raise ConfigError(self._unreadable(error)) from error
            await self._take(scan)
            self._report(scan)
            self._warn_of_ends()
        return self.table

    async def rescan(self, former: Former | None = None) -> None:
        """Read what has changed, publish it, and log what is wrong. Whatever happens, it raises nothing.

        `former` is as for `load`.
        """
        async with self._turn:
            try:
                await self._look(former)
            except OSError as error:
                text = f"{self._unreadable(error)}; the certificates loaded before stay"
                self._say({_Complaint(logging.ERROR, text)})
            except Exception:  # a bug: what is served stays, and the next look may fare better
                self._count(FAILED)
                _log.exception("looking at the certificates failed; the certificates loaded before stay")
            self._warn_of_ends()

    async def run(self) -> None:
        """Follow the directory until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch())
            while True:
                try:
                    async with asyncio.timeout(self._rescan_seconds):
                        await self._changed.wait()
                except TimeoutError:
                    pass  # nothing was seen: look all the same
                self._changed.clear()
                await self.rescan()

    # Private

    async def _scan(self, former: Former | None) -> Scan:
        scan = await asyncio.to_thread(self._files.scan)
        bad = [entry.name for entry in scan.entries if entry.name and entry.certificate is None]
        if bad and former is not None:
            self._files.adopt(await former(bad))
            scan = await asyncio.to_thread(self._files.scan)
        return scan

    async def _look(self, former: Former | None) -> None:
        scan = await self._scan(former)
        await self._take(scan)
        if scan.unsettled:
            await asyncio.sleep(self._retry_seconds)
            scan = await asyncio.to_thread(self._files.scan)
            await self._take(scan)
        self._report(scan)

    async def _watch(self) -> None:
        """Set `_changed` whenever something in the directory changed; begin anew when it was replaced."""
        blind = False
        while True:
            watched = await asyncio.to_thread(self._watched)
            if watched is not None:
                # Whoever waits for this looks after the next step, in which the watch is set up:
                # what changed before is seen by him, what changes later by the watch.
                self._changed.set()
                try:
                    async with aclosing(self._changes(list(watched))) as changes:
                        async for _ in changes:
                            blind = False
                            self._changed.set()
                            if await asyncio.to_thread(self._watched) != watched:
                                break
                        continue
                except (OSError, RuntimeError) as error:  # RuntimeError: what watchfiles makes of the others
                    if await asyncio.to_thread(self._watched) != watched:
                        continue  # one of them went away before it was watched
                    if not blind:
                        _log.warning(
                            "%s cannot be watched, only looked at every %g s: %s",
                            self._directory,
                            self._rescan_seconds,
                            error,
                        )
                    blind = True
                except Exception:  # a bug: the looks without a watch go on
                    if not blind:
                        _log.exception("watching %s failed", self._directory)
                    blind = True
            await asyncio.sleep(self._rescan_seconds)

    def _changes(self, folders: list[str]) -> AsyncGenerator[set[FileChange], None]:
        return awatch(
            *folders,
            watch_filter=None,
            debounce=_BURST_MS,
            step=_STEP_MS,
            rust_timeout=int(self._rescan_seconds * 1000),
            yield_on_timeout=True,
            recursive=False,  # it would follow links, into whatever tree they point at
        )

    def _watched(self) -> dict[str, tuple[int, int]] | None:
        """The directory and the folders in it, and which ones these are now; None where it is missing."""
        try:
            found = {str(self._directory): _identity(self._directory)}
            folders = sorted(path for path in self._directory.iterdir() if path.is_dir())
        except OSError:
            return None
        for folder in folders:
            with suppress(OSError):  # it has just gone
                if os.access(folder, os.R_OK):
                    found[str(folder)] = _identity(folder)
        return found

    async def _take(self, scan: Scan) -> None:
        """Publish what the scan found, if it differs from what is served."""
        former = {certificate.name: certificate for certificate in self.table.certificates}
        table = CertificateTable(scan.certificates, self.table.version + 1)
        if former == {certificate.name: certificate for certificate in table.certificates}:
            return
        if self.publish is not None:
            await self.publish(table)  # if this fails, the next look must find it undone
        self.table = table
        for certificate in table.certificates:
            if former.pop(certificate.name, None) != certificate:
                self._count(LOADED)
                _log.info("certificate loaded: %s (%s)", certificate.name, certificate.origin)
        for name, certificate in former.items():
            self._count(REMOVED)
            _log.info("certificate removed: %s (%s)", name, certificate.origin)

    def _report(self, scan: Scan) -> None:
        problems: set[_Complaint] = set()
        others: set[_Complaint] = set()
        for entry in scan.entries:
            if entry.problem:
                kept = "; the one loaded before stays" if entry.certificate is not None else ""
                text = f"certificate {entry.origin} cannot be used: {entry.problem}{kept}"
                problems.add(_Complaint(logging.ERROR, text, entry.state))
            for warning in entry.warnings:
                text = f"certificate {entry.origin}: {warning}"
                others.add(_Complaint(logging.WARNING, text, entry.state))
        if not self.table.certificates:
            text = f"no usable certificate in {self._directory}: TLS handshakes are refused until one appears"
            others.add(_Complaint(logging.ERROR, text))
        for _ in problems - self._said:
            self._count(FAILED)
        self._say(problems | others)

    def _warn_of_ends(self) -> None:
        """Say once a day which certificates are near their end: nobody renews them, or not with success."""
        now = self._clock()
        for certificate in self.table.certificates:
            if not ends_soon(certificate.not_before, certificate.not_after, now):
                self._warned.pop(certificate.name, None)
                continue
            left = (certificate.not_after - now) / DAY
            # That one has expired is said by `_report`, once: from here it comes a day later.
            last = self._warned.setdefault(certificate.name, now if left <= 0 else now - DAY)
            if now - last >= DAY:
                self._warned[certificate.name] = now
                when = f"ends in {left:.1f} days" if left > 0 else f"ended {-left:.1f} days ago"
                _log.warning("certificate %s %s (%s)", certificate.name, when, certificate.origin)

    def _say(self, complaints: set[_Complaint]) -> None:
        """Log what was not so at the last look."""
        for complaint in sorted(complaints - self._said, key=lambda one: one.text):
            _log.log(complaint.level, "%s", complaint.text)
        self._said = complaints

    def _unreadable(self, error: OSError) -> str:
        return f"the certificate directory {self._directory} cannot be read: {error.strerror}"


# Private


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _count_nothing(_: str) -> None:
    """Stand in for `count`."""
