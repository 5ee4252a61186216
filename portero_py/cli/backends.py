"""What the subcommands do, apart from running the proxy: from flags to text or an exit status.

`actions` has those that change what a running proxy does.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import aiohttp

from portero_py.cli import certs, changes
from portero_py.cli.api import OpenApi, require_text, secret, url
from portero_py.client.agent import keep_registered
from portero_py.client.registrar import Api, Registrar, Registration
from portero_py.config import sources
from portero_py.config.model import Address
from portero_py.config.values import shown
from portero_py.core.auth import sign_token
from portero_py.core.model import Service
from portero_py.core.router import Router
from portero_py.core.routes import Route, Routes
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import AmbiguousPath, ClientError, ConfigError
from portero_py.feed import records
from portero_py.run import logs, preflight
from portero_py.run.sockets import rehearse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from portero_py.config.model import Config
    from portero_py.config.sources import Environ, Flags

#: A URL with its host, not a host with two slashes further on.
_BEGINS_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:)?//")


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
    """Print which route, service and backends a URL reaches; 0 when it would be answered, else 1."""
    try:
        parts = urlsplit(asked if _BEGINS_URL.match(asked) else f"//{asked}")
    except ValueError as error:  # "//[x"
        raise ConfigError(f"{shown(asked)} is no URL: {error}") from None
    netloc = parts.netloc
    if not netloc:
        raise ConfigError(f"{shown(asked)} names no host")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    listing = asyncio.run(_backends(OpenApi(flags, environ)))
    services = {each["service_name"]: each for each in listing["services"]}
    routes = {(each["host"], each["path"]): each for each in listing.get("routes", [])}
    table = RoutingTable(
        0,
        {name: Service(name, ()) for name in services},
        listing.get("default_service", ""),
        routes=Routes(records.read(Route, each) for each in routes.values()),
    )
    authority = netloc.rpartition("@")[2].encode("ascii", "replace")
    router = Router()
    try:
        route = router.find_route(authority, target.encode("ascii", "replace"), table)
    except AmbiguousPath as error:
        _say(json.dumps({"host": netloc, "service": None}) if as_json else f"{netloc}: {error}: 400")
        return 1
    found = router.route(authority, table) if route is None else table.services.get(route.service)
    service = None if found is None else services[found.name]
    is_answered = bool(route is not None and route.redirect) or bool(service and service["backends"])
    if as_json:
        said = {"host": netloc, "service": service}
        _say(json.dumps(said if route is None else {**said, "route": routes[route.host, route.path]}))
    else:
        _explain(netloc, target, route, service)
    return 0 if is_answered else 1


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
    for line in changes.found(config):
        _say(line)
    for warning in (*changes.warnings(config), *asyncio.run(changes.unresolved(config))):
        _say(f"warning: {warning}")
    if config.services or config.routes:
        _compare(flags, environ, config)
    status = certs.show(config) if config.tls.enabled else 0
    _say("this cannot serve" if status else "all is well")
    return status


# Private


def _explain(netloc: str, target: str, route: Route | None, service: Mapping[str, Any] | None) -> None:
    what = netloc
    if route is not None:
        what = f"{netloc}: route {route.host}{route.path}"
        if route.redirect:
            # As the proxy does it (proxy/routing): what $uri stands for begins with one slash.
            _say(f"{what}: {route.status} to {route.redirect.replace('$uri', '/' + target.lstrip('/'))}")
            return
        if route.strip_path:
            left = target[len(route.path.rstrip("/")) :]
            what += f", asked for as {left if left.startswith('/') else f'/{left}'}"
    if service is None:
        _say(f"{what}: no such service: 404")
        return
    backends = service["backends"]
    halted = service["state"] if service.get("state", "serving") != "serving" else ""
    _say(
        f"{what}: service {service['service_name']}{f' ({halted})' if halted else ''}, "
        f"{len(backends)} backend(s){'' if backends else ': 503'}"
    )
    for key, value in (service.get("policy") or {}).items():
        _say(f"  {key}: {json.dumps(value) if isinstance(value, (dict, list)) else value}")
    for each in backends:
        _say("  " + "  ".join(f"{name}={value}" for name, value in each.items() if value != []))


def _compare(flags: Flags, environ: Environ, config: Config) -> None:
    """Print what a portero that runs with the same API and secret would change, when there is one."""
    host = config.registration.listen.host
    local = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    where = environ.get("PORTERO_API") or environ.get("PORTERO_REGISTER_URL")
    api_url = where or f"http://{Address(local, config.registration.listen.port)}"
    given = {**flags, "register-url": api_url, "register-secret": config.registration.secret}
    given["register-secret-file"] = None
    try:
        listing = asyncio.run(_backends(OpenApi(given, {})))
    except ClientError as error:
        _say(f"running: nothing to compare with: {error}")
        return
    lines = changes.changes(config, listing)
    _say(f"running: {len(lines)} change(s) to services and routes")
    for line in lines:
        _say(f"  {line}")


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
