"""Which service a Host asks for."""

from __future__ import annotations

from random import Random

import pytest

from portero_py.core.model import Service
from portero_py.core.router import Router
from portero_py.core.routing_table import RoutingTable

NAMES = ("app.example", "*.example.com", "www.example.com", "::1", "fallback.example")
TABLE = RoutingTable(1, {name: Service(name, ()) for name in NAMES})
WITH_DEFAULT = RoutingTable(2, TABLE.services, "fallback.example")


def routed(router: Router, authority: bytes, table: RoutingTable = TABLE) -> str | None:
    service = router.route(authority, table)
    return None if service is None else service.name


@pytest.mark.parametrize(
    ("authority", "service"),
    [
        (b"app.example", "app.example"),
        (b"APP.example.:8443", "app.example"),
        (b"[::1]:443", "::1"),
        (b"a.example.com", "*.example.com"),
        (b"A.EXAMPLE.COM:443", "*.example.com"),
        (b"www.example.com", "www.example.com"),
        (b"example.com", None),
        (b"a.b.example.com", None),
        (b"*.example.com", None),
        (b"other.example", None),
        (b"example", None),
        (b"not a host", None),
        (b"", None),
    ],
)
def test_the_exact_name_wins_then_the_wildcard_over_one_label(authority: bytes, service: str | None) -> None:
    router = Router()
    # The second time the answer comes from the memo.
    assert [routed(router, authority), routed(router, authority)] == [service, service]


@pytest.mark.parametrize("authority", [b"other.example", b"not a host", b"", b"a.b.example.com"])
def test_what_nobody_else_takes_goes_to_the_default_service(authority: bytes) -> None:
    router = Router()
    assert [routed(router, authority, WITH_DEFAULT) for _ in range(2)] == ["fallback.example"] * 2


def test_a_name_that_is_known_goes_to_its_own_service_and_not_to_the_default() -> None:
    assert routed(Router(), b"a.example.com", WITH_DEFAULT) == "*.example.com"


def test_the_memo_never_answers_from_an_old_table() -> None:
    router = Router()
    assert routed(router, b"app.example") == "app.example"
    assert routed(router, b"app.example", RoutingTable(2)) is None
    renewed = Service("app.example", ())
    assert router.route(b"app.example", RoutingTable(3, {"app.example": renewed})) is renewed
    assert routed(router, b"www.example.com") == "www.example.com"
    only_wildcard = RoutingTable(4, {"*.example.com": Service("*.example.com", ())})
    assert routed(router, b"www.example.com", only_wildcard) == "*.example.com"


@pytest.mark.parametrize("table", [TABLE, WITH_DEFAULT])
def test_the_memo_answers_as_if_nobody_had_asked_before(table: RoutingTable) -> None:
    random = Random(1)
    pieces = [
        b"app.example",
        b".example.com",
        b"a",
        b"WWW",
        b".",
        b":443",
        b":",
        b"[::1]",
        b"\xff",
        b" ",
        b"*",
    ]
    shared = Router(max_names=20)
    for _ in range(3000):
        authority = b"".join(random.choices(pieces, k=random.randint(0, 3)))
        assert routed(shared, authority, table) == routed(Router(), authority, table), authority


def test_the_memo_is_bounded_and_scanners_do_not_fill_it() -> None:
    router = Router(max_names=10)
    for port in range(100):
        assert routed(router, b"app.example:%d" % port) == "app.example"
        assert routed(router, b"host-%d.invalid" % port) is None
    assert 0 < len(router._names) <= 10
    assert all(authority.startswith(b"app.example") for authority in router._names)
