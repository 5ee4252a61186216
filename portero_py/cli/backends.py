"""What the subcommands do, apart from running the proxy: from flags to text or an exit status.

`actions` has those that change what a running proxy does.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp

from portero_py.cli import certs
from portero_py.cli.api import OpenApi, require_text, secret, url
from portero_py.client.agent import keep_registered
from portero_py.client.registrar import Api, Registrar, Registration
from portero_py.config import sources
from portero_py.config.values import shown
from portero_py.core.auth import sign_token
from portero_py.core.model import Service
from portero_py.core.router import Router
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import ConfigError
from portero_py.run import logs, preflight
from portero_py.run.sockets import rehearse

if TYPE_CHECKING:
    from portero_py.config.sources import Environ, Flags


def refuse_flags_before(command: str, flags: Flags) -> None:
    """Raises `ConfigError` for flags of the proxy in front of a command: they would do nothing there."""
    given = [name for name, value in flags.items() if value]
    if given:
        raise ConfigError(f"--{given[0]} stands before {command}: its flags come after it")


def token(flags: Flags, environ: Environ, service: str, ttl: int) -> str:
    """A token for `service`, good for `ttl` seconds."""
    kid, key = _signing_key(flags, environ)
    audience, issuer = _read(flags, environ, "jwt-audience"), _read(flags, environ, "jwt-issuer")
    return sign_token(service, key, kid, ttl, time.time(), audience=audience, issuer=issuer)


def api(flags: Flags, environ: Environ) -> Api:
    """Where the registration API is and what opens it. Raises `ConfigError` when a secret is missing."""
    kid, key = _signing_key(flags, environ)
    return Api(
        url=url(flags, environ),
        secret=secret(flags, environ),
        hmac_key=key,
        kid=kid,
        audience=_read(flags, environ, "jwt-audience"),
        issuer=_read(flags, environ, "jwt-issuer"),
    )


def register(flags: Flags, environ: Environ, backend: Registration) -> str:
    """Register once; the API's answer."""
    require_text(asdict(backend))
    return json.dumps(asyncio.run(_register(api(flags, environ), backend)))


def deregister(
    flags: Flags,
    environ: Environ,
    service: str,
    host: str,
    port: int,
    instance_id: str,
    wait_seconds: float,
) -> tuple[str, int]:
    """End a lease; the API's answer, and 1 when something is in flight there after `wait_seconds`, else 0."""
    if not instance_id and not (host and port):
        raise ConfigError("deregister needs --instance-id, or --host and --port")
    backend = Registration(service, host, port, instance_id=instance_id)
    require_text(asdict(backend))
    answer = asyncio.run(_deregister(api(flags, environ), backend, wait_seconds))
    return json.dumps(answer), 1 if wait_seconds and answer.get("in_flight") else 0


def agent(flags: Flags, environ: Environ, backend: Registration, drain_seconds: float) -> None:
    """Keep `backend` registered until SIGTERM or SIGINT, and wait for what is in flight there."""
    require_text(asdict(backend))
    logs.set_up(sources.read_one("log", flags, environ) or "info", environ)
    asyncio.run(keep_registered(api(flags, environ), backend, drain_seconds=drain_seconds))


def explain(flags: Flags, environ: Environ, asked: str, *, as_json: bool) -> int:
    """Print which service and backends a URL reaches; 0 when one would take the request, else 1."""
    try:
        netloc = urlsplit(asked if "//" in asked else f"//{asked}").netloc
    except ValueError as error:  # "//[x"
        raise ConfigError(f"{shown(asked)} is no URL: {error}") from None
    if not netloc:
        raise ConfigError(f"{shown(asked)} names no host")
    listing = asyncio.run(_backends(OpenApi(flags, environ)))
    services = {each["service_name"]: each for each in listing["services"]}
    table = RoutingTable(
        0, {name: Service(name, ()) for name in services}, listing.get("default_service", "")
    )
    found = Router().route(netloc.rpartition("@")[2].encode("ascii", "replace"), table)
    if as_json:
        _say(json.dumps({"host": netloc, "service": None if found is None else services[found.name]}))
        return 0 if found is not None and services[found.name]["backends"] else 1
    if found is None:
        _say(f"{netloc}: no such service: 404")
        return 1
    backends = services[found.name]["backends"]
    _say(f"{netloc}: service {found.name}, {len(backends)} backend(s){'' if backends else ': 503'}")
    for each in backends:
        _say("  " + "  ".join(f"{name}={value}" for name, value in each.items()))
    return 0 if backends else 1


def check(flags: Flags, environ: Environ) -> int:
    """Check configuration and certificates, and print what was found; 0 when portero could serve, else 2.

    Raises `ConfigError` for the first thing in the configuration that cannot be used.
    """
    config = sources.load(flags, environ)
    warnings = preflight.require(config)
    rehearse(config)
    for warning in warnings:
        _say(f"warning: {warning}")
    _say(f"listen: {', '.join(map(str, config.proxy.listen))}{'' if config.tls.enabled else ' without TLS'}")
    _say(f"registration: {config.registration.listen}, {len(config.registration.hmac_keys)} key(s)")
    if config.plain_http.listen is not None:
        _say(f"plain http: {config.plain_http.listen}")
    if config.state_dir:
        made = "" if Path(config.state_dir).exists() else ", which is missing: the start makes it"
        _say(f"state: {config.state_dir}{made}")
    status = certs.show(config) if config.tls.enabled else 0
    _say("this cannot serve" if status else "all is well")
    return status


# Private


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


async def _register(where: Api, backend: Registration) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session:
        return await Registrar(where, backend, session).register()


async def _deregister(where: Api, backend: Registration, wait_seconds: float) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session:
        return await Registrar(where, backend, session).deregister(wait_seconds)


async def _backends(api: OpenApi) -> dict[str, Any]:
    async with api:
        return await api.backends()


def _signing_key(flags: Flags, environ: Environ) -> tuple[str, str]:
    """(kid or "", key): the one that --jwt-kid names, else the unnamed one, else the first named one."""
    kid = str(flags.get("jwt-kid") or environ.get("PORTERO_JWT_KID") or "")
    named = dict(sources.read_one("jwt-named-key", flags, environ) or ())
    unnamed = _read(flags, environ, "jwt-hmac-key")
    if kid in named:
        return kid, named[kid]
    if unnamed:
        return kid, unnamed
    if kid or not named:
        raise ConfigError(preflight.missing("jwt-hmac-key"))
    return next(iter(named.items()))


def _read(flags: Flags, environ: Environ, flag: str) -> str:
    return str(sources.read_one(flag, flags, environ) or "")
