"""What is only unwise is said, and nothing is said without a reason."""

from __future__ import annotations

from portero_py.config.model import Config, FixedService, Proxy, Registration, Tls
from portero_py.core.policies import ServicePolicy, Sticky
from portero_py.core.routes import Route
from portero_py.run import preflight

SECRET = "0123456789abcdef" * 4


def warnings(routes: tuple[Route, ...], **cookies: Sticky) -> list[str]:
    """About services by the first letter of their hosts."""
    services = tuple(
        FixedService(f"{name}.example", policy=ServicePolicy(sticky=sticky))
        for name, sticky in cookies.items()
    )
    config = Config(
        proxy=Proxy(upstream_tls_verify=True),
        registration=Registration(secret=SECRET, hmac_keys=(("", SECRET),)),
        tls=Tls(enabled=False),
        services=services,
        routes=routes,
    )
    return [warning for warning in preflight.require(config) if "sticky" in warning]


def test_services_of_one_host_need_cookies_of_their_own() -> None:
    api = Route("a.example", "/api", "b.example")
    one, other = Sticky("srv"), Sticky("api")
    [warning] = warnings((api,), a=one, b=one)
    assert "a.example and b.example" in warning
    assert "the host a.example and the sticky cookie srv" in warning
    assert warnings((api,), a=one, b=other) == []
    assert warnings((), a=one, b=one) == []
    # One service by two ways is one; an application's own cookie is its own matter.
    assert warnings((Route("a.example", "/x", "a.example"),), a=one) == []
    assert warnings((api,), a=Sticky("srv", "prefix"), b=Sticky("srv", "prefix")) == []
    www = [Route("www.example", path, name) for path, name in (("/x", "a.example"), ("/y", "b.example"))]
    assert len(warnings(tuple(www), a=one, b=one)) == 1
