"""What --check says of services and routes, and of what a running proxy would do differently."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from portero_py.cli import changes
from portero_py.config.model import Address, Config, FixedBackend, FixedService, Proxy
from portero_py.control.api.backends import said_policy, said_route
from portero_py.control.providers import static
from portero_py.core.policies import BasicAuth, RateLimit, ServicePolicy
from portero_py.core.routes import Route

ONE = FixedBackend(Address("10.0.0.1", 80))
NAMED = FixedBackend(Address("app.internal", 80))
POLICY = ServicePolicy(max_in_flight=5, rate_limits=(RateLimit(5),))
CONFIG = Config(
    services=(FixedService("app.example", (ONE, NAMED), POLICY), FixedService("*.example")),
    routes=(Route("www.example", "/api", "app.example", True), Route("old.example", redirect="https://x")),
)


def running(instance_id: str, **fields: Any) -> dict[str, Any]:
    terms = {"use_tls": False, "weight": 1, "health_path": "", "max_in_flight": 5, "tls_fingerprint": ""}
    return {"instance_id": instance_id, "also": [], **terms, **fields}


def listing() -> dict[str, Any]:
    """What a proxy says that runs with CONFIG."""
    return {
        "default_service": "",
        "routes": [said_route(route) for route in CONFIG.routes],
        "services": [
            {
                "service_name": "app.example",
                "policy": said_policy(POLICY),
                "backends": [
                    running("10.0.0.1:80 (static)"),
                    running("app.internal:80/10.0.0.7 (static)"),
                    running("app.internal:80/fd00::7 (static)"),
                    running("somebody"),  # who registered is none of the file's business
                ],
            },
            {"service_name": "*.example", "policy": None, "backends": []},
            {"service_name": "registered.example", "policy": None, "backends": [running("one")]},
        ],
    }


def test_the_same_file_would_change_nothing() -> None:
    assert changes.changes(CONFIG, listing()) == []


def test_what_would_change_is_named() -> None:
    policy = replace(POLICY, max_in_flight=6, rate_limits=(), health_path="/up")
    other = FixedBackend(Address("fd00::1", 81))
    config = Config(
        proxy=Proxy(default_service="new.example"),
        services=(
            FixedService("app.example", (replace(ONE, weight=3), other), policy),
            FixedService("new.example", (replace(NAMED, use_tls=True, tls_fingerprint="ab" * 32),)),
        ),
        routes=(Route("www.example", "/api", "new.example"), Route("b.example", service="new.example")),
    )
    assert changes.changes(config, listing()) == [
        "service app.example: max_in_flight: 5 -> 6",
        'service app.example: rate_limits: [{"requests": 5, "seconds": 1.0, "key": "client"}] -> default',
        "service app.example: health_path: default -> /up",
        (
            "service app.example: backend 10.0.0.1:80: http, weight 1, at most 5 at a time -> "
            "http, weight 3, health path /up, at most 6 at a time"
        ),
        (
            "service app.example: backend [fd00::1]:81 comes "
            "(http, weight 1, health path /up, at most 6 at a time)"
        ),
        "service app.example: backend app.internal:80 goes",
        "service new.example is new",
        "service new.example: backend app.internal:80 comes (https, weight 1, pinned abababababab)",
        "route www.example/api: service app.example, path stripped -> service new.example",
        "route b.example comes: service new.example",
        "route old.example goes",
        "default service: none -> new.example",
    ]


def test_an_empty_file_takes_everything_of_the_file_away() -> None:
    assert changes.changes(Config(), listing()) == [
        "service app.example: max_in_flight: 5 -> default",
        'service app.example: rate_limits: [{"requests": 5, "seconds": 1.0, "key": "client"}] -> default',
        "service app.example: backend 10.0.0.1:80 goes",
        "service app.example: backend app.internal:80 goes",
        "route www.example/api goes",
        "route old.example goes",
    ]


def test_a_fixed_backend_that_registered_first_is_known_as_fixed_too() -> None:
    known = listing()
    known["services"][0]["backends"][0] = running("me", weight=9, also=["10.0.0.1:80 (static)"])
    assert changes.changes(CONFIG, known) == []


def test_another_password_is_a_change_without_its_hash() -> None:
    hashes = [f"$2b$10${letter * 21}e{letter * 31}" for letter in "ab"]
    with_users = [ServicePolicy(basic_auth=BasicAuth((("ann", hashed),))) for hashed in hashes]
    known = listing()
    known["services"][1]["policy"] = said_policy(with_users[0])
    config = replace(CONFIG, services=(CONFIG.services[0], FixedService("*.example", (), with_users[1])))
    [line] = changes.changes(config, known)
    assert line.startswith("service *.example: basic_auth: ")
    assert not any(hashed in line for hashed in hashes)


def test_an_older_proxy_that_says_nothing_of_policies_can_be_compared_with() -> None:
    old: dict[str, Any] = {"services": [{"service_name": "app.example", "backends": [], "policy": None}]}
    assert "service *.example is new" in changes.changes(CONFIG, old)


def test_what_was_found_and_what_may_be_a_slip_is_said() -> None:
    assert changes.found(Config()) == []
    assert changes.found(CONFIG) == ["services: 2 with 2 backend(s), 2 route(s)"]
    assert changes.warnings(CONFIG) == []
    config = replace(CONFIG, routes=(Route("www.example", "/x", "gone.example"),))
    assert changes.warnings(config) == [
        (
            "route www.example/x leads to gone.example, which is no service of this file: "
            "it is one as soon as a backend registers for it"
        )
    ]


async def test_all_look_ups_together_have_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def resolve(name: str) -> list[str]:
        asked.append(name)
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(static, "resolve", resolve)
    monkeypatch.setattr(changes, "PATIENCE", 0.2)
    backends = tuple(FixedBackend(Address(f"n{number}.internal", 80)) for number in range(500))
    said = await changes.unresolved(Config(services=(FixedService("a", backends),)))
    assert len(said) == 500
    assert len(asked) <= 50  # the first ones took all of it


async def test_names_that_do_not_resolve_now_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(name: str) -> list[str]:
        if name == "slow.internal":
            await asyncio.Event().wait()
        if name == "gone.internal":
            raise OSError(-2, "Name or service not known")
        return ["10.0.0.1"]

    monkeypatch.setattr(static, "resolve", resolve)
    monkeypatch.setattr(changes, "PATIENCE", 0.01)
    names = ("good.internal", "gone.internal", "slow.internal", "10.0.0.1", "fd00::1")
    backends = tuple(FixedBackend(Address(name, 80)) for name in names)
    assert await changes.unresolved(Config(services=(FixedService("a", backends),))) == [
        "backend gone.internal cannot be looked up now: Name or service not known",
        "backend slow.internal cannot be looked up now: no answer within 0.01 s",
    ]
