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
  then only logged: the lease ends by itself.
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
import orjson

from portero_py.core.auth import sign_token
from portero_py.errors import ClientError, PorteroUnreachable, RegistrationRefused

#: Seconds that a token is good for: one request, and clocks that differ a little.
TOKEN_TTL: Final = 60.0

#: Seconds that one request may take.
REQUEST_TIMEOUT: Final = 10.0

#: Seconds that leaving may take to give the lease back: a supervisor waits ten for the whole of an end.
GOODBYE_TIMEOUT: Final = 3.0

#: Seconds before the first retry, and the most between two; the least, however short the lease.
FIRST_RETRY: Final = 0.5
LAST_RETRY: Final = 15.0
LEAST_RETRY: Final = 0.25

#: Seconds that a request has at the least, however short the lease.
LEAST_TIMEOUT: Final = 1.0

#: The most of an answer that is read, bytes.
MAX_ANSWER: Final = 65536

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
        return body

    def name(self) -> dict[str, object]:
        """The JSON body that names its lease: by the instance id, or else by the address."""
        if self.instance_id:
            return {"service_name": self.service_name, "instance_id": self.instance_id}
        return {"service_name": self.service_name, "host": self.host, "port": self.port}


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

    `session` is the caller's to close; without one the registrar opens its own.
    """

    def __init__(
        self, api: Api, registration: Registration, session: aiohttp.ClientSession | None = None
    ) -> None:
        self._api = api
        self._registration = registration
        self._session = session
        self._owns_session = session is None
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
        except BaseException:
            await self._close_session()
            raise
        self._renewing = asyncio.create_task(self._renew(wait), name="portero renewal")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop to renew, and deregister if there may be a lease."""
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
            if not _may_be_granted(error):
                self._may_have_lease = may_have_lease
            raise
        self._lease_ends = began + _seconds(answer.get("expires_in"), ttl)
        self._registered.set()
        return answer

    async def deregister(self) -> dict[str, Any]:
        """Give the lease back; the API's answer. Raises a `ClientError`."""
        return await self._deregister(REQUEST_TIMEOUT)

    # Private

    async def _deregister(self, timeout: float) -> dict[str, Any]:
        self._registered.clear()
        answer = await self._ask("DELETE", self._registration.name(), timeout)
        self._may_have_lease = False
        return answer

    async def _leave(self) -> None:
        """Deregister if there may be a lease, and close what is this one's own."""
        try:
            if self._may_have_lease:
                await self._deregister(GOODBYE_TIMEOUT)
        except ClientError as error:
            if isinstance(error, RegistrationRefused) and error.answered == _NO_SUCH_LEASE:
                return  # it has ended: all that was wanted
            _log.warning("%s was not deregistered: %s", self._registration.service_name, error)
        finally:
            await self._close_session()

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
            if give_up and isinstance(error, RegistrationRefused) and not _worth_waiting(error.answered):
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
        return self._schedule.granted(_seconds(answer.get("renew_after"), lasts / 3), _draw(), lasts)

    def _failed(self, retry_after: float = 0.0) -> float:
        return self._schedule.failed(_draw(), retry_after, max(self._lease_ends - time.monotonic(), 0.0))

    async def _ask(self, method: str, body: dict[str, object], timeout: float) -> dict[str, Any]:
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
        try:
            async with self._session.request(
                method,
                f"{api.url.rstrip('/')}/register",
                data=orjson.dumps(body),
                headers={
                    "Authorization": f"Bearer {token}",
                    "Content-Type": "application/json",
                    "X-Register-Secret": api.secret,
                },
                # A redirect would carry the secret somewhere else.
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout),
            ) as response:
                answer = _object(await _read(response.content))
                status = response.status
                retry_after = _seconds(response.headers.get("Retry-After"), 0.0)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            what = str(error) or "no answer in time"
            raise PorteroUnreachable(f"{api.url}: {what}") from error
        if status != 200:
            detail = answer.get("detail") or answer.get("title") or "no reason given"
            raise RegistrationRefused(f"{api.url}: {status}: {detail}", status, retry_after)
        return answer

    async def _close_session(self) -> None:
        if self._owns_session and self._session is not None:
            await self._session.close()
            self._session = None


# Private


_NO_SUCH_LEASE: Final = 404


def _draw() -> float:
    return random.random()  # noqa: S311 - spreads load, keeps no secret


def _may_be_granted(error: ClientError) -> bool:
    """Whether the API may have granted the lease all the same: it was asked, and did not say no."""
    if isinstance(error, RegistrationRefused):
        return error.answered >= 500
    return not isinstance(error.__cause__, aiohttp.ClientConnectorError)


def _worth_waiting(status: int) -> bool:
    return status >= 500 or status in {408, 429}


async def _read(stream: aiohttp.StreamReader) -> bytes:
    data = b""
    async for chunk in stream.iter_any():
        data += chunk
        if len(data) > MAX_ANSWER:
            raise ValueError("the answer is too long to be the registration API's")
    return data


def _object(data: bytes) -> dict[str, Any]:
    try:
        answer = orjson.loads(data)
    except orjson.JSONDecodeError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _seconds(value: object, otherwise: float) -> float:
    """A positive time that an answer named, at most a day; `otherwise` when it is none."""
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return otherwise
    return min(seconds, 86400.0) if seconds > 0 else otherwise
