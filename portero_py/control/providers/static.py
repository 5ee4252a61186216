"""Backends that the configuration file names: granted for ever, as addresses or as names to be resolved.

The rules
- An address is one backend. A name is as many as it has addresses, IPv4 and IPv6. They go by
  `NAME:PORT/ADDRESS`, so that people see where they come from, and a new process knows what a name had.
- A name is looked up again every `RESOLVE_SECONDS` (what resolvers tell does not say how long it holds), one
  without an answer sooner at first. A look-up that fails changes nothing: the last answer stays, that of the
  process before too. It is said once in the log, and once when it is over.
- An address that several names of a service have is one backend, on the terms of the first.
- Resolvers hang, for longer than a look-up may take. So they have threads of their own; names that had no
  answer last are asked for after the others, and what is known is granted while the rest is waited for.
- What stays as it is keeps its state, and its connections. What goes takes no new exchange; those that are
  going on finish.
- `begin` waits for nobody, `configure` a moment for names that are new: what they take the place of serves
  until then. What is not known yet follows from `run`.
- What does not fit into the registry is left out, and that is said once: the others serve.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import ip_address
from typing import Final

from portero_py.config.model import FixedBackend, FixedService
from portero_py.control.leases import Leases
from portero_py.control.providers.provider import Provider
from portero_py.core.model import Backend, LeaseRequest
from portero_py.core.policies import ServicePolicy
from portero_py.core.registry import MAX_LEASES_PER_SERVICE
from portero_py.core.routes import NO_ROUTES, Routes
from portero_py.errors import RegistryFull

#: Seconds between two look-ups of a name, and before the second of one that has no answer yet.
RESOLVE_SECONDS: Final = 30.0
FIRST_PAUSE: Final = 1.0
#: Seconds that one look-up may take.
PATIENCE: Final = 10.0
#: Look-ups at a time.
MOST_AT_ONCE: Final = 16
#: Seconds after which answers are granted while other names are still looked up.
GRANT_SECONDS: Final = 1.0
#: Seconds for which another configuration waits for the addresses of new names.
NEW_NAMES_SECONDS: Final = 2.0

#: The addresses of a name. Raises OSError.
Resolve = Callable[[str], Awaitable[Sequence[str]]]
Sleep = Callable[[asyncio.Event, float], Awaitable[None]]

_threads: Final = ThreadPoolExecutor(MOST_AT_ONCE, "portero-names")
_log = logging.getLogger(__name__)


async def resolve(name: str) -> list[str]:
    """What the system's resolver knows: /etc/hosts, DNS, whatever nsswitch.conf names. Raises OSError."""
    loop = asyncio.get_running_loop()
    ask = partial(socket.getaddrinfo, name, None, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    found = await loop.run_in_executor(_threads, ask)
    return [str(place[0]) for *_, place in found]


async def _sleep(sooner: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await sooner.wait()
    except TimeoutError:
        pass


class StaticBackends(Provider):
    """The fixed backends of `services`. `sleep` ends after some seconds, or when its event is set."""

    source = "static"

    def __init__(
        self, services: Iterable[FixedService] = (), resolve: Resolve = resolve, sleep: Sleep = _sleep
    ) -> None:
        # process
        self._resolve = resolve
        self._sleep = sleep
        self._answers: dict[str, tuple[str, ...]] = {}  # name -> addresses
        self._failing: set[str] = set()
        self._is_news = False  # an answer has not been granted yet
        self._is_full = False
        self._sooner = asyncio.Event()
        # configuration
        self._services: tuple[FixedService, ...] = tuple(services)

    def begin(self, leases: Leases) -> list[LeaseRequest]:
        """What is known before the first look-up, with what `leases` has from the process before."""
        wanted = self._names()
        for service in leases.table.services.values():
            for entry in service.leases:
                for lease in entry.grants:
                    name, slash, host = lease.instance_id.removesuffix(f" ({self.source})").partition("/")
                    name = name.rpartition(":")[0]
                    if lease.source == self.source and slash and name in wanted and name not in self._answers:
                        wanted[name].append(host)
        self._answers.update({name: _addresses(hosts) for name, hosts in wanted.items() if hosts})
        return self._requests()

    async def configure(
        self,
        services: Sequence[FixedService],
        leases: Leases,
        routes: Routes = NO_ROUTES,
        default_service: str = "",
    ) -> None:
        """From now on these: their policies and backends are in force together when this returns."""
        new = [name for name in _names_of(services) if name not in self._answers]
        if new:
            try:
                async with asyncio.timeout(NEW_NAMES_SECONDS):
                    await self._look_up(new)
            except TimeoutError:
                pass  # `run` goes on asking
        self._services = tuple(services)
        names = self._names()
        self._answers = {name: found for name, found in self._answers.items() if name in names}
        self._failing &= names.keys()
        policies = policies_of(services)
        await self._fitting(
            leases.configure(policies, routes, default_service, self.source, self._requests())
        )
        self._sooner.set()

    async def grant(self, leases: Leases) -> None:
        """Grant what is known of them, and nothing else."""
        self._is_news = False
        await self._fitting(leases.replace(self.source, self._requests()))

    async def run(self, leases: Leases) -> None:
        """Grant them all, and look names up."""
        pause = FIRST_PAUSE
        while True:
            self._sooner.clear()
            async with asyncio.TaskGroup() as tasks:
                looking = tasks.create_task(self._look_up(self._names()))
                while not looking.done():
                    await asyncio.wait([looking], timeout=GRANT_SECONDS)
                    if self._is_news or looking.done():
                        await self.grant(leases)
            if self._names().keys() - self._answers.keys():
                await self._sleep(self._sooner, pause)
                pause = min(2 * pause, RESOLVE_SECONDS)
            else:
                pause = FIRST_PAUSE
                await self._sleep(self._sooner, RESOLVE_SECONDS)

    # Private

    def _names(self) -> dict[str, list[str]]:
        """Each name that has to be looked up."""
        return _names_of(self._services)

    async def _fitting(self, granting: Awaitable[None]) -> None:
        """Say once what did not fit."""
        try:
            await granting
        except RegistryFull as error:
            if not self._is_full:
                _log.error("some backends of the configuration are left out: %s", error)
            self._is_full = True
        else:
            self._is_full = False

    async def _look_up(self, names: Iterable[str]) -> None:
        turn = asyncio.Semaphore(MOST_AT_ONCE)

        async def one(name: str) -> None:
            async with turn:
                await self._look_up_one(name)

        async with asyncio.TaskGroup() as tasks:
            for name in sorted(names, key=self._failing.__contains__):
                tasks.create_task(one(name))

    async def _look_up_one(self, name: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                found = _addresses(await self._resolve(name))
            why = "" if found else "it has no address that could be one machine's"
        except TimeoutError:
            found, why = (), f"no answer within {PATIENCE:g} s"
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be asked for
            found, why = (), str(getattr(error, "strerror", None) or error)
        if found:
            if name in self._failing:
                self._failing.discard(name)
                _log.info("backend %s: found again", name)
            self._is_news = self._is_news or self._answers.get(name) != found
            self._answers[name] = found
        elif name not in self._failing and name in self._names():
            self._failing.add(name)
            known = self._answers.get(name)
            stays = f"; the last answer stays: {', '.join(known)}" if known else ""
            _log.warning("backend %s cannot be looked up: %s%s", name, why, stays)

    def _requests(self) -> list[LeaseRequest]:
        """What is known of all of them."""
        found = []
        for service in self._services:
            taken: set[tuple[str, int]] = set()
            for fixed in service.backends:
                name, port = fixed.address.host, fixed.address.port
                for host in (name,) if is_address(name) else self._answers.get(name, ()):
                    if (host, port) not in taken and len(taken) < MAX_LEASES_PER_SERVICE:
                        taken.add((host, port))
                        instance_id = str(fixed.address) if is_address(name) else f"{fixed.address}/{host}"
                        found.append(_request(service.name, fixed, host, instance_id))
        return found


def policies_of(services: Iterable[FixedService]) -> Mapping[str, ServicePolicy]:
    """How each of them is served."""
    return {service.name: service.policy for service in services}


def is_address(host: str) -> bool:
    """Whether the host of a backend is an address, and no name."""
    # The configuration has no name like that (`config.values.address`), and `ip_address` takes its time.
    return ":" in host or host.replace(".", "").isdigit()


# Private


def _names_of(services: Iterable[FixedService]) -> dict[str, list[str]]:
    return {
        backend.address.host: []
        for service in services
        for backend in service.backends
        if not is_address(backend.address.host)
    }


def _request(service: str, fixed: FixedBackend, host: str, instance_id: str) -> LeaseRequest:
    backend = Backend(host, fixed.address.port, fixed.use_tls, fixed.protocol, fixed.tls_fingerprint)
    return LeaseRequest(
        service, backend, None, instance_id, fixed.weight, fixed.health_path, fixed.max_in_flight
    )


def _addresses(hosts: Iterable[str]) -> tuple[str, ...]:
    """Each in its one spelling, once, in a steady order; what cannot be one machine's is left out."""
    found = set()
    for host in hosts:
        try:
            address = ip_address(host)
        except ValueError:
            continue
        address = getattr(address, "ipv4_mapped", None) or address
        if not (address.is_unspecified or address.is_multicast):
            found.add(address)
    return tuple(str(each) for each in sorted(found, key=lambda each: (each.version, int(each))))
