"""Questions to name servers: one after the other, with limits; whatever goes wrong is a DnsFailed.

What a server answers is a stranger's: dnspython parses it, and raises what it likes for what is no DNS.
Everything here blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdatatype
import dns.resolver

from portero_py.config.model import Address
from portero_py.core.acme.dns_records import line
from portero_py.errors import DnsFailed

#: Seconds for one answer, and how often each server is asked.
ANSWER_SECONDS: Final = 3.0
ROUNDS: Final = 2
#: What is no reason to ask somebody else.
_ANSWERED: Final = (dns.rcode.NOERROR, dns.rcode.NXDOMAIN)
#: What dnspython may raise for what a server sends, or does not.
TROUBLE: Final = (dns.exception.DNSException, OSError, ValueError, EOFError)

_log = logging.getLogger(__name__)


def ask(
    servers: Sequence[Address], name: str, kind: str, *, is_resolver: bool = True, rounds: int = ROUNDS
) -> dns.message.Message:
    """The first answer that one of them gives; that there is no such name is one. Raises DnsFailed.

    `is_resolver`: they are to find out what they do not know.
    """
    try:
        question = dns.message.make_query(dns.name.from_text(name), kind, use_edns=0, payload=1232)
    except TROUBLE as error:
        raise DnsFailed(f"{line(name)} is no name that DNS could have: {why(error)}") from error
    if not is_resolver:
        question.flags &= ~dns.flags.RD
    complaint = "there are none"
    for server in list(servers) * rounds:
        try:
            answer, _ = dns.query.udp_with_fallback(
                question, server.host, timeout=ANSWER_SECONDS, port=server.port
            )
        except TROUBLE as error:
            complaint = f"{server} does not answer: {why(error)}"
            continue
        if answer.rcode() in _ANSWERED:
            return answer
        complaint = f"{server} says {dns.rcode.to_text(answer.rcode())}"
    raise DnsFailed(f"no name server says what {kind} {name} has: {complaint}")


def system_resolvers() -> tuple[Address, ...]:
    """Those of /etc/resolv.conf. Raises DnsFailed."""
    try:
        found = dns.resolver.Resolver().nameservers
    except TROUBLE as error:
        raise DnsFailed(
            f"/etc/resolv.conf names no name server: {why(error)}; set acme.dns_resolver"
        ) from error
    return tuple(Address(str(host), 53) for host in found)


def answers(message: dns.message.Message, name: str, kind: str) -> list[str]:
    """What it says of `name` itself, as text, without what aliases lead to."""
    wanted, its_kind = dns.name.from_text(name), dns.rdatatype.from_text(kind)
    return [
        b"".join(each.strings).decode("latin-1") if kind == "TXT" else plain(each.to_text())
        for group in message.answer
        if group.name == wanted and group.rdtype == its_kind
        for each in group
    ]


def plain(name: str) -> str:
    """A name as portero writes it."""
    return name.lower().removesuffix(".")


def why(error: BaseException) -> str:
    """An error in a few words."""
    if isinstance(error, dns.exception.Timeout):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return line(str(error)) or type(error).__name__
