"""The records of all orders: written down, made, looked for at the zone's servers, and removed again.

A record is on our disk before it is made, and is forgotten only when it is known to be removed: whatever an
order's end was, and after a crash, `run` removes what is left, and tries again with growing pauses when that
fails. Where portero ends in the middle, the next start removes it. So `cleanup` is called at least once for
each `present`, and may be called twice.

The CA is told when all servers of the zone have the record, every value of it (a name and its wildcard have
two at one name). Records of one certificate are made one after the other.

dnspython is loaded in a thread, when there is first a record to make.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from portero_py.control.acme.daemon_threads import DaemonThreads
from portero_py.control.acme.dns01.hook import CLEANUP, PRESENT, HookRun
from portero_py.control.acme.files import AcmeFiles
from portero_py.control.acme.locks import Lock
from portero_py.core.acme.dns_records import TxtRecord, record_name, record_value
from portero_py.errors import AcmeError, Busy, DnsFailed

if TYPE_CHECKING:
    from portero_py.config.model import Acme as AcmeConfig
    from portero_py.control.acme.dns01.updates import Updates
    from portero_py.control.acme.dns01.zones import Zones

#: Seconds between two looks whether all servers have a record.
LOOK_SECONDS: Final = 2.0
#: Between two signs of life for the lock of an order.
BEAT_SECONDS: Final = 30.0
#: Until the removal of a record is tried again, from the first time to the longest.
FIRST_PAUSE: Final = 60.0
MAX_PAUSE: Final = 3600.0
#: After the start for orders that go on, which use the records once more; and where an order is at it.
START_SECONDS: Final = 5.0
BUSY_SECONDS: Final = 10.0
#: Questions to name servers, and programs, at a time.
DNS_THREADS: Final = 4

_Answer = TypeVar("_Answer")
Beat = Callable[[], Awaitable[object]]

_log = logging.getLogger(__name__)


class DnsRecords:
    """`on_disk` runs what blocks on the disk, `clock` is epoch seconds. `close` when all is made."""

    def __init__(
        self,
        config: AcmeConfig,
        files: AcmeFiles,
        on_disk: Callable[..., Awaitable[Any]],
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._files = files
        self._on_disk = on_disk
        self._clock = clock
        self._threads = DaemonThreads(DNS_THREADS, "acme-dns")
        self._left: dict[
            str, tuple[float, float]
        ] = {}  # certificate -> when to clean up, the pause before that
        self._sooner = asyncio.Event()
        self._tools: tuple[Zones, Updates | None] | None = None

    def close(self) -> None:
        """Take no more work."""
        self._threads.close()

    async def show(self, certificate: str, proofs: Iterable[tuple[str, str]], beat: Beat) -> None:
        """Make the records for (host, key authorization); when it returns, all servers have them.

        Raises DnsFailed, StateUnwritable; then some may be there, and `hide` removes them. `beat` is awaited
        now and then.
        """
        records = []
        for host, proof in proofs:
            chain = await self._beating(self._call(self._aliases, record_name(host)), beat)
            record = TxtRecord(chain[-1], record_value(proof))
            if not record.is_plain:
                raise DnsFailed(f"{chain[0]} is an alias of a name that nobody wants to change: {chain[-1]}")
            records.append(record)
        known = dict.fromkeys(await self._on_disk(self._files.dns_records, certificate))
        for record in records:
            # One by one: what was never tried is nothing to remove, which may take a program's whole time.
            known[record] = None
            await self._on_disk(self._files.save_dns_records, certificate, list(known))
            self.left_behind(certificate, BUSY_SECONDS)  # should nobody come to `hide` it
            await self._beating(self._make(PRESENT, record), beat)
        values: dict[str, list[str]] = {}
        for record in records:
            values.setdefault(record.name, []).append(record.value)
        for name, wanted in values.items():
            await self._arrived(name, wanted, beat)

    async def hide(self, certificate: str, beat: Beat) -> None:
        """Remove what was made for a certificate; what cannot be removed now is tried again later."""
        try:
            await self._beating(self._remove(certificate), beat)
        except AcmeError as error:
            self._postponed(certificate, error)

    # What nobody came to remove

    def left_behind(self, certificate: str, pause: float = 0.0) -> None:
        """There may be records of a certificate's that nobody removes: do it, in so many seconds."""
        self._left[certificate] = (self._clock() + pause, pause)
        self._sooner.set()

    async def run(self) -> None:
        """Remove what was left behind, until cancelled."""
        while True:
            self._sooner.clear()
            now = self._clock()
            due = [name for name, (when, pause) in self._left.items() if not now < when <= now + pause]
            for certificate in due:
                try:
                    await self._clean(certificate)
                except Busy:
                    self.left_behind(certificate, BUSY_SECONDS)  # an order is at it, and removes them itself
                except AcmeError as error:
                    self._postponed(certificate, error)
                except (
                    Exception
                ):  # a bug, which ends in the log and another attempt: nobody else removes records
                    _log.exception("%s: its DNS records stay for now", certificate)
                    self.left_behind(certificate, MAX_PAUSE)
            waits = [when - self._clock() for when, _ in self._left.values()]
            try:
                async with asyncio.timeout(min(max(min(waits, default=MAX_PAUSE), 0.1), MAX_PAUSE)):
                    await self._sooner.wait()
            except TimeoutError:
                pass  # it is time

    # Private

    async def _remove(self, certificate: str) -> None:
        left, complaint = [], ""
        for record in await self._on_disk(self._files.dns_records, certificate):
            try:
                await self._make(CLEANUP, record)
            except AcmeError as error:
                complaint = complaint or str(error)
                left.append(record)
        await self._on_disk(self._files.save_dns_records, certificate, left)
        if not left:
            self._left.pop(certificate, None)
            return
        listed = ", ".join(f"{record.name} TXT {record.value}" for record in left[:5])
        raise DnsFailed(f"{listed}: {complaint}")

    def _postponed(self, certificate: str, error: AcmeError) -> None:
        _, pause = self._left.get(certificate, (0.0, 0.0))
        pause = min(max(2 * pause, FIRST_PAUSE), MAX_PAUSE)
        self.left_behind(certificate, pause)
        _log.warning("%s: not removed yet, again in %.0f s: %s", certificate, pause, error)

    async def _clean(self, certificate: str) -> None:
        if not self._config.has_dns:
            records = await self._on_disk(self._files.dns_records, certificate)
            listed = ", ".join(f"{record.name} TXT {record.value}" for record in records[:5])
            _log.warning("%s: remove by hand what was made for it once: %s", certificate, listed or "nothing")
            del self._left[certificate]
            return
        lock = Lock(self._files.lock(certificate))
        try:
            await self._on_disk(lock.acquire, self._clock())
            await self._beating(self._remove(certificate), lambda: self._on_disk(lock.renew, self._clock()))
        finally:
            lock.release()

    async def _make(self, verb: str, record: TxtRecord) -> None:
        config = self._config
        if config.dns_hook:
            lock = self._files.record_lock(record.name)
            run = HookRun(config.dns_hook, verb, record, config.dns_hook_seconds, lock)
            try:
                await self._call(run.run)
            except asyncio.CancelledError:
                run.stop()
                raise
        else:
            await self._call(self._update, verb, record)

    async def _arrived(self, name: str, values: list[str], beat: Beat) -> None:
        """Wait until all servers of its zone have all values. Raises DnsFailed."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + self._config.dns_seconds
        servers = await self._beating(self._call(self._servers, name), beat)
        while missing := await self._beating(self._call(self._missing, name, values, servers), beat):
            if loop.time() > ends:
                seconds = self._config.dns_seconds
                raise DnsFailed(f"{name} is not at all servers of its zone within {seconds:g} s: {missing}")
            await asyncio.sleep(LOOK_SECONDS)
            await beat()

    async def _beating(self, work: Awaitable[_Answer], beat: Beat) -> _Answer:
        """Wait for it, with a sign of life now and then."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait([task], timeout=BEAT_SECONDS))[0]:
                await beat()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])

    # Private: in the threads

    async def _call(self, function: Callable[..., _Answer], *arguments: object) -> _Answer:
        return await self._threads.call(function, *arguments)

    def _loaded(self) -> tuple[Zones, Updates | None]:
        if self._tools is None:
            self._tools = tools(self._config)
        return self._tools

    def _aliases(self, name: str) -> list[str]:
        return self._loaded()[0].aliases(name)

    def _servers(self, name: str) -> Any:
        return self._loaded()[0].servers_of(name)

    def _missing(self, name: str, values: list[str], servers: Any) -> str:
        return self._loaded()[0].missing(name, values, servers)

    def _update(self, verb: str, record: TxtRecord) -> None:
        _, updates = self._loaded()
        if updates is None:
            raise DnsFailed("neither acme.dns_hook nor acme.dns_server is set")
        (updates.present if verb == PRESENT else updates.cleanup)(record)


def tools(config: AcmeConfig) -> tuple[Zones, Updates | None]:
    """What asks name servers, and what sends updates (None: nothing does).

    Raises DnsFailed without dnspython.
    """
    try:
        from portero_py.control.acme.dns01.updates import Updates
        from portero_py.control.acme.dns01.zones import Zones
    except ImportError as error:
        raise DnsFailed(f"dns-01 needs dnspython: install portero-py[dns] ({error})") from error
    zones = Zones(config.dns_resolver, config.dns_zone, config.dns_check)
    return zones, Updates(config, zones.zone_of) if config.dns_server is not None else None
