"""The command line: flags become a mapping, a command is called, an error becomes one line.

Nothing is decided here. `config/sources.py` knows what a flag means and which source wins, `backends.py` and
`actions.py` what the subcommands do, `supervisor.py` how portero runs, `outcome.py` what a shell hears of the
end. A parameter is called like its flag, with `_` for `-`: that is how the flags reach `sources.load`.

A proxy that is started with nothing but its flags never loads this file (`plain_flags`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Final

import typer

from portero_py import __version__
from portero_py.cli import actions, backends, certs, discover, outcome
from portero_py.cli.options import (
    AnyHost,
    AnyPort,
    AsJson,
    InstanceId,
    RegisterSecret,
    RegisterSecretFile,
    RegisterUrl,
    Wait,
    flags_of,
)
from portero_py.client.registrar import DRAIN_SECONDS, Registration
from portero_py.control.api.body import MAX_IN_FLIGHT, MAX_WAIT, MAX_WEIGHT
from portero_py.demo import proxy
from portero_py.run import held_signals, supervisor
from portero_py.wire import http1

app: Final = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

certs_app: Final = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(certs_app, name="certs")
app.add_typer(discover.app, name="discover")

#: The base of all errors about flags; click's or Typer's own, as the version of Typer has it.
_UsageError: Final[type[Exception]] = typer.BadParameter.__mro__[1]


def _option(help_text: str, metavar: str = "TEXT") -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(metavar=metavar, help=help_text, show_default=False)
    return option


_ADDRESS = "ADDR"
ListenAddr = Annotated[list[str] | None, _option("Serve here; repeatable. Default [::]:443.", _ADDRESS)]
RegisterAddr = Annotated[str | None, _option("Registration API. Default 127.0.0.1:18080.", _ADDRESS)]
HttpAddr = Annotated[str | None, _option("Redirect plain HTTP from here, e.g. [::]:80.", _ADDRESS)]
AcmeUpstream = Annotated[str | None, _option("Who answers ACME challenges on --http-addr.", _ADDRESS)]
TlsCertDir = Annotated[str | None, _option("Certificates. Default /etc/portero/certs.", "DIR")]
TlsMinVersion = Annotated[str | None, _option("Lowest TLS version: 1.2 (default) or 1.3.", "VERSION")]
NoTls = Annotated[bool, typer.Option("--no-tls", help="Serve plain HTTP.", show_default=False)]
AcmeDomain = Annotated[
    list[str] | None, _option("Get a certificate for these names; repeatable.", "NAME[,NAME...]")
]
AcmeOnRegister = Annotated[
    list[str] | None, _option("And for services that register and match; repeatable.", "PATTERN")
]
AcmeEmail = Annotated[str | None, _option("Whom the CA tells about problems.", "ADDRESS")]
AcmeDirectory = Annotated[str | None, _option("Which CA. Default Let's Encrypt; or staging.", "URL")]
AcmeCaFile = Annotated[str | None, _option("Whom to trust for the CA's own https.", "FILE")]
AcmeChallenge = Annotated[str | None, _option("auto (default), tls-alpn-01, http-01 or dns-01.", "TYPE")]
AcmeEabKid = Annotated[str | None, _option("The account's number with a CA that wants one.", "KID")]
AcmeEabHmac = Annotated[str | None, _option("The key that belongs to it, base64url.", "KEY")]
AcmeEabHmacFile = Annotated[str | None, _option("A file that holds it.", "FILE")]
AcmeAgreeTos = Annotated[
    bool, typer.Option("--acme-agree-tos", help="Agree to the CA's terms of service.", show_default=False)
]
AcmeDnsHook = Annotated[str | None, _option("Makes dns-01's records: PROGRAM ARG... and more.", "COMMAND")]
AcmeDnsServer = Annotated[str | None, _option("Or: send updates (RFC 2136) there.", _ADDRESS)]
AcmeDnsZone = Annotated[str | None, _option("For this zone. Default: found by SOA.", "NAME")]
AcmeDnsTsigName = Annotated[str | None, _option("Signed with the key of this name.", "NAME")]
AcmeDnsTsigSecret = Annotated[str | None, _option("The key, base64.", "KEY")]
AcmeDnsTsigSecretFile = Annotated[str | None, _option("A file that holds it.", "FILE")]
AcmeDnsTsigAlgorithm = Annotated[str | None, _option("Default hmac-sha256.", "NAME")]
AcmeDnsResolver = Annotated[
    list[str] | None, _option("Looks names up, instead of the system's; repeatable.", "IP:PORT")
]
AcmeDnsCheck = Annotated[
    list[str] | None, _option("Must have the record, instead of the zone's servers; repeatable.", "IP:PORT")
]
JwtHmacKey = Annotated[str | None, _option("The key that signs tokens, taken as it is.", "KEY")]
JwtHmacKeyFile = Annotated[str | None, _option("A file that holds it.", "FILE")]
JwtNamedKey = Annotated[list[str] | None, _option("One more key and its kid; repeatable.", "KID=KEY")]
JwtNamedKeyFile = Annotated[str | None, _option("A file with one KID=KEY a line.", "FILE")]
JwtAudience = Annotated[str | None, _option("The aud that tokens must have.")]
JwtIssuer = Annotated[str | None, _option("The iss that tokens must have.")]
BackendCidr = Annotated[list[str] | None, _option("Networks that may register; repeatable.", "CIDR")]
TrustedProxy = Annotated[
    list[str] | None, _option("Networks whose X-Forwarded-* are believed; repeatable.", "CIDR")
]
DefaultService = Annotated[str | None, _option("Takes requests for unknown hosts.", "NAME")]
UpstreamTlsVerify = Annotated[
    bool,
    typer.Option(
        "--upstream-tls-verify", help="Check the certificates of unpinned backends.", show_default=False
    ),
]
UpstreamCaFile = Annotated[
    str | None, _option("Whom to trust for that, instead of the system's CAs.", "FILE")
]
Workers = Annotated[str | None, _option("Data-plane processes, or auto: one a core. Default 1.", "N")]
StateDir = Annotated[str | None, _option("Where state that outlives a restart is kept.", "DIR")]
AccessLog = Annotated[str | None, _option("json (default), text or off.", "STYLE")]
LogLevel = Annotated[str | None, _option("error, warn, info (default) or debug.", "LEVEL")]
ConfigFile = Annotated[str | None, _option("A TOML file; flags and variables go before it.", "FILE")]
Check = Annotated[
    bool,
    typer.Option("--check", help="Check all of this and the certificates, then exit.", show_default=False),
]

JwtKid = Annotated[str | None, _option("The kid of the key that signs.", "KID")]
ServiceName = Annotated[str, typer.Option("--service", metavar="NAME", help="The host name to serve.")]
Host = Annotated[str, typer.Option("--host", metavar="IP", help="The backend's address.")]
Port = Annotated[int, typer.Option("--port", metavar="PORT", min=1, max=65535, help="The backend's port.")]
Ttl = Annotated[int, typer.Option("--ttl", metavar="SECONDS", min=1, max=86400, help="The lease's length.")]
UseTls = Annotated[bool, typer.Option("--use-tls", help="The backend speaks TLS.", show_default=False)]
Weight = Annotated[
    int, typer.Option("--weight", metavar="N", min=1, max=MAX_WEIGHT, help="Its share of the requests.")
]
Fingerprint = Annotated[
    str, typer.Option("--tls-fingerprint", metavar="HEX", help="SHA-256 of its certificate, to pin it.")
]
HealthPath = Annotated[
    str, typer.Option("--health-path", metavar="PATH", help="Where it says that it is well, by 2xx.")
]
MaxInFlight = Annotated[
    int,
    typer.Option(
        "--max-in-flight",
        metavar="N",
        min=0,
        max=MAX_IN_FLIGHT,
        help="Requests at a time. Default: no limit.",
    ),
]


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    listen_addr: ListenAddr = None,
    register_addr: RegisterAddr = None,
    tls_cert_dir: TlsCertDir = None,
    tls_min_version: TlsMinVersion = None,
    no_tls: NoTls = False,
    register_secret: RegisterSecret = None,
    register_secret_file: RegisterSecretFile = None,
    jwt_hmac_key: JwtHmacKey = None,
    jwt_hmac_key_file: JwtHmacKeyFile = None,
    jwt_named_key: JwtNamedKey = None,
    jwt_named_key_file: JwtNamedKeyFile = None,
    jwt_audience: JwtAudience = None,
    jwt_issuer: JwtIssuer = None,
    backend_cidr: BackendCidr = None,
    http_addr: HttpAddr = None,
    acme_upstream: AcmeUpstream = None,
    acme_domain: AcmeDomain = None,
    acme_on_register: AcmeOnRegister = None,
    acme_email: AcmeEmail = None,
    acme_directory: AcmeDirectory = None,
    acme_ca_file: AcmeCaFile = None,
    acme_challenge: AcmeChallenge = None,
    acme_eab_kid: AcmeEabKid = None,
    acme_eab_hmac: AcmeEabHmac = None,
    acme_eab_hmac_file: AcmeEabHmacFile = None,
    acme_agree_tos: AcmeAgreeTos = False,
    acme_dns_hook: AcmeDnsHook = None,
    acme_dns_server: AcmeDnsServer = None,
    acme_dns_zone: AcmeDnsZone = None,
    acme_dns_tsig_name: AcmeDnsTsigName = None,
    acme_dns_tsig_secret: AcmeDnsTsigSecret = None,
    acme_dns_tsig_secret_file: AcmeDnsTsigSecretFile = None,
    acme_dns_tsig_algorithm: AcmeDnsTsigAlgorithm = None,
    acme_dns_resolver: AcmeDnsResolver = None,
    acme_dns_check: AcmeDnsCheck = None,
    trusted_proxy: TrustedProxy = None,
    default_service: DefaultService = None,
    upstream_tls_verify: UpstreamTlsVerify = False,
    upstream_ca_file: UpstreamCaFile = None,
    workers: Workers = None,
    state_dir: StateDir = None,
    access_log: AccessLog = None,
    log: LogLevel = None,
    config: ConfigFile = None,
    check: Check = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.", show_default=False)] = False,
) -> None:
    """The reverse proxy that backends join by themselves. Without a command it runs.

    Every flag has a variable: --listen-addr is PORTERO_LISTEN_ADDR.
    """
    if version:
        typer.echo(f"portero-py {__version__}{'' if http1.__file__.endswith('.py') else ' (compiled)'}")
        raise typer.Exit
    flags = flags_of(ctx)
    if ctx.invoked_subcommand is not None or check:
        held_signals.let_go()  # only the proxy wants to say itself when it heeds them
    if ctx.invoked_subcommand is not None:
        backends.refuse_flags_before(ctx.invoked_subcommand, flags)
    elif check:
        raise typer.Exit(backends.check(flags, os.environ))
    else:
        raise typer.Exit(supervisor.run(flags, os.environ))


@app.command(name="demo")
def demo_command(
    directory: Annotated[str, _option("Keep the certificates here. Default: a temporary one.", "DIR")] = "",
) -> None:
    """Try everything at once: certificates, two backends, the proxy, and the curl lines to type."""
    raise typer.Exit(proxy.run(directory))


@app.command()
def token(
    ctx: typer.Context,
    service: ServiceName,
    ttl: Ttl = 300,
    jwt_hmac_key: JwtHmacKey = None,
    jwt_hmac_key_file: JwtHmacKeyFile = None,
    jwt_kid: JwtKid = None,
    jwt_audience: JwtAudience = None,
    jwt_issuer: JwtIssuer = None,
) -> None:
    """Print a token with which a backend of one service may register."""
    typer.echo(backends.token(flags_of(ctx), os.environ, service, ttl))


@app.command()
def register(
    ctx: typer.Context,
    service: ServiceName,
    host: Host,
    port: Port,
    ttl: Ttl = 60,
    use_tls: UseTls = False,
    instance_id: InstanceId = "",
    weight: Weight = 1,
    tls_fingerprint: Fingerprint = "",
    health_path: HealthPath = "",
    max_in_flight: MaxInFlight = 0,
    register_url: RegisterUrl = None,
    register_secret: RegisterSecret = None,
    register_secret_file: RegisterSecretFile = None,
    jwt_hmac_key: JwtHmacKey = None,
    jwt_hmac_key_file: JwtHmacKeyFile = None,
    jwt_kid: JwtKid = None,
    jwt_audience: JwtAudience = None,
    jwt_issuer: JwtIssuer = None,
    as_json: AsJson = False,
) -> None:
    """Register a backend once, or renew its lease."""
    del as_json  # it never was anything else
    backend = Registration(
        service, host, port, ttl, use_tls, instance_id, weight, tls_fingerprint, health_path, max_in_flight
    )
    typer.echo(backends.register(flags_of(ctx), os.environ, backend))


@app.command()
def deregister(
    ctx: typer.Context,
    service: ServiceName,
    host: AnyHost = "",
    port: AnyPort = 0,
    instance_id: InstanceId = "",
    wait: Wait = 0.0,
    register_url: RegisterUrl = None,
    register_secret: RegisterSecret = None,
    register_secret_file: RegisterSecretFile = None,
    jwt_hmac_key: JwtHmacKey = None,
    jwt_hmac_key_file: JwtHmacKeyFile = None,
    jwt_kid: JwtKid = None,
    jwt_audience: JwtAudience = None,
    jwt_issuer: JwtIssuer = None,
    as_json: AsJson = False,
) -> None:
    """End a backend's lease: by its --instance-id, or by its --host and --port."""
    del as_json  # it never was anything else
    said, status = backends.deregister(flags_of(ctx), os.environ, service, host, port, instance_id, wait)
    typer.echo(said)
    raise typer.Exit(status)


@app.command()
def agent(
    ctx: typer.Context,
    service: ServiceName,
    host: Host,
    port: Port,
    ttl: Ttl = 60,
    use_tls: UseTls = False,
    instance_id: InstanceId = "",
    weight: Weight = 1,
    tls_fingerprint: Fingerprint = "",
    health_path: HealthPath = "",
    max_in_flight: MaxInFlight = 0,
    register_url: RegisterUrl = None,
    register_secret: RegisterSecret = None,
    register_secret_file: RegisterSecretFile = None,
    jwt_hmac_key: JwtHmacKey = None,
    jwt_hmac_key_file: JwtHmacKeyFile = None,
    jwt_kid: JwtKid = None,
    jwt_audience: JwtAudience = None,
    jwt_issuer: JwtIssuer = None,
    drain: Annotated[
        float,
        typer.Option(
            "--drain",
            metavar="SECONDS",
            min=0,
            max=MAX_WAIT,
            help="At the end, wait so long for its requests.",
        ),
    ] = DRAIN_SECONDS,
    log: LogLevel = None,
) -> None:
    """Keep a backend's lease renewed until SIGTERM or Ctrl-C, then deregister and drain it."""
    backend = Registration(
        service, host, port, ttl, use_tls, instance_id, weight, tls_fingerprint, health_path, max_in_flight
    )
    backends.agent(flags_of(ctx), os.environ, backend, drain)


@certs_app.callback(invoke_without_command=True)
def certs_served(
    ctx: typer.Context,
    tls_cert_dir: TlsCertDir = None,
    state_dir: StateDir = None,
    acme_domain: AcmeDomain = None,
    acme_directory: AcmeDirectory = None,
    config: ConfigFile = None,
) -> None:
    """List the certificates: names, expiry, days left, issuer, file or ACME, next renewal, last error."""
    if ctx.invoked_subcommand is not None:
        backends.refuse_flags_before(ctx.invoked_subcommand, flags_of(ctx))
    else:
        raise typer.Exit(certs.certs(flags_of(ctx), os.environ))


@certs_app.command(name="check")
def certs_check(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A host name that clients ask for.")],
    listen_addr: ListenAddr = None,
    tls_cert_dir: TlsCertDir = None,
    state_dir: StateDir = None,
    http_addr: HttpAddr = None,
    acme_domain: AcmeDomain = None,
    acme_on_register: AcmeOnRegister = None,
    acme_directory: AcmeDirectory = None,
    acme_challenge: AcmeChallenge = None,
    acme_dns_hook: AcmeDnsHook = None,
    acme_dns_server: AcmeDnsServer = None,
    acme_dns_zone: AcmeDnsZone = None,
    acme_dns_tsig_name: AcmeDnsTsigName = None,
    acme_dns_tsig_secret: AcmeDnsTsigSecret = None,
    acme_dns_tsig_secret_file: AcmeDnsTsigSecretFile = None,
    acme_dns_tsig_algorithm: AcmeDnsTsigAlgorithm = None,
    acme_dns_resolver: AcmeDnsResolver = None,
    acme_dns_check: AcmeDnsCheck = None,
    config: ConfigFile = None,
) -> None:
    """Examine one name: key, names, expiry, chain, ACME and its challenge, and what the listener presents."""
    raise typer.Exit(certs.check(flags_of(ctx), os.environ, name))


@certs_app.command(name="rollover")
def certs_rollover(
    ctx: typer.Context,
    state_dir: StateDir = None,
    acme_directory: AcmeDirectory = None,
    acme_ca_file: AcmeCaFile = None,
    config: ConfigFile = None,
) -> None:
    """Give the ACME account another key."""
    typer.echo(certs.rollover(flags_of(ctx), os.environ))


@certs_app.command(name="revoke")
def certs_revoke(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The certificate's folder.")],
    state_dir: StateDir = None,
    acme_directory: AcmeDirectory = None,
    acme_ca_file: AcmeCaFile = None,
    config: ConfigFile = None,
) -> None:
    """Revoke a certificate that ACME brought; a running portero replaces it."""
    typer.echo(certs.revoke(flags_of(ctx), os.environ, name))


@app.command()
def explain(
    ctx: typer.Context,
    url: Annotated[str, typer.Argument(metavar="URL", help="What a client would ask for.")],
    register_url: RegisterUrl = None,
    register_secret: RegisterSecret = None,
    register_secret_file: RegisterSecretFile = None,
    as_json: AsJson = False,
) -> None:
    """Ask the running proxy which service and which backends a URL reaches."""
    raise typer.Exit(backends.explain(flags_of(ctx), os.environ, url, as_json=as_json))


for verb, help_text in actions.OF_BACKENDS.items():
    app.command(verb, help=help_text)(actions.change_backends)
for action in (actions.pause, actions.stop, actions.resume):
    app.command()(action)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit status."""
    return outcome.status_of(lambda: _run(arguments))


# Private


def _run(arguments: Sequence[str]) -> int:
    try:
        status = app(list(arguments), prog_name="portero-py", standalone_mode=False)
    except _UsageError as error:
        return outcome.complain(getattr(error, "format_message", error.__str__)(), 2)
    except typer.Abort:
        return 130
    return status if isinstance(status, int) else 0
