"""What is done to the proxy, in an order that a seed decides.

Faults of processes come one after the other from a deck that holds each of them once and is shuffled anew
when it is empty: a run of three minutes has each several times. Two rules keep what portero promises
provable: one process that has the leases always lives (so never all are killed at once), and who was killed
must have lived for `STEADY` seconds, otherwise the supervisor rightly takes its time.

Beside them leases, certificates and backends come and go all the time, each from a source of its own.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import random
import shutil
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID, NameOID

from tests.e2e.certificates import Authority, Pair
from tests.e2e.proxy_process import ProxyProcess
from tests.slow.chaos_backends import Agents, Backend, Mood, RegistrationClient
from tests.slow.chaos_journal import Breakage, Journal, now
from tests.slow.chaos_judge import FAILS, HANGS, UPSTREAM_HEAD
from tests.slow.chaos_ledger import DEFAULT, Certificates
from tests.slow.chaos_processes import Processes

#: Seconds after which the death of a process does not count as one of a series (processes.STEADY_SECONDS).
STEADY: Final = 10.5
#: Seconds in which who was killed must have been replaced.
REPLACED: Final = 30.0
#: Seconds in which the supervisor must have seen that a process hangs (HANG_SECONDS).
HANG_SEEN: Final = 30.0
#: Seconds by which things are still in disorder when a trouble is over.
AFTERMATH: Final = 1.0

#: Seconds in which another generation must have taken over, the old one gone: the drain, and the start.
UPGRADED: Final = 60.0

#: `drain` is longer than any answer takes. With three good probes in a row a second a backend is back soon.
GOOD_TOML: Final = f"""\
[timeouts]
drain = 8
shutdown = 5
upstream_head = {UPSTREAM_HEAD}
[health]
interval = 1
timeout = 1
statuses = [503]
"""

_BAD_TOML: Final = {
    "no TOML": "[timeouts\n",
    "unknown key": f"{GOOD_TOML}[limits]\nnonsense = 1\n",
    "wrong type": f'{GOOD_TOML}[limits]\nrequest_line = "long"\n',
}
_ODD_TOML: Final = {"malformed URL": f'{GOOD_TOML}[acme]\ndirectory = "https://[x"\n'}


class ProxyEnded(Exception):
    """The supervisor is gone, which nobody has killed."""


class ProcessFaults:
    """Kills, stops and reloads; too many connections. `without` names those that are left out."""

    def __init__(
        self,
        journal: Journal,
        proxy: ProxyProcess,
        processes: Processes,
        api: RegistrationClient,
        source: random.Random,
        *,
        nofile: int,
        without: frozenset[str],
    ) -> None:
        self._journal = journal
        self._proxy = proxy
        self._processes = processes
        self._api = api
        self._source = source
        self._nofile = nofile
        faults: dict[str, Callable[[], Awaitable[None]]] = {
            "kill-worker": lambda: self._kill("worker"),
            "kill-both-workers": lambda: self._kill("worker", "worker"),
            "kill-control": lambda: self._kill("control"),
            "kill-control-and-worker": lambda: self._kill("control", "worker"),
            "stop-worker": lambda: self._stop("worker", 2.5),
            "stop-control": lambda: self._stop("control", 2.5),
            "stop-supervisor": lambda: self._stop("supervisor", 5.0),
            "hang-worker": lambda: self._hang("worker"),
            "hang-control": lambda: self._hang("control"),
            "hangup": self._hang_up,
            "configuration": self._configure,
            "odd-configuration": lambda: self._configure(_ODD_TOML),
            "descriptors": self._descriptors,
            "strangers": self._strangers,
            "upgrade": self.upgrade,
        }
        self._faults = {name: fault for name, fault in faults.items() if name not in without}

    async def run(self, until: float) -> None:
        """Do one after the other. Raises ProxyEnded when there is nobody left to do anything to."""
        deck: list[str] = []
        while self._faults and now() < until:
            if not deck:
                deck = list(self._faults)
                self._source.shuffle(deck)
            name, begun = deck.pop(), now()
            try:
                await self._faults[name]()
            except OSError as error:
                self._journal.broke(
                    Breakage(
                        "process",
                        "faults",
                        begun,
                        now(),
                        f"{name}: who it was for has ended by itself: {error!r}",
                    )
                )
            if not self._proxy.is_running:
                raise ProxyEnded(f"the proxy has ended after {name}")
            await asyncio.sleep(self._source.uniform(0.1, 1.5))

    # Private: processes

    def _pick(self, *kinds: str) -> dict[str, int]:
        """A living process of each kind, by name, none twice."""
        children, found = self._processes.all(), {}
        for kind in kinds:
            names = [name for name in sorted(children) if name.startswith(kind) and name not in found]
            if names:
                name = self._source.choice(names)
                found[name] = children[name]
        return found

    async def _kill(self, *kinds: str) -> None:
        """Freeze, take the inventory, kill; wait for the successors."""
        victims = self._pick(*kinds)
        for name, pid in victims.items():
            await self._until(lambda pid=pid: self._processes.age(pid) > STEADY, f"{name} is old enough")  # type: ignore[misc]
        self._journal.fault(f"kill {' and '.join(kinds)}", ", ".join(victims))
        with ExitStack() as troubles:
            for name in victims:
                troubles.enter_context(self._journal.trouble(name, AFTERMATH))
            for pid in victims.values():
                self._processes.freeze(pid)
            inventory = {pid: self._processes.ports(pid) for pid in victims.values()}
            for name, pid in victims.items():
                self._journal.died(name, pid, inventory[pid])
                os.kill(pid, signal.SIGKILL)
            for name, pid in victims.items():
                await self._replaced(name, pid, REPLACED)

    async def _stop(self, kind: str, longest: float) -> None:
        """Stop for a short while."""
        [(name, pid)] = self._pick(kind).items()
        seconds = self._source.uniform(0.1, longest)
        self._journal.fault(f"stop {kind}", f"{name} for {seconds:.1f} s")
        with self._journal.trouble(name, AFTERMATH):
            self._processes.freeze(pid)
            try:
                await asyncio.sleep(seconds)
            finally:
                self._processes.thaw(pid)
        self._journal.note(f"{name} goes on")

    async def _hang(self, kind: str) -> None:
        """Stop until the supervisor takes it for hanging, kills and replaces it."""
        [(name, pid)] = self._pick(kind).items()
        await self._until(lambda: self._processes.age(pid) > STEADY, f"{name} is old enough")
        self._journal.fault(f"hang {kind}", name)
        with self._journal.trouble(name, AFTERMATH):
            self._processes.freeze(pid)
            ports = self._processes.ports(pid)
            self._journal.died(name, pid, ports)
            await self._replaced(name, pid, HANG_SEEN)
        self._processes.thaw(pid)

    async def _replaced(self, name: str, pid: int, seconds: float) -> None:
        def is_replaced() -> bool:
            successor = self._processes.children().get(name, pid)
            return successor != pid

        if await self._until(is_replaced, f"{name} (pid {pid}) is replaced", seconds):
            await self._until_async(self._is_ready, "/readyz says 200", seconds)
            self._journal.note(f"{name} is replaced")

    async def _is_ready(self) -> bool:
        return (await self._api.ask("GET", "/readyz")).status == 200

    async def upgrade(self) -> None:
        """The program takes its own place; nothing that this costs is explained by it."""
        former = self._processes.children()
        for name, pid in former.items():
            await self._until(lambda pid=pid: self._processes.age(pid) > STEADY, f"{name} is old enough")  # type: ignore[misc]
        former, supervisor = self._processes.children(), self._processes.supervisor
        self._journal.fault("upgrade", "SIGUSR2")
        with self._journal.trouble("upgrade"):
            self._proxy.signal(signal.SIGUSR2)
            gone = frozenset([supervisor, *former.values()])

            def is_taken_over() -> bool:
                living = self._processes.pids()
                successors = self._processes.children()
                return not gone & living and successors.keys() == former.keys()

            if await self._until(is_taken_over, "another generation has taken over", UPGRADED):
                await self._until_async(self._is_ready, "/readyz says 200", UPGRADED)
                self._journal.note("another generation has taken over")

    # Private: signals, configuration, descriptors

    async def _hang_up(self) -> None:
        count = self._source.choice((1, 5, 30))
        self._journal.fault("SIGHUP", f"{count} times")
        for _ in range(count):
            self._proxy.signal(signal.SIGHUP)
            await asyncio.sleep(self._source.choice((0.0, 0.01)))

    async def _configure(self, wrong: dict[str, str] = _BAD_TOML) -> None:
        """A file that cannot be used, then a good one that differs from the last."""
        path = self._proxy.folder / "portero.toml"
        what = self._source.choice(list(wrong))
        self._journal.fault("configuration", what)
        path.write_text(wrong[what])
        self._proxy.signal(signal.SIGHUP)
        await asyncio.sleep(self._source.uniform(0.0, 0.5))
        path.write_text(f"{GOOD_TOML}[limits]\nrequest_line = {self._source.randrange(8000, 9000)}\n")
        self._proxy.signal(signal.SIGHUP)

    async def _descriptors(self) -> None:
        """More idle connections than the workers have descriptors."""
        count, seconds = 2 * self._nofile + 50, self._source.uniform(0.5, 3.0)
        self._journal.fault("descriptors", f"{count} idle clients for {seconds:.1f} s")
        with self._journal.trouble("descriptors", AFTERMATH):
            await _idle_connections(self._proxy.port, count, seconds)
        self._journal.note("the idle clients are gone")

    async def _strangers(self) -> None:
        """More silent connections to the registration API than control has descriptors."""
        count, seconds = self._nofile + 50, self._source.uniform(0.5, 3.0)
        self._journal.fault("strangers", f"{count} at the registration API for {seconds:.1f} s")
        with self._journal.trouble("registration port", AFTERMATH):
            await _idle_connections(self._proxy.register_port, count, seconds)
        self._journal.note("the strangers are gone")

    # Private: waiting

    async def _until(self, check: Callable[[], bool], what: str, seconds: float = 30.0) -> bool:
        async def said() -> bool:
            return check()

        return await self._until_async(said, what, seconds)

    async def _until_async(self, check: Callable[[], Awaitable[bool]], what: str, seconds: float) -> bool:
        begun = now()
        while now() < begun + seconds:
            try:
                if await check():
                    return True
            except OSError:
                return True  # whose age we asked for is gone
            await asyncio.sleep(0.02)
        self._journal.broke(
            Breakage("process", "supervisor", begun, now(), f"after {seconds} s still not: {what}")
        )
        return False


async def _idle_connections(port: int, count: int, seconds: float) -> None:
    """Connect, say nothing, go."""
    loop = asyncio.get_running_loop()
    sockets: list[socket.socket] = []
    try:
        for number in range(count):
            sock = socket.socket()
            sock.setblocking(False)
            sockets.append(sock)
            try:
                await loop.sock_connect(sock, ("127.0.0.1", port))
            except OSError:
                continue  # it was sent away at once: there are others
            if number % 20 == 0:
                await asyncio.sleep(0.002)
        await asyncio.sleep(seconds)
    finally:
        for sock in sockets:
            sock.close()


# Leases


class LeaseChurn:
    """Leases of services that are granted, renewed, released, or left to expire.

    Their names come back: a service is known for minutes after its last lease, so with ever new ones the
    proxy would hold more in the last minute than in the second for a reason that is none.
    """

    MOST: Final = 40
    NAMES: Final = 2 * MOST

    def __init__(
        self, journal: Journal, agents: Agents, backends: list[Backend], source: random.Random
    ) -> None:
        self.living: dict[str, Backend] = {}  # service -> who serves it
        self._journal = journal
        self._agents = agents
        self._backends = backends
        self._source = source
        self._number = 0

    def services(self) -> list[str]:
        """What may be asked for just now."""
        return list(self.living)

    async def run(self, until: float) -> None:
        """Grant, renew, release, forget."""
        while now() < until:
            draw = self._source.random()
            if not self.living or (draw < 0.4 and len(self.living) < self.MOST):
                backend = self._source.choice(self._backends)
                name = f"extra-{self._number % self.NAMES}.chaos.test"
                while name in self.living:
                    self._number += 1
                    name = f"extra-{self._number % self.NAMES}.chaos.test"
                self._number += 1
                if await self._agents.register(name, backend.instance, backend.port, self._ttl()):
                    self.living[name] = backend
            else:
                name, backend = self._source.choice(list(self.living.items()))
                if draw < 0.8:
                    await self._agents.register(name, backend.instance, backend.port, self._ttl())
                elif await self._agents.release(name, backend.instance):
                    del self.living[name]
            await asyncio.sleep(self._source.uniform(0.0, 0.15))

    async def burst(self, until: float) -> None:
        """Now and then many at once; with all agents fewer than the API has descriptors for (an eighth)."""
        while now() < until:
            await asyncio.sleep(self._source.uniform(3.0, 12.0))
            self._journal.fault("burst of leases", "12 granted and released at once")
            names = [f"burst-{i}.chaos.test" for i in range(12)]
            backend = self._source.choice(self._backends)
            await asyncio.gather(
                *(self._agents.register(name, backend.instance, backend.port, 30) for name in names)
            )
            await asyncio.gather(*(self._agents.release(name, backend.instance) for name in names))

    async def end(self) -> None:
        """Release what is left."""
        for name, backend in list(self.living.items()):
            if await self._agents.release(name, backend.instance):
                del self.living[name]

    # Private

    def _ttl(self) -> int:
        return self._source.choice((3, 10, 60))


class BackendChurn:
    """Backends that die, with their lease or without giving it back, that hang or fail, and come back."""

    def __init__(
        self,
        journal: Journal,
        agents: Agents,
        members: list[tuple[str, Backend]],
        source: random.Random,
        *,
        without: frozenset[str],
    ) -> None:
        self._journal = journal
        self._agents = agents
        self._members = members
        self._source = source
        faults: dict[str, Callable[[str, Backend], Awaitable[None]]] = {
            "backend-dies": self._die,
            "backend-hangs": self._hang,
            "backend-fails": self._fail,
        }
        self._faults = [fault for name, fault in faults.items() if name not in without]

    async def run(self, until: float) -> None:
        """One at a time."""
        while self._faults and now() < until:
            await asyncio.sleep(self._source.uniform(0.2, 2.0))
            service, backend = self._source.choice(self._members)
            await self._source.choice(self._faults)(service, backend)
            self._journal.note(f"{backend.instance} is back")

    # Private

    async def _die(self, service: str, backend: Backend) -> None:
        releases = self._source.random() < 0.5
        self._journal.fault("backend dies", f"{backend.instance}, {'released' if releases else 'as it is'}")
        if releases:
            await self._agents.release(service, backend.instance)
        await backend.die()
        await asyncio.sleep(self._source.uniform(0.1, 3.0))
        await backend.live()

    async def _hang(self, service: str, backend: Backend) -> None:
        self._journal.fault("backend hangs", backend.instance)
        await self._be(Mood.HANGS, f"{HANGS} of {service}", backend, self._source.uniform(3.0, 10.0))

    async def _fail(self, service: str, backend: Backend) -> None:
        self._journal.fault("backend fails", backend.instance)
        await self._be(Mood.FAILS, f"{FAILS} of {service}", backend, self._source.uniform(1.0, 8.0))

    async def _be(self, mood: Mood, trouble: str, backend: Backend, seconds: float) -> None:
        with self._journal.trouble(trouble, AFTERMATH):
            backend.mood = mood
            try:
                await asyncio.sleep(seconds)
            finally:
                backend.recover()


# Certificates


class CertificateChurn:
    """Pairs that are added, replaced, spoilt and taken away. `DEFAULT_NAME` is only replaced and spoilt."""

    DEFAULT_NAME: Final = "*.chaos.test"

    def __init__(
        self,
        journal: Journal,
        promises: Certificates,
        authority: Authority,
        folder: Path,
        source: random.Random,
        *,
        without: frozenset[str],
    ) -> None:
        self._journal = journal
        self._promises = promises
        self._authority = authority
        self._folder = folder
        self._source = source
        self.names = [f"k{number}.cert.test" for number in range(4)]
        self._spoilings = {
            "broken PEM": self._broken,
            "cut off": self._cut_off,
            "key of another": self._mismatched,
            "odd curve": self._odd_curve,
            "odd name": self._odd_name,
        }
        self._spoilings = {name: how for name, how in self._spoilings.items() if name not in without}

    def begin(self) -> None:
        """Good pairs for all names."""
        for name in (self.DEFAULT_NAME, *self.names):
            self._install(name)

    async def run(self, until: float) -> None:
        """One change after the other."""
        while now() < until:
            await asyncio.sleep(self._source.uniform(0.1, 1.0))
            name = self._source.choice((self.DEFAULT_NAME, *self.names))
            draw = self._source.random()
            if draw < 0.45:
                self._journal.fault("certificate replaced", name)
                self._install(name)
            elif draw < 0.85 or name == self.DEFAULT_NAME:
                if self._spoilings and (self._place(name) / "fullchain.pem").exists():
                    what = self._source.choice(list(self._spoilings))
                    self._journal.fault(f"certificate spoilt: {what}", name)
                    self._promises.spoilt(name)
                    self._spoilings[what](name)
            else:
                self._journal.fault("certificate taken away", name)
                # The folder: without its files it would be a pair that is just being replaced.
                shutil.rmtree(self._place(name), ignore_errors=True)
                self._promises.promise(name, DEFAULT)

    def end(self) -> None:
        """Good pairs for all names once more."""
        self.begin()

    # Private

    def _place(self, name: str) -> Path:
        return self._folder / name.replace("*", "_wildcard")

    def _install(self, name: str) -> None:
        pair = self._authority.issue(name)
        self._promises.promise(name, pair.serial)
        pair.write(self._place(name))

    def _write(self, name: str, file: str, content: bytes) -> None:
        (self._place(name) / file).write_bytes(content)

    def _broken(self, name: str) -> None:
        self._write(name, "fullchain.pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")

    def _cut_off(self, name: str) -> None:
        chain = (self._place(name) / "fullchain.pem").read_bytes()
        self._write(name, "fullchain.pem", chain[: self._source.randrange(len(chain) // 3 + 1)])

    def _mismatched(self, name: str) -> None:
        self._write(name, "privkey.pem", self._authority.issue(name).key)

    def _odd_curve(self, name: str) -> None:
        self._issue_odd(name, key=ec.generate_private_key(ec.SECP256K1()))

    def _odd_name(self, name: str) -> None:
        # An x400Address, which no library reads.
        odd = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, bytes.fromhex("3002a300"))
        self._issue_odd(name, names=odd)

    def _issue_odd(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey | None = None,
        names: x509.UnrecognizedExtension | None = None,
    ) -> None:
        pair = odd_pair(name, key or ec.generate_private_key(ec.SECP256R1()), names)
        pair.write(self._place(name))


def odd_pair(name: str, key: ec.EllipticCurvePrivateKey, names: x509.UnrecognizedExtension | None) -> Pair:
    """A self-signed pair with that key and, instead of the alternative name, that extension."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begun = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begun)
        .not_valid_after(begun + dt.timedelta(days=30))
        .add_extension(names or x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    )
    return Pair(
        builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )
