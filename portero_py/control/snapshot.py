"""The leases on disk: what lets them survive a restart of portero.

The rules
- One file in the state directory, `leases.json`, only for its owner. A new one is written beside it, synced
  and renamed: what is read is always whole.
- It is written when the table has changed, at most every `INTERVAL` seconds, in a thread; and at the end.
- A steady clock says nothing after a restart: times in the file are wall-clock times. What has expired
  meanwhile is dropped, and if the clock was set back no lease is longer than it was when it was granted.
- A file that cannot be used is no reason not to start: it is named in the log, and backends register again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import orjson

from portero_py.core.feed_messages import lease_from
from portero_py.core.model import Lease, Service
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import BadSnapshot

#: Seconds between two writes, at least.
INTERVAL: Final = 5.0

FILE_NAME: Final = "leases.json"

_FORMAT: Final = 1

_log = logging.getLogger(__name__)


class Snapshot:
    """The file in `directory`. `clock` is the registry's, `wall_clock` gives seconds since the epoch."""

    def __init__(
        self,
        directory: str | Path,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        interval: float = INTERVAL,
    ) -> None:
        self._path = Path(directory) / FILE_NAME
        self._clock = clock
        self._wall_clock = wall_clock
        self._interval = interval
        self._saved = -1  # the version that is on disk

    def load(self) -> list[Service]:
        """The services that were saved, with what is left of their leases. Raises BadSnapshot."""
        try:
            content = orjson.loads(self._path.read_bytes())
            if content["format"] != _FORMAT:
                raise BadSnapshot(f"{self._path} was written by another version of portero-py")
            leases = [lease_from(each) for each in content["leases"]]
            return self._services(leases)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise BadSnapshot(f"{self._path} cannot be read: {os.strerror(error.errno or 0)}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise BadSnapshot(f"{self._path} is no snapshot of leases") from error

    def save(self, table: RoutingTable) -> None:
        """Write the leases of `table`, unless they are on disk already. Raises BadSnapshot."""
        if table.version == self._saved:
            return
        shift = self._wall_clock() - self._clock()
        leases = [
            replace(lease, expires_at=lease.expires_at + shift)
            for service in table.services.values()
            for lease in service.leases
        ]
        try:
            self._write(orjson.dumps({"format": _FORMAT, "leases": leases}))
        except OSError as error:
            raise BadSnapshot(f"{self._path} cannot be written: {os.strerror(error.errno or 0)}") from error
        self._saved = table.version

    async def run(self, newest: Callable[[], RoutingTable]) -> None:
        """Save the newest table again and again, until cancelled."""
        complained = False
        while True:
            await asyncio.sleep(self._interval)
            try:
                await asyncio.to_thread(self.save, newest())
                complained = False
            except BadSnapshot as error:
                if not complained:
                    _log.error("leases will not survive a restart: %s", error)
                complained = True

    # Private

    def _services(self, leases: list[Lease]) -> list[Service]:
        shift, now = self._wall_clock() - self._clock(), self._clock()
        services: dict[str, list[Lease]] = {}
        for lease in leases:
            expires_at = min(lease.expires_at - shift, now + lease.ttl_seconds)
            if now < expires_at:
                services.setdefault(lease.service, []).append(replace(lease, expires_at=expires_at))
        return [Service(name, tuple(found)) for name, found in services.items()]

    def _write(self, content: bytes) -> None:
        part = self._path.with_name(f".{FILE_NAME}.part")
        try:
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:  # noqa: PTH123
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
