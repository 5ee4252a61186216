"""What control and the workers say to each other when they are several processes: messages <-> bytes.

The rules
- A frame is four bytes of length (big-endian) and JSON: `[kind, number, content]`. JSON and not pickle: a
  worker reads what strangers send, and whoever takes one over must not be able to run code in control. It is
  not slower either: orjson writes the dataclasses of the model by itself.
- Numbers count up in one connection. What control sends under number n is in force in the worker when the
  worker answers `Ack(n)`, and so is everything before it. Number 0 wants no answer.
- Only what changed is sent: a renewal in a table of 10,000 services is one service. The first update of a
  connection is `whole`.
- A new field of the model or of `Counters` travels along by itself, if JSON knows its type.
- After an upgrade the two ends are of different versions for a while: a kind that is not known is `Unknown`,
  which is acknowledged and forgotten, and so are fields that are not known.

The worker says `Hello` first, with all that a control process needs which has just taken a dead one's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Final, TypeVar

import orjson

from portero_py.core.certificates import Certificate, CertificateTable
from portero_py.core.challenges import Challenges
from portero_py.core.counters import Counters, ServiceCounters
from portero_py.core.health import Evidence
from portero_py.core.model import NEVER, Backend, Halt, Lease, LeaseState, Service, Standing
from portero_py.core.policies import ServicePolicy
from portero_py.core.routes import Route, Routes
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import FeedError
from portero_py.feed import records

#: The longest frame, bytes: 100,000 leases, the most that a registry holds, are 40 MB.
MAX_FRAME: Final = 256 << 20

_LENGTH: Final = 4

_Counted = TypeVar("_Counted", Counters, ServiceCounters)


@dataclass(frozen=True, slots=True)
class TableUpdate:
    """The way from a routing table to the next one. `whole`: nothing of the former table stays."""

    version: int
    default_service: str
    changed: tuple[Service, ...]
    dropped: tuple[str, ...] = ()
    whole: bool = False
    routes: tuple[Route, ...] | None = None  # None: those that there were

    @classmethod
    def between(cls, former: RoutingTable | None, table: RoutingTable) -> TableUpdate:
        """What has to be said to somebody who has `former`, or nothing, so that he has `table`."""
        if former is None:
            services = tuple(table.services.values())
            return cls(table.version, table.default_service, services, whole=True, routes=table.routes.routes)
        old, new = former.services, table.services
        if table.since == former.version:
            names = table.changed
        else:
            names = frozenset(name for name in {**old, **new} if _differ(old.get(name), new.get(name)))
        changed = tuple(new[name] for name in names if name in new)
        dropped = tuple(name for name in names if name not in new)
        routes = None if table.routes == former.routes else table.routes.routes
        return cls(table.version, table.default_service, changed, dropped, routes=routes)

    def applied_to(self, former: RoutingTable) -> RoutingTable:
        """The table that comes out; `former` stays as it is."""
        services = {} if self.whole else dict(former.services)
        for name in self.dropped:
            services.pop(name, None)
        services.update((service.name, service) for service in self.changed)
        routes = former.routes if self.routes is None else Routes(self.routes)
        if self.whole:
            return RoutingTable(self.version, services, self.default_service, routes=routes)
        changed = frozenset([*self.dropped, *(service.name for service in self.changed)])
        return RoutingTable(self.version, services, self.default_service, former.version, changed, routes)


@dataclass(frozen=True, slots=True)
class CertificateUpdate:
    """The way from a table of certificates to the next one."""

    version: int
    changed: tuple[Certificate, ...]
    dropped: tuple[str, ...] = ()
    whole: bool = False

    @classmethod
    def between(cls, former: CertificateTable | None, table: CertificateTable) -> CertificateUpdate:
        """As `TableUpdate.between`."""
        if former is None:
            return cls(table.version, table.certificates, whole=True)
        changed = tuple(each for each in table.certificates if former.get(each.name) != each)
        dropped = tuple(each.name for each in former.certificates if table.get(each.name) is None)
        return cls(table.version, changed, dropped)

    def applied_to(self, former: CertificateTable) -> CertificateTable:
        """The table that comes out; `former` stays as it is."""
        kept = {} if self.whole else {each.name: each for each in former.certificates}
        for name in self.dropped:
            kept.pop(name, None)
        kept.update((each.name, each) for each in self.changed)
        return CertificateTable(kept.values(), self.version)


@dataclass(frozen=True, slots=True)
class Departed:
    """What workers had counted that are gone. The others keep it for the next control process."""

    version: int = 0
    counters: Counters = field(default_factory=Counters)


@dataclass(frozen=True, slots=True)
class Ask:
    """Control wants `Counted` now."""


@dataclass(frozen=True, slots=True)
class AskCertificates:
    """Control wants a `CertificateUpdate` with what the worker presents for these names."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AskStandings:
    """Control wants `Standings` of one service, or of all ("")."""

    service: str = ""


@dataclass(frozen=True, slots=True)
class Standings:
    """What the worker says of backends: the answer to `AskStandings`, under its number."""

    standings: tuple[Standing, ...]


@dataclass(frozen=True, slots=True)
class Hello:
    """A worker's first word: who it is, what it has, and what control may have forgotten."""

    worker: int
    serving: bool
    table: TableUpdate
    counters: Counters
    departed: Departed


@dataclass(frozen=True, slots=True)
class Serving:
    """The worker accepts connections from now on."""


@dataclass(frozen=True, slots=True)
class Counted:
    """All that the worker has counted up to now."""

    counters: Counters


@dataclass(frozen=True, slots=True)
class Ack:
    """Everything up to the number of this frame is in force."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """Something that only another version says."""


Message = (
    TableUpdate
    | CertificateUpdate
    | Challenges
    | Departed
    | Ask
    | AskCertificates
    | AskStandings
    | Standings
    | Evidence
    | Hello
    | Serving
    | Counted
    | Ack
    | Unknown
)


def encode(message: Message, number: int = 0) -> bytes:
    """One frame. Raises FeedError when it would be longer than `MAX_FRAME`."""
    kind = type(message).__name__
    to_json = _TO_JSON.get(type(message))
    content = message if to_json is None else to_json(message)
    payload = orjson.dumps([kind, number, content])
    if len(payload) > MAX_FRAME:
        raise FeedError(f"a {kind} of {len(payload)} bytes is too long for the feed")
    return len(payload).to_bytes(_LENGTH, "big") + payload


class FrameReader:
    """Collects bytes, gives messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, Message]]:
        """The messages that are whole now, each with its number. Raises FeedError; nothing follows then."""
        buffer = self._buffer
        buffer += data
        found = []
        at = 0
        while len(buffer) >= at + _LENGTH:
            length = int.from_bytes(buffer[at : at + _LENGTH], "big")
            if length > MAX_FRAME:
                raise FeedError(f"a frame of {length} bytes is too long for the feed")
            end = at + _LENGTH + length
            if len(buffer) < end:
                break
            found.append(_decode(bytes(buffer[at + _LENGTH : end])))
            at = end
        del buffer[:at]
        return found


def lease_from(fields_of_lease: Mapping[str, Any]) -> Lease:
    """The lease that orjson wrote. Raises KeyError, TypeError, ValueError when it did not.

    Fields that have a default may be missing: those who wrote a snapshot did not know them yet.
    """
    found = _known(Lease, fields_of_lease)
    found["backend"] = Backend(**_known(Backend, fields_of_lease["backend"]))
    if found["expires_at"] is None:
        found["expires_at"] = NEVER
    if "state" in found:
        found["state"] = LeaseState(found["state"])
    if "also" in found:
        found["also"] = tuple(map(lease_from, found["also"]))
    if found.get("granted") is not None:
        found["granted"] = tuple(found["granted"])
    return Lease(**found)


def service_from(fields_of_service: Mapping[str, Any]) -> Service:
    """The service that orjson wrote. Raises as `lease_from`."""
    found = _known(Service, fields_of_service)
    found["leases"] = tuple(map(lease_from, found["leases"]))
    if found.get("halt") is not None:
        found["halt"] = Halt(**_known(Halt, found["halt"]))
    if found.get("policy") is not None:
        found["policy"] = records.read(ServicePolicy, found["policy"])
    return Service(**found)


# Private


@cache
def _field_names(of: type) -> frozenset[str]:
    return frozenset(each.name for each in fields(of) if each.init)


def _known(of: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that this version knows. (What follows from others, as `serves_until`, is none of them.)"""
    names = _field_names(of)
    return {name: value for name, value in content.items() if name in names}


def _differ(one: Service | None, other: Service | None) -> bool:
    # Most are the same object; equality alone would take 2 µs for each of 10,000.
    return one is not other and one != other


def _decode(payload: bytes) -> tuple[int, Message]:
    try:
        kind, number, content = orjson.loads(payload)
        if kind not in _FROM_JSON:
            return int(number), Unknown()
        return int(number), _FROM_JSON[kind](content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FeedError(f"a frame that cannot be read: {type(error).__name__}") from error


def _table_from(content: dict[str, Any]) -> TableUpdate:
    known = _known(TableUpdate, content)
    known["changed"] = tuple(map(service_from, content["changed"]))
    known["dropped"] = tuple(content["dropped"])
    if known.get("routes") is not None:
        known["routes"] = tuple(records.read(Route, each) for each in known["routes"])
    return TableUpdate(**known)


def _certificates_to(update: CertificateUpdate) -> dict[str, Any]:
    return {
        "version": update.version,
        "changed": [
            {each.name: _plain(getattr(certificate, each.name)) for each in fields(Certificate)}
            for certificate in update.changed
        ],
        "dropped": update.dropped,
        "whole": update.whole,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):  # PEM
        return value.decode("latin-1")
    if isinstance(value, str):  # a file's name may be no UTF-8
        return value.encode("utf-8", "backslashreplace").decode()
    return value


def _certificates_from(content: dict[str, Any]) -> CertificateUpdate:
    changed = tuple(
        Certificate(
            **{
                **_known(Certificate, each),
                "chain_pem": each["chain_pem"].encode("latin-1"),
                "key_pem": each["key_pem"].encode("latin-1"),
                "names": tuple(each["names"]),
            }
        )
        for each in content["changed"]
    )
    known = _known(CertificateUpdate, content)
    return CertificateUpdate(**{**known, "changed": changed, "dropped": tuple(content["dropped"])})


def _challenges_to(challenges: Challenges) -> dict[str, Any]:
    pairs = {name: [_plain(chain), _plain(key)] for name, (chain, key) in challenges.tls_alpn.items()}
    return {"version": challenges.version, "tls_alpn": pairs, "http": dict(challenges.http)}


def _challenges_from(content: dict[str, Any]) -> Challenges:
    pairs = {
        name: (chain.encode("latin-1"), key.encode("latin-1"))
        for name, (chain, key) in content["tls_alpn"].items()
    }
    return Challenges(content["version"], pairs, content["http"])


def _counters_to(counters: Counters) -> dict[str, Any]:
    content = _counts_to(counters)
    content["services"] = [(name, _counts_to(counted)) for name, counted in counters.services.items()]
    return content


def _counters_from(content: dict[str, Any]) -> Counters:
    counters = _counts_from(Counters(), {**content, "services": None})
    counters.services = {name: _counts_from(ServiceCounters(), each) for name, each in content["services"]}
    return counters


def _counts_to(counted: Counters | ServiceCounters) -> dict[str, Any]:
    # JSON knows no tuples as keys: a mapping is a list of pairs.
    values = {each.name: getattr(counted, each.name) for each in fields(counted)}
    return {name: list(value.items()) if isinstance(value, dict) else value for name, value in values.items()}


def _counts_from(counted: _Counted, content: dict[str, Any]) -> _Counted:
    """Fill `counted`, which is empty. A field that is not in `content` stays so."""
    for each in fields(counted):
        value = content.get(each.name)
        if isinstance(value, list):
            counts = {tuple(key) if isinstance(key, list) else key: count for key, count in value}
            getattr(counted, each.name).update(counts)
        elif value is not None:
            setattr(counted, each.name, value)
    return counted


def _departed_to(departed: Departed) -> dict[str, Any]:
    return {"version": departed.version, "counters": _counters_to(departed.counters)}


def _departed_from(content: dict[str, Any]) -> Departed:
    return Departed(content["version"], _counters_from(content["counters"]))


def _hello_to(hello: Hello) -> dict[str, Any]:
    return {
        "worker": hello.worker,
        "serving": hello.serving,
        "table": hello.table,
        "counters": _counters_to(hello.counters),
        "departed": _departed_to(hello.departed),
    }


def _hello_from(content: dict[str, Any]) -> Hello:
    return Hello(
        content["worker"],
        content["serving"],
        _table_from(content["table"]),
        _counters_from(content["counters"]),
        _departed_from(content["departed"]),
    )


def _standings_from(content: dict[str, Any]) -> Standings:
    return Standings(tuple(Standing(**_known(Standing, each)) for each in content["standings"]))


def _evidence_from(content: dict[str, Any]) -> Evidence:
    return Evidence(**_known(Evidence, content))


_TO_JSON: Final[Mapping[type, Callable[[Any], Any]]] = {
    CertificateUpdate: _certificates_to,
    Challenges: _challenges_to,
    Counted: lambda counted: _counters_to(counted.counters),
    Departed: _departed_to,
    Hello: _hello_to,
}

_FROM_JSON: Final[Mapping[str, Callable[[Any], Message]]] = {
    "TableUpdate": _table_from,
    "CertificateUpdate": _certificates_from,
    "Challenges": _challenges_from,
    "Counted": lambda content: Counted(_counters_from(content)),
    "Departed": _departed_from,
    "Hello": _hello_from,
    "Ask": lambda _: Ask(),
    "AskCertificates": lambda content: AskCertificates(tuple(content["names"])),
    "AskStandings": lambda content: AskStandings(content["service"]),
    "Standings": _standings_from,
    "Evidence": _evidence_from,
    "Serving": lambda _: Serving(),
    "Ack": lambda _: Ack(),
}
