"""DNS records by updates (RFC 2136), signed with TSIG (RFC 8945) where there is a key.

A value is added to those that are there, and exactly that one is removed. Both may be repeated: when an
answer is lost, nothing is. Over TCP first, by UDP where that finds nobody.

Everything here blocks.
"""

from __future__ import annotations

import socket
from base64 import b64decode
from collections.abc import Callable
from typing import Final

import dns.exception
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.tsig
import dns.update

from portero_py.config.model import Acme, Address
from portero_py.control.acme.dns01.questions import TROUBLE, why
from portero_py.core.acme.dns_records import TxtRecord
from portero_py.errors import DnsFailed

#: Seconds for one answer.
UPDATE_SECONDS: Final = 10.0
UDP_SECONDS: Final = 3.0
#: How long resolvers may keep the record.
TTL: Final = 60
#: Addresses of the server's name that are tried.
_MAX_ADDRESSES: Final = 4

_SAYS: Final = {
    dns.rcode.REFUSED: "it does not let this key (or this address) change {zone} (REFUSED)",
    dns.rcode.NOTAUTH: "it is not the primary of {zone}, or does not know the key (NOTAUTH)",
    dns.rcode.NOTZONE: "the name is not in its zone {zone} (NOTZONE): is acme.dns_zone right?",
    dns.rcode.NOTIMP: "it takes no updates (NOTIMP)",
    dns.rcode.SERVFAIL: "it failed (SERVFAIL): its own log says why",
}


class Updates:
    """One server that takes updates. `zone_of` says which zone a name belongs to."""

    def __init__(self, config: Acme, zone_of: Callable[[str], str]) -> None:
        assert config.dns_server is not None
        self._server = config.dns_server
        self._zone_of = zone_of
        self._key: dns.tsig.Key | None = None
        if config.dns_tsig_name:
            algorithm = dns.name.from_text(
                _ALGORITHMS.get(config.dns_tsig_algorithm, config.dns_tsig_algorithm)
            )
            try:
                secret = b64decode(config.dns_tsig_secret, validate=True)
            except ValueError:
                raise DnsFailed("acme.dns_tsig_secret is no base64") from None
            self._key = dns.tsig.Key(dns.name.from_text(config.dns_tsig_name), secret, algorithm)

    def present(self, record: TxtRecord) -> None:
        """Add a value. Raises DnsFailed."""
        zone, update = self._update(record.name)
        update.add(dns.name.from_text(record.name), TTL, "TXT", f'"{record.value}"')
        self._send(zone, update)

    def cleanup(self, record: TxtRecord) -> None:
        """Remove a value, if it is there. Raises DnsFailed."""
        zone, update = self._update(record.name)
        update.delete(dns.name.from_text(record.name), "TXT", f'"{record.value}"')
        self._send(zone, update)

    def rehearse(self, name: str) -> str:
        """Send an update that changes nothing; the zone that it is for. Raises DnsFailed."""
        zone, update = self._update(name)
        self._send(zone, update)
        return zone

    # Private

    def _update(self, name: str) -> tuple[str, dns.update.UpdateMessage]:
        zone = self._zone_of(name)
        update = dns.update.UpdateMessage(dns.name.from_text(zone))
        if self._key is not None:
            update.use_tsig(self._key)
        return zone, update

    def _send(self, zone: str, update: dns.update.UpdateMessage) -> None:
        complaint = ""
        for address in self._addresses():
            for send, seconds in ((dns.query.tcp, UPDATE_SECONDS), (dns.query.udp, UDP_SECONDS)):
                try:
                    answer = send(update, address.host, timeout=seconds, port=address.port)
                except (
                    dns.tsig.PeerError,
                    dns.tsig.BadTime,
                    dns.tsig.BadSignature,
                    dns.tsig.BadKey,
                ) as error:
                    raise DnsFailed(f"{self._said} {_of_tsig(error)}") from error
                except dns.message.UnknownTSIGKey as error:
                    raise DnsFailed(f"{self._said} it answers with another key than ours") from error
                except TROUBLE as error:
                    complaint = complaint or why(error)  # TCP's says more
                    continue
                if answer.rcode() == dns.rcode.NOERROR:
                    if self._key is not None and not answer.had_tsig:
                        raise DnsFailed(f"{self._said} its answer is not signed: it may be anybody's")
                    return
                says = _SAYS.get(answer.rcode(), f"it says {dns.rcode.to_text(answer.rcode())}")
                raise DnsFailed(f"{self._said} {says.format(zone=zone)}")
        raise DnsFailed(f"{self._said} no answer: {complaint}")

    def _addresses(self) -> list[Address]:
        try:
            found = socket.getaddrinfo(self._server.host, self._server.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise DnsFailed(f"{self._said} the name cannot be looked up: {why(error)}") from error
        hosts = dict.fromkeys(str(each[4][0]) for each in found)
        return [Address(host, self._server.port) for host in list(hosts)[:_MAX_ADDRESSES]]

    @property
    def _said(self) -> str:
        return f"the DNS server {self._server} took no update:"


# Private

#: Where the name that people use is not that of the standard.
_ALGORITHMS: Final = {"hmac-md5": "hmac-md5.sig-alg.reg.int"}


def _of_tsig(error: Exception) -> str:
    if isinstance(error, dns.tsig.PeerBadTime | dns.tsig.BadTime):
        return "its clock and this machine's differ by more than five minutes (BADTIME)"
    if isinstance(error, dns.tsig.PeerBadKey | dns.tsig.BadKey):
        return "it does not know the key of this name and algorithm (BADKEY): see acme.dns_tsig_name"
    if isinstance(error, dns.tsig.PeerBadSignature):
        return "its key of this name is another one (BADSIG): see acme.dns_tsig_secret_file"
    if isinstance(error, dns.tsig.PeerBadTruncation):
        return "it does not take signatures of this length (BADTRUNC)"
    return "its own signature is wrong: its key of this name is another one"
