"""What the labels of a container say: which services it serves, and on what terms.

The vocabulary
- `portero.service` is the host name to serve, or several between commas; `.port`, `.network`, `.weight`,
  `.tls`, `.health_path`, `.protocol` and `.max_in_flight` are its terms: the fields of a registration.
- A container with several services gives each a name of its own: `portero.NAME.service`, `portero.NAME.port`.
  What stands without a NAME holds for each of them that does not say otherwise, except `service`.
- `pingoo.service` and `pingoo.port` are read where there is no label of portero's.
- A value that cannot be used takes the services away that it is about, and no other: what would be served
  without it is not what was meant. A label that means nothing takes nothing away. Either is complained of.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from portero_py.core.names import normalise_service_name

PREFIX: Final = "portero."
PINGOO: Final = {"pingoo.service": "portero.service", "pingoo.port": "portero.port"}

#: As the registration API has them.
MAX_PORT: Final = 65_535
MAX_WEIGHT: Final = 1_000
MAX_IN_FLIGHT: Final = 1_000_000
PROTOCOLS: Final = ("http1", "h2", "h2c")
_HEALTH_PATH: Final = re.compile(r"/[\x21-\x7e]{0,1023}")

FIELDS: Final = ("service", "port", "network", "weight", "tls", "health_path", "protocol", "max_in_flight")

_SWITCH: Final = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}

_NAME: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_NUMBER: Final = re.compile(r"[0-9]{1,9}", re.ASCII)
_LONGEST_SHOWN: Final = 80

#: Services of one container, and what is said of its labels: a label may be as long as a book.
MAX_SERVICES: Final = 1_000
MAX_COMPLAINTS: Final = 10


@dataclass(frozen=True, slots=True)
class Wish:
    """One service that a container is to serve. `port` is 0 and `network` "" where no label says so."""

    service: str
    port: int = 0
    network: str = ""
    weight: int = 1
    use_tls: bool = False
    health_path: str = ""
    protocol: str = "http1"
    max_in_flight: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """What the labels say, and what is wrong with them: a clause each."""

    wishes: tuple[Wish, ...] = ()
    complaints: tuple[str, ...] = ()


def is_labelled(labels: Mapping[str, str]) -> bool:
    """Whether a container speaks of us at all."""
    return any(label.startswith(PREFIX) or label in PINGOO for label in labels)


def read(labels: Mapping[str, str]) -> Reading:
    """What the labels of one container say."""
    ours = {label: value for label, value in labels.items() if label.startswith(PREFIX)}
    if not ours:
        ours = {PINGOO[label]: value for label, value in labels.items() if label in PINGOO}
    by_name, complaints = _sorted_out(ours)
    for_all = by_name.get("", {})
    wishes: dict[Wish, None] = {}
    for name, own in sorted(by_name.items()):
        if "service" not in own:
            # Without a name they are for the others, where there are any.
            if name or len(by_name) == 1:
                complaints.append(f"there is no {_label(name, 'service')}")
            continue
        passed_on = {field: value for field, value in for_all.items() if field != "service"}
        try:
            wishes.update(dict.fromkeys(_wishes({**passed_on, **own})))
        except _Unusable as unusable:
            is_own = unusable.field in own
            complaints.append(f"{_label(name if is_own else '', unusable.field)}: {unusable}")
    if len(wishes) > MAX_SERVICES:
        complaints.append(f"these are {len(wishes)} services: all but the first {MAX_SERVICES} are left out")
    return Reading(tuple(wishes)[:MAX_SERVICES], tuple(dict.fromkeys(complaints)))


def few(complaints: Iterable[str]) -> tuple[str, ...]:
    """Each once, and not more than a person reads."""
    found = tuple(dict.fromkeys(complaints))
    left = len(found) - MAX_COMPLAINTS
    return (*found[:MAX_COMPLAINTS], f"and {left} more") if left > 0 else found


def shown(text: str) -> str:
    """A text as a log shows it: in quotes, and not too long."""
    return f'"{text[:_LONGEST_SHOWN]}{"..." if len(text) > _LONGEST_SHOWN else ""}"'


# Private


class _Unusable(Exception):
    """A value that cannot be used."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def _sorted_out(labels: Mapping[str, str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The fields by name ("" without one), and what is no label of ours."""
    by_name: dict[str, dict[str, str]] = {}
    complaints = []
    for label, value in sorted(labels.items()):
        name, dot, field = label.removeprefix(PREFIX).rpartition(".")
        if field not in FIELDS or (dot and not _NAME.fullmatch(name)):
            complaints.append(f"{shown(label)} is no label of portero's, and ignored")
        else:
            by_name.setdefault(name, {})[field] = value.strip()
    return by_name, complaints


def _wishes(said: Mapping[str, str]) -> list[Wish]:
    protocol = said.get("protocol", "http1")
    if protocol not in PROTOCOLS:
        raise _Unusable("protocol", f"{shown(protocol)} is none of {', '.join(PROTOCOLS)}")
    health_path = said.get("health_path", "")
    if health_path and not _HEALTH_PATH.fullmatch(health_path):
        raise _Unusable("health_path", f"{shown(health_path)} is no path: it begins with / and has no spaces")
    switch = said.get("tls", "false").lower()
    if switch not in _SWITCH:
        raise _Unusable("tls", f"{shown(switch)} is neither true nor false")
    return [
        Wish(
            service,
            port=_number(said, "port", 0, MAX_PORT),
            network=said.get("network", ""),
            weight=_number(said, "weight", 1, MAX_WEIGHT),
            use_tls=_SWITCH[switch],
            health_path=health_path,
            protocol=protocol,
            max_in_flight=_number(said, "max_in_flight", 0, MAX_IN_FLIGHT),
        )
        for service in _services(said["service"])
    ]


def _services(value: str) -> list[str]:
    services = []
    for name in value.split(","):
        service = normalise_service_name(name.strip())
        if service is None:
            raise _Unusable("service", f"{shown(name.strip())} is no host name, address or *.example.com")
        services.append(service)
    return services


def _number(said: Mapping[str, str], field: str, otherwise: int, greatest: int) -> int:
    value = said.get(field)
    if value is None:
        return otherwise
    if not _NUMBER.fullmatch(value) or not 1 <= int(value) <= greatest:
        raise _Unusable(field, f"{shown(value)} is no whole number from 1 to {greatest}")
    return int(value)


def _label(name: str, field: str) -> str:
    return f"{PREFIX}{name}.{field}" if name else f"{PREFIX}{field}"
