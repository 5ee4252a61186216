"""Active probes: asks backends how they are, and lets leases be ready or down by what comes of it.

Who is due and what follows is decided in `core.probing`; one probe on the wire is `probe_connection`.

The rules
- It follows the table: what a lease became is looked up in it at each change, and all of it at the start and
  when somebody says so (`look`), as whoever changes the policies of services has to. Nothing but a state is
  ever changed here, and no lease is ended.
- One task a probe, `MOST` of them at most, owned by `run`. They begin `SLICE` at a time, and whoever else has
  something to do on this loop has a turn between: with one process, that is the traffic.
- The first verdict is in force at once. Those that come while that table is being published, and in the
  `TICK` after it, are the next one, all of them together: 10,000 backends that start are no 10,000 tables.
- Whatever goes wrong with one probe, its place is given back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable
from typing import Final

from portero_py.config.model import Health
from portero_py.control.leases import Change, Leases
from portero_py.control.probe_connection import Asker
from portero_py.core.health import Evidence
from portero_py.core.model import Lease
from portero_py.core.policies import ServiceHealth
from portero_py.core.probing import MOST, Probe, Probing, Result, Verdict

#: Probes that begin before others on this loop have a turn: a millisecond at most.
SLICE: Final = 8

#: Seconds that it sleeps at least while probes are due all the time, or verdicts come all the time.
TICK: Final = 0.01

_log = logging.getLogger(__name__)


class Probes:
    """The probes of one control process: `run` it, and tell it of what changes.

    `clock` is the one of the leases. `count` is called with the result of each probe, `count_fault` with the
    name of what failed and goes on. `most` is how many descriptors there are for it.
    """

    def __init__(
        self,
        leases: Leases,
        health: Health,
        asker: Asker,
        *,
        clock: Callable[[], float],
        count: Callable[[str], None],
        count_fault: Callable[[str], None],
        most: int = MOST,
    ) -> None:
        self._leases = leases
        self._asker = asker
        self._clock = clock
        self._count = count
        self._count_fault = count_fault
        self._timeout = health.timeout
        self._own: dict[str, ServiceHealth] = {}  # what policies of services say
        self._probing = Probing(
            health.interval, health.rise, health.fall, chance=random.random, most=min(most, MOST)
        )
        self._sooner = asyncio.Event()  # somebody is due earlier than `run` believed
        self._sleeps_until = -math.inf
        self._asking: set[asyncio.Task[None]] = set()
        self._verdicts: list[Verdict] = []
        self._is_judging = False
        leases.subscribe(self._changed)

    def reconfigure(self, health: Health) -> None:
        """Go by these from now on."""
        self._timeout = health.timeout
        self._probing.configure(health.interval, health.rise, health.fall, self._clock())
        self._wake()

    def look(self) -> None:
        """Look at the whole table, and at the policies of its services."""
        services = self._leases.table.services.values()
        policies = {service.name: service.policy for service in services if service.policy is not None}
        self._own = {name: policy.health for name, policy in policies.items() if policy.health is not None}
        self._probing.overrule(self._own, self._clock())
        self._probing.look((lease for service in services for lease in service.leases), self._clock())
        self._wake()

    def suspect(self, evidence: Evidence) -> None:
        """A worker saw a backend fail too often."""
        lease = self._leases.at(evidence.service, evidence.host, evidence.port)
        self._probing.suspect(evidence, lease, self._clock())
        self._wake()

    def error_at(self, service: str, host: str, port: int) -> str:
        """The last thing that went wrong there, by a probe or a worker; "" when nothing did lately."""
        return self._probing.error_at((service, host, port))

    async def run(self) -> None:
        """Probe, for ever."""
        self.look()
        try:
            while True:
                self._begin()
                await self._pause()
        finally:
            for task in self._asking:
                task.cancel()
            await asyncio.gather(*self._asking, return_exceptions=True)

    # Private

    def _changed(self, change: Change) -> None:
        self._see(change.lease)
        if change.former is not None and change.former.backend != change.lease.backend:
            self._see(change.former)
        self._wake()

    def _see(self, lease: Lease) -> None:
        place = lease.service, lease.backend.host, lease.backend.port
        self._probing.see(place, self._leases.at(*place), self._clock())

    def _begin(self) -> None:
        """Begin what is due, a few."""
        for probe in self._probing.take(self._clock(), SLICE):
            task = asyncio.create_task(self._probe(probe), name="probe")
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _pause(self) -> None:
        """Until somebody may be due."""
        at, now = self._probing.next(), self._clock()
        if at is not None and at <= now:
            await asyncio.sleep(0)
            return
        self._sooner.clear()
        self._sleeps_until = math.inf if at is None else max(at, now + TICK)
        timer = None
        if at is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(self._sleeps_until - now, self._sooner.set)
        try:
            await self._sooner.wait()
        finally:
            self._sleeps_until = -math.inf
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        """Somebody may be due now who was not before."""
        at = self._probing.next()
        if at is not None and at < self._sleeps_until:
            self._sooner.set()

    async def _probe(self, probe: Probe) -> None:
        result, said = Result.NO_VERDICT, ""
        try:
            own = self._own.get(probe.lease.service)
            timeout = self._timeout if own is None or own.timeout is None else own.timeout
            result, said = await self._asker.ask(probe, timeout)
        except Exception:  # a bug: no verdict on the backend, and its next probe follows
            _log.exception("a probe failed")
            self._count_fault("probes")
        finally:
            verdict = self._probing.ended(probe, result, said, self._clock())
            if probe.was_slow or self._sleeps_until == math.inf:  # somebody may wait for its place
                self._wake()
        self._count(result.value)
        if said:
            _log.debug("probe of %s at %s: %s", probe.lease.service, probe.lease.backend.address, said)
        if verdict is not None:
            await self._judge(verdict)

    async def _judge(self, verdict: Verdict) -> None:
        self._verdicts.append(verdict)
        if self._is_judging:
            return
        self._is_judging = True
        try:
            while self._verdicts:
                verdicts, self._verdicts = self._verdicts, []
                await self._leases.judge(verdicts)
                await asyncio.sleep(TICK)
        except Exception:  # a bug: the next verdict takes up what is left
            _log.exception("what probes have found is not in force")
            self._count_fault("probes")
        finally:
            self._is_judging = False
