"""A backend registers itself: `async with Registrar(...)` for as long as it serves.

    async with Registrar(api, Registration("app.example", "::1", 8000)):
        ...  # serve

The rules
- Entering registers at once. A refusal that waiting cannot cure (a wrong secret, a bad field) is raised
  there. An API that cannot be reached, is busy or fails is not the backend's fault: it starts, and the
  registrar goes on trying. The same refusal later only shows in the log: keys are rotated while backends run.
- Renewal comes when the answer said (`renew_after`), a little early by chance, so that a fleet that started
  together does not renew together. After a failure it comes sooner, and backs off, but never past half of
  what is left of the lease, whatever the API asks for; nor does a request take longer than a quarter of it.
- Every request signs a fresh, short-lived token.
- Leaving deregisters whenever there may be a lease: a failed renewal ends none, and an answer that got lost
  may have granted one; so may entering that was cancelled. That has `GOODBYE_TIMEOUT` and may fail, and is
  then only logged: the lease ends by itself. It is asked again where an answer got lost.
- Leaving takes until nothing is in flight at the backend, `drain_seconds` at most: serve on until then, and
  no response is cut. A portero that is there says so within `GOODBYE_TIMEOUT`, and takes its time only after
  that; one that has no place for another who waits is asked again. When the answer breaks off, or comes early
  with something in flight, the rest of the time is waited without it. Whoever cancels the leaving ends it at
  once: the lease is given back already, or ends by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from dataclasses import dataclass, field
from typing import Any, Final, Self

import aiohttp

from portero_py.client.call import call, seconds
from portero_py.core.auth import sign_token
from portero_py.errors import AnswerBrokeOff, ClientError, PorteroUnreachable, RegistrationRefused

#: Seconds that a token is good for: one request, and clocks that differ a little.
TOKEN_TTL: Final = 60.0

#: Seconds that one request may take.
REQUEST_TIMEOUT: Final = 10.0

#: Seconds that leaving may take to give the lease back: a supervisor waits ten for the whole of an end.
GOODBYE_TIMEOUT: Final = 3.0

#: Seconds that leaving waits for what is in flight, unless somebody says otherwise, and at the most.
DRAIN_SECONDS: Final = 30.0
LONGEST_DRAIN: Final = 300.0

#: Seconds before the first retry, and the most between two; the least, however short the lease.
FIRST_RETRY: Final = 0.5
LAST_RETRY: Final = 15.0
LEAST_RETRY: Final = 0.25

#: Seconds that a request has at the least, however short the lease.
LEAST_TIMEOUT: Final = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Api:
    """Where the registration API is, and what it takes to be let in. `url` is its root, without /register."""

    url: str = "http://127.0.0.1:18080"
    secret: str = field(default="", repr=False)
    hmac_key: str = field(default="", repr=False)
    kid: str = ""
    audience: str = ""
    issuer: str = ""


@dataclass(frozen=True, slots=True)
class Registration:
    """What a backend says of itself (docs/registration.md). `host` is an IP address without brackets."""

    service_name: str
    host: str
    port: int
    ttl_seconds: int = 60
    use_tls: bool = False
    instance_id: str = ""
    weight: int = 1
    tls_fingerprint: str = ""
    health_path: str = ""
    max_in_flight: int = 0
    protocol: str = "http1"

    def body(self) -> dict[str, object]:
        """The JSON body: the fields that every API knows, and of the others those that say something."""
        body: dict[str, object] = {
            "service_name": self.service_name,
            "host": self.host,
            "port": self.port,
            "ttl_seconds": self.ttl_seconds,
            "use_tls": self.use_tls,
        }
        if self.instance_id:
            body["instance_id"] = self.instance_id
        if self.weight != 1:
            body["weight"] = self.weight
        if self.tls_fingerprint:
            body["tls_fingerprint"] = self.tls_fingerprint
        if self.health_path:
            body["health_path"] = self.health_path
        if self.max_in_flight:
            body["max_in_flight"] = self.max_in_flight
        if self.protocol != "http1":
            body["protocol"] = self.protocol
        return body

    def name(self) -> dict[str, object]:
        """The JSON body that names its lease: by the instance id, or else by the address."""
        if self.instance_id:
            return {"service_name": self.service_name, "instance_id": self.instance_id}
        return {"service_name": self.service_name, "host": self.host, "port": self.port}


def may_be_granted(error: ClientError) -> bool:
    """Whether the API may have granted the lease all the same: it was asked, and did not say no."""
    if isinstance(error, RegistrationRefused):
        return error.answered >= 500
    return _was_reached(error)


def worth_waiting(status: int) -> bool:
    """Whether an API that refuses with that status may grant the same later."""
    return status >= 500 or status in {408, 429}


class RenewalSchedule:
    """When to call next, in seconds from now. Pure: `draw` is a random number from 0 to 1."""

    def __init__(self, ttl_seconds: int) -> None:
        self._ttl = ttl_seconds
        self._failures = 0

    def granted(self, renew_after: float, draw: float, lasts: float = math.inf) -> float:
        """After a lease: at four fifths of `renew_after` at the earliest, never past half of the lease.

        `lasts` is the lease's length as the API said it.
        """
        self._failures = 0
        return min(renew_after, self._ttl / 2, lasts / 2) * (0.8 + 0.2 * draw)

    def failed(self, draw: float, retry_after: float = 0.0, left: float = 0.0) -> float:
        """After a failure: twice as long each time, never sooner than the API asked for.

        `left` is what is left of the lease, 0.0 when there is none: half of it counts more than both.
        """
        longest = max(min(LAST_RETRY, self._ttl / 4), FIRST_RETRY)
        wait = min(FIRST_RETRY * float(1 << min(self._failures, 16)), longest)
        self._failures += 1
        wait = max(wait * (0.5 + 0.5 * draw), retry_after)
        return min(wait, max(left / 2, LEAST_RETRY)) if left > 0 else wait


class Registrar:
    """Keeps one backend registered between entering and leaving.

    `session` is the caller's to close; without one the registrar opens its own. Leaving waits up to
    `drain_seconds` (0 to 300) until nothing is in flight at the backend.
    """

    def __init__(
        self,
        api: Api,
        registration: Registration,
        session: aiohttp.ClientSession | None = None,
        *,
        drain_seconds: float = DRAIN_SECONDS,
    ) -> None:
        self._api = api
        self._registration = registration
        self._session = session
        self._owns_session = session is None
        self._drain_seconds = min(drain_seconds, LONGEST_DRAIN)
        self._schedule = RenewalSchedule(registration.ttl_seconds)
        self._renewing: asyncio.Task[None] | None = None
        self._registered = asyncio.Event()
        self._may_have_lease = False
        self._lease_ends = 0.0  # time.monotonic, as far as the API has said

    async def __aenter__(self) -> Self:
        """Register, and begin to renew. Raises `RegistrationRefused` when trying again would not help."""
        try:
            wait = await self._attempt(give_up=True)
        except asyncio.CancelledError:
            await self._leave()
            raise
        except BaseException:  # raised on: there will be no __aexit__
            await self._close_session()
            raise
        self._renewing = asyncio.create_task(self._renew(wait), name="portero renewal")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop to renew, deregister if there may be a lease, and wait for what is in flight."""
        renewing, self._renewing = self._renewing, None
        if renewing is not None:
            renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await renewing
        await self._leave()

    @property
    def is_registered(self) -> bool:
        """Whether the last attempt was granted."""
        return self._registered.is_set()

    async def wait_registered(self) -> None:
        """Return once the lease is granted."""
        await self._registered.wait()

    async def register(self) -> dict[str, Any]:
        """One request for the lease or its renewal; the API's answer. Raises a `ClientError`."""
        ttl, began = self._registration.ttl_seconds, time.monotonic()
        timeout = min(REQUEST_TIMEOUT, max(ttl / 4, LEAST_TIMEOUT))
        may_have_lease, self._may_have_lease = self._may_have_lease, True  # even if this is cancelled
        try:
            answer = await self._ask("POST", self._registration.body(), timeout)
        except ClientError as error:
            if not may_be_granted(error):
                self._may_have_lease = may_have_lease
            raise
        self._lease_ends = began + seconds(answer.get("expires_in"), ttl)
        self._registered.set()
        return answer

    async def deregister(self, wait_seconds: float = 0.0) -> dict[str, Any]:
        """Give the lease back; the API's answer.

        With `wait_seconds` (to 300) it comes when nothing is in flight at the backend, or when they are over.
        Raises a `ClientError`; `AnswerBrokeOff` when the lease is given back, but the rest did not come.
        """
        return await self._deregister(REQUEST_TIMEOUT, wait_seconds)

    # Private

    async def _deregister(self, timeout: float, wait_seconds: float = 0.0) -> dict[str, Any]:
        self._registered.clear()
        name = self._registration.name()
        if wait_seconds:
            name["wait_seconds"] = wait_seconds
        try:
            answer = await self._ask("DELETE", name, timeout, wait_seconds)
        except AnswerBrokeOff:
            self._may_have_lease = False
            raise
        self._may_have_lease = False
        return answer

    async def _leave(self) -> None:
        """Deregister if there may be a lease, and close what is this one's own."""
        name = self._registration.service_name
        try:
            if self._may_have_lease:
                await self._drain(time.monotonic() + self._drain_seconds)
        except ClientError as error:
            if isinstance(error, RegistrationRefused) and error.answered == _NO_SUCH_LEASE:
                return  # it has ended: all that was wanted
            _log.warning("%s was not deregistered: %s", name, error)
        finally:
            await self._close_session()

    async def _drain(self, ends_at: float) -> None:
        """Deregister, and return when nothing is in flight, as far as anybody says so, or the time is up."""
        try:
            answer = await self._deregister_empty(ends_at)
        except AnswerBrokeOff as error:
            why = f"what is in flight is unknown: {error}"
        else:
            if not answer.get("in_flight"):
                return
            why = f"{answer['in_flight']} in flight"
        # Said early when portero ends or its control process died: the exchanges may well go on.
        left = max(ends_at - time.monotonic(), 0.0)
        _log.warning(
            "%s is deregistered, it leaves in %.0f s: %s", self._registration.service_name, left, why
        )
        await asyncio.sleep(left)

    async def _deregister_empty(self, ends_at: float) -> dict[str, Any]:
        """Deregister, and wait for what is in flight as long as there is time; the API's answer."""
        left = self._drain_seconds
        while left > 0:
            try:
                return await self._goodbye(left)
            except RegistrationRefused as error:
                if error.reason_given != _TOO_MANY_WAITS:
                    raise
                # It serves on meanwhile.
                await asyncio.sleep(min(max(error.retry_after, LEAST_RETRY) * (0.5 + _draw()), left))
            left = ends_at - time.monotonic()
        return await self._goodbye()

    async def _goodbye(self, wait_seconds: float = 0.0) -> dict[str, Any]:
        """Deregister; where the answer gets lost, ask again as long as there is time."""
        ends_at = time.monotonic() + GOODBYE_TIMEOUT
        timeout, was_lost = GOODBYE_TIMEOUT, False
        while True:
            try:
                return await self._deregister(timeout, wait_seconds)
            except PorteroUnreachable as error:
                timeout = ends_at - time.monotonic() - LEAST_RETRY
                if timeout <= 0 or not _was_reached(error):
                    raise
            except RegistrationRefused as error:
                if was_lost and error.answered == _NO_SUCH_LEASE:
                    raise AnswerBrokeOff(str(error)) from error  # the first one did it
                raise
            was_lost = True
            await asyncio.sleep(LEAST_RETRY)

    async def _renew(self, wait: float) -> None:
        while True:
            await asyncio.sleep(wait)
            try:
                wait = await self._attempt(give_up=False)
            except Exception:
                # Whatever it is: a backend that serves must not lose its lease because nobody renews it.
                self._registered.clear()
                wait = self._failed()
                _log.exception(
                    "%s: a renewal broke off; next attempt in %.1f s", self._registration.service_name, wait
                )

    async def _attempt(self, *, give_up: bool) -> float:
        """Register once; returns when to do so again, in seconds."""
        name = self._registration.service_name
        was_registered = self._registered.is_set()
        try:
            answer = await self.register()
        except ClientError as error:
            self._registered.clear()
            refused = isinstance(error, RegistrationRefused)
            if give_up and isinstance(error, RegistrationRefused) and not worth_waiting(error.answered):
                raise
            wait = self._failed(error.retry_after if isinstance(error, RegistrationRefused) else 0.0)
            _log.log(
                logging.ERROR if refused else logging.WARNING,
                "%s is not registered: %s; next attempt in %.1f s",
                name,
                error,
                wait,
            )
            return wait
        if not was_registered:
            _log.info("%s is registered as %s", name, answer.get("instance_id", "?"))
        lasts = self._lease_ends - time.monotonic()
        return self._schedule.granted(seconds(answer.get("renew_after"), lasts / 3), _draw(), lasts)

    def _failed(self, retry_after: float = 0.0) -> float:
        return self._schedule.failed(_draw(), retry_after, max(self._lease_ends - time.monotonic(), 0.0))

    async def _ask(
        self, method: str, body: dict[str, object], timeout: float, wait_seconds: float = 0.0
    ) -> dict[str, Any]:
        """One request: its head has to come within `timeout`, the rest too, or `wait_seconds` later."""
        api = self._api
        token = sign_token(
            self._registration.service_name,
            api.hmac_key,
            api.kid,
            TOKEN_TTL,
            time.time(),
            audience=api.audience,
            issuer=api.issuer,
        )
        if self._session is None:
            self._session = aiohttp.ClientSession()
        headers = {"Authorization": f"Bearer {token}", "X-Register-Secret": api.secret}
        return await call(self._session, method, api.url, "/register", body, headers, timeout, wait_seconds)

    async def _close_session(self) -> None:
        if self._owns_session and self._session is not None:
            await self._session.close()
            self._session = None


# Private


_NO_SUCH_LEASE: Final = 404
_TOO_MANY_WAITS: Final = "too_many_waits"


def _draw() -> float:
    return random.random()  # noqa: S311 - spreads load, keeps no secret


def _was_reached(error: ClientError) -> bool:
    """Whether there was a connection."""
    return not isinstance(error.__cause__, aiohttp.ClientConnectorError)
