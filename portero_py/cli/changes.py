"""What `--check` says of services and routes: what the file holds, and what it would change.

What runs is asked through its API (GET /backends). Backends that registered by themselves are none of the
file's business; names are compared as names, whatever addresses they have just now. All but `unresolved` is
pure.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Final

from portero_py.config.model import Config, FixedBackend, FixedService
from portero_py.control.api.backends import said_policy, said_route
from portero_py.control.providers import static
from portero_py.core.policies import DEFAULTS

#: Seconds that all look-ups may take, and the most at a time.
PATIENCE: Final = 5.0
_MOST_AT_ONCE: Final = 50
_STATIC: Final = " (static)"


def found(config: Config) -> list[str]:
    """What the file holds, in one line each."""
    if not (config.services or config.routes):
        return []
    backends = sum(len(service.backends) for service in config.services)
    return [f"services: {len(config.services)} with {backends} backend(s), {len(config.routes)} route(s)"]


def warnings(config: Config) -> list[str]:
    """What may well be meant, and may be a slip: routes to services that the file has not."""
    known = {service.name for service in config.services}
    return [
        f"route {route.host}{route.path} leads to {route.service}, which is no service of this file: "
        "it is one as soon as a backend registers for it"
        for route in config.routes
        if route.service and route.service not in known
    ]


async def unresolved(config: Config) -> list[str]:
    """The names of backends that cannot be looked up from here, just now."""
    turn = asyncio.Semaphore(_MOST_AT_ONCE)
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + PATIENCE

    async def one(name: str) -> str:
        async with turn:
            if loop.time() >= ends_at:
                return f"backend {name} was not looked up: there was no time left for it"
            try:
                async with asyncio.timeout_at(ends_at):
                    await static.resolve(name)
            except TimeoutError:
                return f"backend {name} cannot be looked up now: no answer within {PATIENCE:g} s"
            except (OSError, UnicodeError) as error:
                why = getattr(error, "strerror", None) or error
                return f"backend {name} cannot be looked up now: {why}"
        return ""

    names = dict.fromkeys(
        backend.address.host
        for service in config.services
        for backend in service.backends
        if not static.is_address(backend.address.host)
    )
    return [said for said in await asyncio.gather(*map(one, names)) if said]


def changes(config: Config, listing: Mapping[str, Any]) -> list[str]:
    """What a running proxy with this `listing` would do differently, one line each."""
    lines = []
    running = {each["service_name"]: each for each in listing["services"]}
    wanted = {service.name: service for service in config.services}
    for name, service in wanted.items():
        now = running.get(name, {"policy": None, "backends": []})
        if name not in running:
            lines.append(f"service {name} is new")
        lines += _policy_changes(service, now["policy"])
        lines += _backend_changes(service, now["backends"])
    for name, now in running.items():
        if name not in wanted:
            gone = FixedService(name)
            lines += [*_policy_changes(gone, now["policy"]), *_backend_changes(gone, now["backends"])]
    lines += _route_changes([said_route(route) for route in config.routes], listing.get("routes", []))
    default, former = config.proxy.default_service, listing.get("default_service", "")
    if default != former:
        lines.append(f"default service: {former or 'none'} -> {default or 'none'}")
    return lines


# Private


def _policy_changes(service: FixedService, now: Mapping[str, Any] | None) -> list[str]:
    # As they arrive: a tuple is a list in JSON.
    policy = json.loads(json.dumps({} if service.policy == DEFAULTS else said_policy(service.policy)))
    former = now or {}
    return [
        f"service {service.name}: {key}: {_said(former.get(key))} -> {_said(policy.get(key))}"
        for key in {**former, **policy}
        if former.get(key) != policy.get(key)
    ]


def _said(value: object) -> str:
    if value is None:
        return "default"
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _backend_changes(service: FixedService, now: list[Mapping[str, Any]]) -> list[str]:
    former: dict[
        str, str | None
    ] = {}  # what the file would call it -> its terms; None: those of another source
    for backend in now:
        for instance_id in (backend["instance_id"], *backend.get("also", [])):
            if instance_id.endswith(_STATIC):
                name = instance_id.removesuffix(_STATIC).partition("/")[0]
                is_its_own = instance_id == backend["instance_id"]
                former[name] = _running_terms(backend) if is_its_own else None
    wanted = {str(backend.address): _terms(service, backend) for backend in service.backends}
    lines = []
    for name, terms in wanted.items():
        if name not in former:
            lines.append(f"service {service.name}: backend {name} comes ({terms})")
        elif former[name] is not None and former[name] != terms:
            lines.append(f"service {service.name}: backend {name}: {former[name]} -> {terms}")
    lines += [f"service {service.name}: backend {name} goes" for name in former if name not in wanted]
    return lines


def _terms(service: FixedService, backend: FixedBackend) -> str:
    return _terms_said(
        backend.use_tls,
        backend.weight,
        backend.health_path or service.policy.health_path,
        backend.max_in_flight or service.policy.max_in_flight,
        backend.tls_fingerprint,
    )


def _running_terms(backend: Mapping[str, Any]) -> str:
    return _terms_said(
        backend["use_tls"],
        backend["weight"],
        backend["health_path"],
        backend["max_in_flight"],
        backend.get("tls_fingerprint", ""),
    )


def _terms_said(use_tls: bool, weight: int, health_path: str, max_in_flight: int, fingerprint: str) -> str:
    said = ["https" if use_tls else "http", f"weight {weight}"]
    said += [f"health path {health_path}"] if health_path else []
    said += [f"at most {max_in_flight} at a time"] if max_in_flight else []
    said += [f"pinned {fingerprint[:12]}"] if fingerprint else []
    return ", ".join(said)


def _route_changes(wanted: list[dict[str, Any]], now: list[Mapping[str, Any]]) -> list[str]:
    new = {(each["host"], each["path"]): each for each in wanted}
    old = {(each["host"], each["path"]): dict(each) for each in now}
    lines = []
    for key, route in new.items():
        if key not in old:
            lines.append(f"route {''.join(key)} comes: {_target(route)}")
        elif old[key] != route:
            lines.append(f"route {''.join(key)}: {_target(old[key])} -> {_target(route)}")
    return lines + [f"route {''.join(key)} goes" for key in old if key not in new]


def _target(route: Mapping[str, Any]) -> str:
    if "redirect" in route:
        return f"{route['status']} to {route['redirect']}"
    return f"service {route['service']}{', path stripped' if route['strip_path'] else ''}"
