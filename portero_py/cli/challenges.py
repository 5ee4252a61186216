"""What `certs check` says about a name's challenge: which one ACME uses, and whether DNS would play along.

Nothing is changed anywhere: records are not made, and the update that is sent to a server holds none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from portero_py.control.acme.challenges import at_usual_port
from portero_py.control.acme.dns01.hook import unfit
from portero_py.core.acme.dns_records import record_name
from portero_py.core.acme.names import Group, allowed
from portero_py.core.acme.schedule import AUTO, DNS_01, HTTP_01, TLS_ALPN_01, challenges_for
from portero_py.core.names import wildcard_over
from portero_py.errors import DnsFailed

if TYPE_CHECKING:
    from portero_py.config.model import Acme, Config
    from portero_py.control.acme.dns01.zones import Zones


class Findings(Protocol):
    """Where what was found is said."""

    def good(self, text: str) -> None: ...

    def bad(self, text: str) -> None: ...


def group_of(config: Config, host: str) -> Group | None:
    """The certificate that ACME looks after, or would, for `host`; None when it does not."""
    for name in (host, wildcard_over(host)):
        for group in config.acme.domains:
            if name in group:
                return group
    return (host,) if allowed(host, config.acme.on_register) else None


def examine(findings: Findings, config: Config, host: str) -> None:
    """Say which challenge validates the name, and what there is to say about its record."""
    group = group_of(config, host)
    if group is None:
        return
    answered = (TLS_ALPN_01, HTTP_01) if config.plain_http.listen is not None else (TLS_ALPN_01,)
    usual = at_usual_port(config)
    kinds = challenges_for(group, answered, usual, has_dns=config.acme.has_dns)
    if config.acme.challenge != AUTO:
        kinds = tuple(kind for kind in kinds if kind == config.acme.challenge)
    if not kinds:
        findings.bad(
            f"ACME has no challenge for it: --acme-challenge {config.acme.challenge}, no DNS records"
        )
        return
    after = f", after a failure by {' or '.join(kinds[1:])}" if kinds[1:] else ""
    findings.good(f"ACME validates it by {kinds[0]}{after}")
    if DNS_01 in kinds:
        _examine_dns(findings, config.acme, host if host in group else wildcard_over(host))


# Private


def _examine_dns(findings: Findings, acme: Acme, name: str) -> None:
    from portero_py.control.acme.dns01.records import tools

    if acme.dns_hook:
        _examine_hook(findings, acme.dns_hook[0])
    try:
        zones, updates = tools(acme)
        chain = zones.aliases(record_name(name))
        if chain[1:]:
            findings.good(f"{' is an alias of '.join(chain)}: the record is made there")
        if updates is not None:
            zone = updates.rehearse(chain[-1])
            key = f", signed by {acme.dns_tsig_name}" if acme.dns_tsig_name else ""
            findings.good(f"{acme.dns_server} takes updates of {zone}{key}")
        _examine_servers(findings, zones, chain[-1])
    except DnsFailed as error:
        findings.bad(str(error))


def _examine_hook(findings: Findings, program: str) -> None:
    problem = unfit(program)
    if problem:
        findings.bad(f"acme.dns_hook: {problem}")
    else:
        findings.good(f"acme.dns_hook: {program} can be run")


def _examine_servers(findings: Findings, zones: Zones, name: str) -> None:
    """Whether all that must have the record can be asked: of a value that nobody wants."""
    servers = zones.servers_of(name)
    listed = ", ".join(server.name or str(server.addresses[0]) for server in servers)
    silent = [said for server in servers if (said := zones.missing(name, (), (server,)))]
    if silent:
        findings.bad(f"the record {name} must be at all of {listed}: {silent[0]}")
    else:
        findings.good(f"the record {name} is looked for at {listed}")
