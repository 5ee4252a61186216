"""What the subcommands do, apart from running the proxy: from flags to text or an exit status.

The ones that speak to a running proxy take secrets from flags and variables as the proxy itself does, so that
`portero-py register` beside a running proxy needs no more than the same environment file.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import aiohttp

from portero_py.cli import certs
from portero_py.client.agent import keep_registered
from portero_py.client.registrar import Api, Registrar, Registration
from portero_py.config import sources
from portero_py.config.values import is_url, shown
from portero_py.core.auth import sign_token
from portero_py.core.model import Service
from portero_py.core.router import Router
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import ConfigError, PorteroUnreachable
from portero_py.run import logs, preflight
from portero_py.run.sockets import rehearse

if TYPE_CHECKING:
    from portero_py.config.sources import Environ, Flags

DEFAULT_URL: Final = "http://127.0.0.1:18080"


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
        url=_url(flags, environ),
        secret=_secret(flags, environ),
        hmac_key=key,
        kid=kid,
        audience=_read(flags, environ, "jwt-audience"),
        issuer=_read(flags, environ, "jwt-issuer"),
    )


def register(flags: Flags, environ: Environ, backend: Registration) -> str:
    """Register once; the API's answer."""
    _require_text(backend)
    return json.dumps(asyncio.run(_once("register", api(flags, environ), backend)))


def deregister(flags: Flags, environ: Environ, service: str, host: str, port: int, instance_id: str) -> str:
    """End a lease; the API's answer."""
    if not instance_id and not (host and port):
        raise ConfigError("deregister needs --instance-id, or --host and --port")
    backend = Registration(service, host, port, instance_id=instance_id)
    _require_text(backend)
    return json.dumps(asyncio.run(_once("deregister", api(flags, environ), backend)))


def agent(flags: Flags, environ: Environ, backend: Registration) -> None:
    """Keep `backend` registered until SIGTERM or SIGINT."""
    _require_text(backend)
    logs.set_up(sources.read_one("log", flags, environ) or "info", environ)
    asyncio.run(keep_registered(api(flags, environ), backend))


def explain(flags: Flags, environ: Environ, url: str) -> int:
    """Print which service and backends a URL reaches; 0 when one would take the request, else 1."""
    try:
        netloc = urlsplit(url if "//" in url else f"//{url}").netloc
    except ValueError as error:  # "//[x"
        raise ConfigError(f"{shown(url)} is no URL: {error}") from None
    if not netloc:
        raise ConfigError(f"{shown(url)} names no host")
    listing = asyncio.run(_backends(_url(flags, environ), _secret(flags, environ)))
    services = {each["service_name"]: each for each in listing["services"]}
    table = RoutingTable(
        0, {name: Service(name, ()) for name in services}, listing.get("default_service", "")
    )
    found = Router().route(netloc.rpartition("@")[2].encode("ascii", "replace"), table)
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


def _require_text(backend: Registration) -> None:
    """Raises `ConfigError` for what cannot be sent: a shell passes any bytes on, JSON does not."""
    for field in fields(backend):
        value = getattr(backend, field.name)
        if isinstance(value, str) and not value.isprintable():
            flag = field.name.removesuffix("_name").replace("_", "-")
            raise ConfigError(f"--{flag}: {shown(value)} is no text, or holds control characters")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


async def _once(verb: str, where: Api, backend: Registration) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session:
        registrar = Registrar(where, backend, session)
        return await (registrar.register() if verb == "register" else registrar.deregister())


async def _backends(url: str, secret: str) -> dict[str, Any]:
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
            session.get(
                f"{url}/backends", headers={"X-Register-Secret": secret}, allow_redirects=False
            ) as response,
        ):
            if response.status != 200:
                raise PorteroUnreachable(f"{url}/backends answered {response.status}")
            listing: dict[str, Any] = await response.json()
            return listing
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise PorteroUnreachable(f"{url}: {error or 'no answer in time'}") from None


def _url(flags: Flags, environ: Environ) -> str:
    url = str(flags.get("register-url") or environ.get("PORTERO_REGISTER_URL") or DEFAULT_URL)
    if not url.isprintable() or not is_url(url, "http", "https"):
        raise ConfigError(f"--register-url: {shown(url)} is no http:// or https:// URL")
    return url.rstrip("/")


def _secret(flags: Flags, environ: Environ) -> str:
    secret = _read(flags, environ, "register-secret")
    if not secret:
        raise ConfigError(preflight.missing("register-secret"))
    return secret


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
