"""Where a record belongs, and who serves it.

- A record name that is an alias (CNAME) leads elsewhere, often into a zone that is there for challenges only:
  the record is made at the end.
- The zone of a name is the nearest name above it, or itself, that has a SOA record.
- Its servers are all addresses of all names in its NS record. A CA may ask any of them, so all must have the
  record; an address that this machine has no route to (IPv6, most often) is left out, where its server has
  another one. `check` replaces them, where portero reaches others than a CA does, or none but a resolver.

Everything here blocks.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from portero_py.config.model import Address
from portero_py.control.acme.dns01.questions import answers, ask, system_resolvers
from portero_py.core.acme.dns_records import end_of_aliases
from portero_py.errors import DnsFailed

if TYPE_CHECKING:
    import dns.message

#: Name servers of a zone that are asked: a zone has 2 to 13.
MAX_SERVERS: Final = 32

_NO_ROUTE: Final = {errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EHOSTUNREACH}


@dataclass(frozen=True, slots=True)
class Server:
    """A name server and its addresses; `name` is "" when only the address is known."""

    name: str
    addresses: tuple[Address, ...]


class Zones:
    """`resolver` are asked about names (none: the system's); `zone` and `check` as in the configuration.

    `port` is where the zones' own servers listen.
    """

    def __init__(
        self, resolver: Sequence[Address], zone: str = "", check: Sequence[Address] = (), port: int = 53
    ) -> None:
        self._resolver = tuple(resolver)
        self._zone = zone
        self._check = tuple(check)
        self._port = port

    def aliases(self, name: str) -> list[str]:
        """The name, and what it is an alias of, to the end of the chain. Raises DnsFailed."""
        return end_of_aliases(name, self._alias)

    def zone_of(self, name: str) -> str:
        """The zone that a record of that name belongs to. Raises DnsFailed."""
        if self._zone:
            if name != self._zone and not name.endswith(f".{self._zone}"):
                raise DnsFailed(f"{name} is not in acme.dns_zone, {self._zone}")
            return self._zone
        labels = name.split(".")
        for start in range(len(labels)):
            above = ".".join(labels[start:])
            if answers(self._ask(above, "SOA"), above, "SOA"):
                return above
        raise DnsFailed(f"{name} is in no zone: no name above it has a SOA record")

    def servers_of(self, name: str) -> list[Server]:
        """Who serves the zone of a name, or who is to be asked instead. Raises DnsFailed."""
        if self._check:
            return [Server("", (address,)) for address in self._check]
        zone = self.zone_of(name)
        names = sorted(answers(self._ask(zone, "NS"), zone, "NS"))[:MAX_SERVERS]
        if not names:
            raise DnsFailed(f"{zone} names no name servers (NS)")
        found = []
        for server in names:
            addresses = [
                Address(address, self._port)
                for kind in ("A", "AAAA")
                for address in answers(self._ask(server, kind), server, kind)
            ]
            if not addresses:
                raise DnsFailed(f"the name server {server} of {zone} has no address")
            near = tuple(address for address in addresses if _has_route(address))
            found.append(Server(server, near or tuple(addresses)))
        return found

    def missing(self, name: str, values: Sequence[str], servers: Sequence[Server]) -> str:
        """Which server does not have all of these TXT values yet, in words; "" when all have them."""
        for server in servers:
            for address in server.addresses:
                where = f"{server.name} ({address})" if server.name else str(address)
                try:
                    answer = ask((address,), name, "TXT", is_resolver=not server.name, rounds=1)
                except DnsFailed as error:
                    return f"{where}: {error}"
                found = answers(answer, name, "TXT")
                if not set(values).issubset(found):
                    return f"{where} does not have it" if not found else f"{where} has another value"
        return ""

    # Private

    def _alias(self, name: str) -> str:
        return next(iter(answers(self._ask(name, "CNAME"), name, "CNAME")), "")

    def _ask(self, name: str, kind: str) -> dns.message.Message:
        return ask(self._resolver or system_resolvers(), name, kind)


# Private


def _has_route(address: Address) -> bool:
    """Whether this machine knows a way there: nothing is sent."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address.host, address.port))
    except OSError as error:
        return error.errno not in _NO_ROUTE
    return True
