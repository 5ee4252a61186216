"""Leases that are kept for others: one keeper each, all through one API.

The rules
- A keeper does one thing at a time: the end of a lease never overtakes its renewal. What is wanted changes at
  any time, and counts when the request that is under way has its answer.
- Nothing that the API says ends a keeper: what is wanted is asked for again, sooner or later
  (`RenewalSchedule`), and the others are none the wiser. A refusal is logged once, until there is a lease.
- An API that cannot be reached is one line in the log, not one a lease. When it is back it may have forgotten
  what it had granted: whoever was granted a lease before it was missed renews at once.
- At most `REQUESTS` registrations are asked for at a time; the others wait for their turn, and only then does
  the time for an answer begin.
- What is wanted no longer is deregistered; an answer that failed is asked for again until the lease has ended
  by itself. It is not waited for what is in flight: Docker would not wait either.
- Closing leaves the leases as they are, so that a new start takes over without a gap, and finishes only what
  is being deregistered already.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterable
from typing import Any, Final, Self

import aiohttp

from portero_py.client.call import MAX_LISTING, call, seconds
from portero_py.client.registrar import (
    GOODBYE_TIMEOUT,
    REQUEST_TIMEOUT,
    Api,
    Registrar,
    Registration,
    RenewalSchedule,
    may_be_granted,
)
from portero_py.errors import ClientError, PorteroError, PorteroUnreachable, RegistrationRefused

#: Requests to the API at a time.
REQUESTS: Final = 16

#: What is said of one lease that does not come about, at the most.
MOST_COMPLAINTS: Final = 10

#: Seconds between two attempts after a fault of our own.
AFTER_FAULT: Final = 15.0

_NO_SUCH_LEASE: Final = 404

#: A lease's name: its service and its instance id in it.
Name = tuple[str, str]

_log = logging.getLogger(__name__)


class Keepers:
    """The leases of many backends, by owners' names that mean something to the caller: `async with`."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._session: aiohttp.ClientSession
        self._keepers: dict[Name, _Keeper] = {}
        self._tasks: dict[Name, asyncio.Task[None]] = {}
        self._of: dict[str, frozenset[Name]] = {}
        self.turn = asyncio.Semaphore(REQUESTS)
        self._missed_since = 0.0  # time.monotonic, 0.0 while the API answers

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=REQUESTS))
        return self

    async def __aexit__(self, *_: object) -> None:
        """Leave what is kept, and finish what is being given back."""
        leaving = {self._tasks[name] for name, keeper in self._keepers.items() if keeper.wanted is None}
        if leaving:
            await asyncio.wait(leaving, timeout=GOODBYE_TIMEOUT)
        left = set(self._tasks.values())
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
        await self._session.close()

    @property
    def names(self) -> set[Name]:
        """The leases that are wanted."""
        return {name for name, keeper in self._keepers.items() if keeper.wanted is not None}

    def want(self, owner: str, title: str, registrations: Iterable[Registration], why_not: str = "") -> None:
        """These are the registrations of `owner` from now on. `title` and `why_not` are for the log."""
        wanted = {(each.service_name, each.instance_id): each for each in registrations}
        for name in self._of.pop(owner, frozenset()) - wanted.keys():
            self._keepers[name].want(None, why_not or "it is wanted no longer")
        for name, registration in wanted.items():
            if name not in self._keepers:
                self._keepers[name] = _Keeper(self, title)
                self._tasks[name] = asyncio.create_task(self._keep(name), name=f"lease of {title}")
            self._keepers[name].want(registration)
        if wanted:
            self._of[owner] = frozenset(wanted)

    async def release_others(self, prefix: str) -> list[Name]:
        """Deregister the leases whose instance ids begin so and that nobody wants; returns their names.

        Raises a ClientError.
        """
        headers = {"X-Register-Secret": self._api.secret}
        listing = await call(
            *(self._session, "GET", self._api.url, "/backends", None, headers, REQUEST_TIMEOUT),
            longest=MAX_LISTING,
        )
        released = []
        for backend in _backends(listing):
            name = backend.service_name, backend.instance_id
            if backend.instance_id.startswith(prefix) and name not in self._keepers:
                try:
                    await self.registrar(backend).deregister()
                except RegistrationRefused as error:
                    if error.answered != _NO_SUCH_LEASE:
                        raise
                if name in self._keepers:
                    self._keepers[name].renew_unless_since(time.monotonic())  # it was wanted meanwhile
                else:
                    released.append(name)
        return released

    # What keepers ask for, and tell

    def registrar(self, registration: Registration) -> Registrar:
        """Who speaks to the API about one lease."""
        return Registrar(self._api, registration, self._session)

    def missed(self, began: float, error: PorteroUnreachable) -> None:
        """A request that began then was not answered."""
        if not self._missed_since:
            self._missed_since = began
            _log.warning("the registration API does not answer: %s; everything is tried again", error)

    def answered(self) -> None:
        """A lease was granted."""
        since, self._missed_since = self._missed_since, 0.0
        if since:
            _log.info("the registration API answers again")
            for keeper in self._keepers.values():
                keeper.renew_unless_since(since)

    # Private

    async def _keep(self, name: Name) -> None:
        try:
            await self._keepers[name].run()
        finally:
            # In the same step in which it found that nothing is wanted: nobody can have wanted it since.
            del self._keepers[name], self._tasks[name]


# Private


class _Keeper:
    """One lease, through the API of `keepers`. Times are time.monotonic's."""

    def __init__(self, keepers: Keepers, title: str) -> None:
        self._keepers = keepers
        self._title = title
        # What is wanted
        self.wanted: Registration | None = None
        self._why_not = ""
        self._changed = asyncio.Event()
        # What was asked for last
        self._asked_for: Registration | None = None
        self._schedule = RenewalSchedule(0)
        self._granted_at = 0.0
        self._may_last_until = 0.0
        self._complaints: set[str] = set()

    def want(self, registration: Registration | None, why_not: str = "") -> None:
        """What is wanted from now on."""
        if registration != self.wanted:
            self.wanted, self._why_not = registration, why_not
            self._changed.set()

    def renew_unless_since(self, moment: float) -> None:
        """Renew at once, unless that was done since."""
        if self._granted_at < moment:
            self._changed.set()

    async def run(self) -> None:
        """Keep what is wanted, until nothing is."""
        while True:
            self._changed.clear()
            try:
                wait = await self._step()
            except Exception:
                # Whatever it is: a backend that serves must not lose its lease because nobody renews it.
                wait = AFTER_FAULT
                _log.exception("%s: a lease could not be seen to; next attempt in %.0f s", self._title, wait)
            if wait is None:
                return
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                pass

    # Private

    async def _step(self) -> float | None:
        """One request, if there is need. The seconds until the next; None when there is nothing to keep."""
        wait = None
        if self.wanted is not None:
            # A request's time begins with its turn: thousands that begin at once are no API that is silent.
            async with self._keepers.turn:
                if self.wanted is not None:
                    return await self._register(self.wanted)
        if self._asked_for is not None and self._may_last_until > time.monotonic():
            wait = await self._deregister(self._asked_for)
        # It may be wanted again by now.
        return wait if self.wanted is None else 0.0

    async def _register(self, wanted: Registration) -> float:
        if wanted != self._asked_for:
            self._asked_for, self._schedule = wanted, RenewalSchedule(wanted.ttl_seconds)
            self._granted_at = 0.0
            self._complaints.clear()
        began = time.monotonic()
        try:
            answer = await self._keepers.registrar(wanted).register()
        except PorteroError as error:
            return self._failed(wanted, error, began)
        lasts = seconds(answer.get("expires_in"), wanted.ttl_seconds)
        if not self._granted_at or self._complaints:
            _log.info("%s: %s is registered", self._title, _place(wanted))
        self._granted_at = began
        self._may_last_until = time.monotonic() + lasts
        self._complaints.clear()
        self._keepers.answered()
        return self._schedule.granted(seconds(answer.get("renew_after"), lasts / 3), _draw(), lasts)

    def _failed(self, wanted: Registration, error: PorteroError, began: float) -> float:
        now = time.monotonic()
        left = max(self._may_last_until - now, 0.0) if self._granted_at else 0.0
        if isinstance(error, ClientError) and may_be_granted(error):
            self._may_last_until = now + wanted.ttl_seconds
        if isinstance(error, PorteroUnreachable):
            self._keepers.missed(began, error)
        else:
            self._complain(logging.ERROR, f"{_place(wanted)} is not registered: {error}; it is tried again")
        retry_after = error.retry_after if isinstance(error, RegistrationRefused) else 0.0
        return self._schedule.failed(_draw(), retry_after, left)

    async def _deregister(self, former: Registration) -> float | None:
        in_flight = 0
        try:
            answer = await self._keepers.registrar(former).deregister()
            in_flight = answer.get("in_flight") or 0
        except PorteroError as error:
            if not isinstance(error, RegistrationRefused) or error.answered != _NO_SUCH_LEASE:
                why = f"{_place(former)} is not deregistered ({self._why_not}): {error}; it is tried again"
                self._complain(logging.WARNING, why)
                return self._schedule.failed(
                    _draw(), left=max(self._may_last_until - time.monotonic(), 0.001)
                )
        finishing = f", {in_flight} in flight" if in_flight else ""
        _log.info("%s: %s is deregistered: %s%s", self._title, _place(former), self._why_not, finishing)
        self._granted_at = self._may_last_until = 0.0
        self._complaints.clear()
        return None

    def _complain(self, level: int, complaint: str) -> None:
        """Say it, unless it was said since there was a lease."""
        if complaint not in self._complaints and len(self._complaints) < MOST_COMPLAINTS:
            self._complaints.add(complaint)
            _log.log(level, "%s: %s", self._title, complaint)


def _backends(listing: dict[str, Any]) -> list[Registration]:
    """The backends that the API lists. Raises PorteroUnreachable when it is somebody else's answer."""
    try:
        return [
            Registration(
                service["service_name"], backend["host"], backend["port"], instance_id=backend["instance_id"]
            )
            for service in listing["services"]
            for backend in service["backends"]
        ]
    except (KeyError, TypeError):
        raise PorteroUnreachable("what /backends lists is not what the registration API does") from None


def _place(registration: Registration) -> str:
    host = f"[{registration.host}]" if ":" in registration.host else registration.host
    return f"{registration.service_name} at {host}:{registration.port}"


def _draw() -> float:
    return random.random()  # noqa: S311 - spreads load, keeps no secret
