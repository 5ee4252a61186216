"""Frozen dataclasses <- JSON."""

from __future__ import annotations

import orjson
import pytest

from portero_py.core.policies import (
    DEFAULTS,
    BasicAuth,
    FieldChanges,
    ForwardAuth,
    Maintenance,
    RateLimit,
    ServiceHealth,
    ServicePolicy,
    ServiceTimeouts,
    Sticky,
)
from portero_py.core.routes import Route
from portero_py.feed import records

FULL = ServicePolicy(
    balance="hash",
    hash_on="header:x-user",
    slow_start=30.0,
    sticky=Sticky("portero", "prefix"),
    health_path="/up",
    max_in_flight=100,
    health=ServiceHealth(interval=1.0, statuses=(502, 503)),
    timeouts=ServiceTimeouts(connect=1),
    retries=1,
    body_bytes=0,
    queue_seconds=5,
    queue_length=10,
    allow=("10.0.0.0/8",),
    deny=("10.1.0.0/16", "fd00::/8"),
    rate_limits=(RateLimit(100), RateLimit(1, 60, "header:x-key")),
    basic_auth=BasicAuth((("ann", "$2b$..."), ("bob", "$2b$..."))),
    forward_auth=ForwardAuth("http://127.0.0.1:9091/verify", ("cookie",), ("remote-user",)),
    maintenance=Maintenance("<p>soon</p>"),
    request_headers=FieldChanges(("X-Debug",), (("X-Env", "prod"),), (("Via", "1"),)),
    response_headers=FieldChanges(set=(("Strict-Transport-Security", "max-age=1"),)),
)


@pytest.mark.parametrize("policy", [DEFAULTS, FULL])
def test_what_is_written_comes_back_equal(policy: ServicePolicy) -> None:
    assert records.read(ServicePolicy, orjson.loads(orjson.dumps(policy))) == policy


def test_what_another_version_says_or_leaves_out_harms_nobody() -> None:
    content = {"host": "a.example", "service": "b.example", "colour": "green"}
    assert records.read(Route, content) == Route("a.example", service="b.example")


@pytest.mark.parametrize(
    "content", [None, {"rate_limits": 5}, {"rate_limits": [5]}, {"basic_auth": {"users": [["a"]]}}]
)
def test_what_was_not_written_so_is_refused(content: object) -> None:
    with pytest.raises((TypeError, ValueError, AttributeError)):
        records.read(ServicePolicy, content)
