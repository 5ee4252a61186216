"""Who looks at the proxy while it runs, and measures it when it rests."""

from __future__ import annotations

import asyncio
import json
import random
import re
import ssl
from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Final

from cryptography import x509

from tests.slow.chaos_backends import RegistrationClient
from tests.slow.chaos_faults import CertificateChurn
from tests.slow.chaos_journal import Breakage, Journal, now
from tests.slow.chaos_ledger import DEFAULT, Certificates, Leases, Name
from tests.slow.chaos_load import PATIENCE, Http1, Place, Request, instance_of, worker_of
from tests.slow.chaos_processes import Processes

#: Seconds that the proxy may take to come to rest.
REST: Final = 60.0
#: Seconds in which whoever was passed over must be tried again: the longest pause of an ejection, and more.
BACK: Final = 90.0


class LeaseWatch:
    """Asks for the table again and again: is everything there that must be, and nothing else?"""

    def __init__(self, journal: Journal, leases: Leases, api: RegistrationClient) -> None:
        self._journal = journal
        self._leases = leases
        self._api = api
        self._said: set[tuple[str, Name]] = set()

    async def run(self, until: float) -> None:
        """Look twice a second."""
        while now() < until:
            await self.look()
            await asyncio.sleep(0.5)

    async def look(self) -> bool:
        """Look once; whether there was an answer. What is amiss is said once for each lease."""
        begun = now()
        answer = await self._api.ask("GET", "/backends")
        if answer.status != 200:
            kind = "api broken" if answer.status == 0 else "api refused"
            self._broke(kind, begun, f"GET /backends: {answer.status} {answer.body[:200]!r}")
            return False
        listed = [
            (service["service_name"], backend["instance_id"])
            for service in json.loads(answer.body)["services"]
            for backend in service["backends"]
        ]
        self._journal.served["looks at the table"] += 1
        for lease in self._leases.lost(listed, begun, now()):
            self._once("lease lost", lease.name, begun, f"sure for {lease.sure_until - now():.1f} s more")
        for name in self._leases.undead(listed, begun):
            self._once("lease undead", name, begun, "it was released, or has ended")
        return True

    # Private

    def _once(self, kind: str, name: Name, begun: float, detail: str) -> None:
        if (kind, name) not in self._said:
            self._said.add((kind, name))
            self._broke(kind, begun, f"{name[1]} of {name[0]}: {detail}", name[0])

    def _broke(self, kind: str, begun: float, detail: str, service: str = "") -> None:
        self._journal.broke(Breakage(kind, "watch", begun, now(), detail, service))


class CertificateWatch:
    """Shakes hands again and again: does each name present what it should?"""

    def __init__(
        self, journal: Journal, promises: Certificates, port: int, authority_pem: bytes, source: random.Random
    ) -> None:
        self._journal = journal
        self._promises = promises
        self._port = port
        self._source = source
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._tls.check_hostname = False
        self._tls.verify_mode = ssl.CERT_NONE  # what is presented is judged by its serial number
        self._said: set[tuple[str, int]] = set()

    async def run(self, until: float) -> None:
        """Three times a second."""
        while now() < until:
            await self.look(self._source.choice(self._promises.names))
            await asyncio.sleep(0.3)

    async def look(self, name: str) -> bool:
        """Shake hands for one name; whether it presents what it should."""
        place, begun = Place(), now()
        try:
            async with asyncio.timeout(PATIENCE):
                client = await Http1.open(self._port, self._tls, name.replace("*", "any"), place)
        except (OSError, TimeoutError) as error:
            kind = "hung" if isinstance(error, TimeoutError) else "broken"
            self._broke(kind, begun, place, f"handshake for {name}: {error!r}")
            return False
        tls = client.writer.get_extra_info("ssl_object")
        serial = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True)).serial_number
        client.close()
        allowed = self._promises.allowed(name, begun, now())
        defaults = self._promises.allowed(CertificateChurn.DEFAULT_NAME, begun, now())
        if serial in allowed or (DEFAULT in allowed and serial in defaults):
            self._journal.served["handshakes looked at"] += 1
            return True
        if (name, serial) not in self._said:
            self._said.add((name, serial))
            found = "the default's" if serial in defaults else f"{serial % 10**6:06d}"
            promised = self._promises.told(name)
            detail = f"{name} presents {found}; promised were {promised} ({DEFAULT:06d}: the default's)"
            self._broke("certificate", begun, place, detail)
        return False

    # Private

    def _broke(self, kind: str, begun: float, place: Place, detail: str) -> None:
        self._journal.broke(
            Breakage(kind, "handshake", begun, now(), detail, port=place.port, opened=place.opened)
        )


@dataclass(frozen=True)
class Rest:
    """The proxy at rest: what must be the same before and after."""

    descriptors: dict[str, Counter[str]]  # process -> kind -> count
    tasks: dict[str, float]  # "control", "workers"
    subscribers: float
    claims: float  # exchanges that are going on or wait

    def differences(self, later: Rest) -> list[tuple[str, str]]:
        """What `later` has more or less of, by kind of breakage."""
        found = []
        for name in sorted(self.descriptors.keys() | later.descriptors.keys()):
            before = self.descriptors.get(name, Counter())
            after = later.descriptors.get(name, Counter())
            found += [
                ("descriptors", f"{name}: {kind}: {before[kind]} before, {after[kind]} after")
                for kind in sorted(before.keys() | after.keys())
                if before[kind] != after[kind]
            ]
        for name, count in self.tasks.items():
            if later.tasks.get(name) != count:
                found.append(("tasks", f"{name}: {count:g} before, {later.tasks.get(name, 0):g} after"))
        if later.claims != self.claims:
            found.append(("claims", f"{self.claims:g} before, {later.claims:g} after"))
        if later.subscribers != self.subscribers:
            found.append(("subscribers", f"{self.subscribers:g} before, {later.subscribers:g} after"))
        return found


async def measure(processes: Processes, api: RegistrationClient) -> Rest | None:
    """The proxy as it is now; None when it does not say."""
    answer = await api.ask("GET", "/metrics")
    if answer.status != 200:
        return None
    text = answer.body.decode()
    tasks = {
        name: float(value)
        for name, value in re.findall(r'^portero_tasks{process="(\w+)"} (\S+)', text, re.MULTILINE)
    }
    subscribers = re.findall(r"^portero_feed_subscribers (\S+)", text, re.MULTILINE)
    going_on = re.findall(r"^portero_(?:requests_in_flight|queued(?:{.*})?) (\S+)", text, re.MULTILINE)
    descriptors = {name: processes.descriptors(pid) for name, pid in processes.all().items()}
    return Rest(descriptors, tasks, float(subscribers[0]), sum(map(float, going_on)))


class MemoryWatch:
    """What the processes hold, again and again. The second minute and the last are compared."""

    #: What the last minute may have more than the second one.
    MOST: Final = 1.10

    def __init__(self, journal: Journal, processes: Processes) -> None:
        self._journal = journal
        self._processes = processes
        self._samples: list[tuple[float, int]] = []

    async def run(self, until: float) -> None:
        """Twice a second, and judge at the end, if there were three minutes at least."""
        begun = now()
        while now() < until:
            self._samples.append((now() - begun, self._processes.memory()))
            await asyncio.sleep(0.5)
        if until - begun >= 180.0:
            second, last = self._usual(60.0, 120.0), self._usual(until - begun - 60.0, until - begun)
            self._journal.note(f"memory: {second >> 20} MiB in minute two, {last >> 20} MiB in the last")
            if last > second * self.MOST:
                detail = f"{second / 1e6:.1f} MB in the second minute, {last / 1e6:.1f} MB in the last"
                self._journal.broke(Breakage("memory", "watch", begun, now(), detail))

    # Private

    def _usual(self, begun: float, ended: float) -> int:
        """The median: for a moment there are two generations, or a process less."""
        return int(median(size for at, size in self._samples if begun <= at < ended))


async def rest(processes: Processes, api: RegistrationClient) -> Rest:
    """The proxy when it has come to rest: the same three times in a row."""
    begun, same, last = now(), 0, await measure(processes, api)
    while same < 3 and now() < begun + REST:
        await asyncio.sleep(0.4)
        found = await measure(processes, api)
        same = same + 1 if found is not None and found == last else 0
        last = found or last
    assert last is not None, "the proxy does not say how it is"
    return last


async def same_rest(before: Rest, processes: Processes, api: RegistrationClient, journal: Journal) -> None:
    """Wait until the proxy rests as it did before, and write down in what it does not."""
    begun, differences = now(), [("tasks", "the proxy did not say how it is")]
    while differences and now() < begun + REST:
        await asyncio.sleep(0.4)
        after = await measure(processes, api)
        if after is not None:
            differences = before.differences(after)
    for kind, detail in differences:
        journal.broke(Breakage(kind, "rest", begun, now(), detail))


async def every_worker_serves(
    journal: Journal, leases: Leases, port: int, tls: ssl.SSLContext, workers: int
) -> None:
    """Every sure lease answers through every worker."""
    wanted: dict[str, set[str]] = {}
    for lease in leases.sure(now(), now() + 15.0):
        wanted.setdefault(lease.name[0], set()).add(lease.name[1])
    begun, asked = now(), {}
    clients: dict[bytes, Http1] = {}
    extra: list[Http1] = []
    name = next(iter(wanted))
    try:
        while len(clients) < workers and now() < begun + 30.0:
            client = await Http1.open(port, tls, name, Place())
            extra.append(client)
            _, body = await client.ask(Request(name, "/pad/0", None, 0))
            clients.setdefault(worker_of(body), client)
        if len(clients) < workers:
            journal.broke(
                Breakage("worker mute", "final", begun, now(), f"{len(clients)} of {workers} workers answer")
            )
        for number, client in enumerate(clients.values()):
            for service, instances in wanted.items():
                missing, asked_first = set(instances), now()
                while missing and now() < asked_first + BACK:
                    for _ in range(4 * len(instances) + 4):
                        status, body = await client.ask(Request(service, "/pad/0", None, 0))
                        if status == 200:
                            missing.discard(instance_of(body))
                        asked[service] = status
                        if not missing:
                            break
                    else:
                        await asyncio.sleep(0.5)
                if missing:
                    detail = (
                        f"{', '.join(sorted(missing))} of {service} never answered through worker {number}"
                    )
                    journal.broke(
                        Breakage(
                            "lease dead", "final", begun, now(), f"{detail} (last status {asked[service]})"
                        )
                    )
                else:
                    journal.served["leases asked for at the end"] += len(instances)
    except (OSError, EOFError) as error:
        journal.broke(Breakage("broken", "final", begun, now(), repr(error)))
    finally:
        for client in extra:
            client.close()
