"""`[[service]]`, `[[route]]` and `include`: what they say, and each fault with its file, line and key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from portero_py.config.files import Seen
from portero_py.config.model import Address, Config, FixedBackend
from portero_py.config.sources import load
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
from portero_py.errors import ConfigError

HASH = "$2b$10$" + "a" * 21 + "e" + "a" * 31


def read(folder: Path, content: str, **included: str) -> Config:
    """The configuration of a file, beside others in `services.d`."""
    (folder / "services.d").mkdir(exist_ok=True)
    for name, text in included.items():
        (folder / "services.d" / f"{name}.toml").write_text(text)
    (folder / "portero.toml").write_text(content)
    return load({"config": str(folder / "portero.toml")}, {})


def refusal(folder: Path, content: str, **included: str) -> str:
    """Why it is refused, with the folder left out."""
    with pytest.raises(ConfigError) as caught:
        read(folder, content, **included)
    return str(caught.value).replace(f"{folder}/", "")


FULL = """
[[service]]
name = "App.Example.com."
backends = [
  "10.0.0.5:8080",
  { address = "[fd00::5]:8443", tls = true, weight = 2, health_path = "/up", max_in_flight = 3,
    tls_fingerprint = "FINGERPRINT", protocol = "http1" },
  "App.Internal:80",
]
balance = "hash"
hash_on = "header:X-User"
slow_start = 30
sticky = { cookie = "portero", mode = "prefix" }
health_path = "/up"
max_in_flight = 100
queue_seconds = 5
queue_length = 7
retries = 2
body_bytes = 10_000_000
allow = ["10.0.0.0/8", "::1"]
deny = "10.1.1.1"
rate_limit = [{ requests = 100, seconds = 0.5, key = "header:X-Key" }, { requests = 1, key = "service" }]

[service.health]
interval = 1
statuses = [503]

[service.timeouts]
connect = 1
upstream_head = 300

[service.basic_auth]
realm = "Team"
users = ["ann:HASH"]

[service.forward_auth]
url = "http://auth.internal/check"
request_headers = ["Cookie"]
response_headers = ["X-User"]
timeout = 2

[service.maintenance]
page = "<p>Soon</p>"
retry_after = 60

[service.request_headers]
set = { "X-Env" = "prod" }
remove = ["X-Debug"]

[service.response_headers]
add = { "Set-Cookie" = ["a=1", "b=2"], X-A = "" }

[[service]]
name = "*.example.org"
""".replace("FINGERPRINT", "AB:" * 31 + "cd").replace("HASH", HASH)


def test_all_that_a_service_may_say_is_read(tmp_path: Path) -> None:
    # TOML has no line ends within inline tables.
    app, wild = read(tmp_path, FULL.replace("max_in_flight = 3,\n   ", "max_in_flight = 3,")).services
    assert app.name == "app.example.com"
    assert app.backends == (
        FixedBackend(Address("10.0.0.5", 8080)),
        FixedBackend(Address("fd00::5", 8443), True, "ab" * 31 + "cd", "http1", 2, "/up", 3),
        FixedBackend(Address("app.internal", 80)),
    )
    assert app.policy == ServicePolicy(
        balance="hash",
        hash_on="header:x-user",
        slow_start=30,
        sticky=Sticky("portero", "prefix"),
        health_path="/up",
        max_in_flight=100,
        health=ServiceHealth(interval=1, statuses=(503,)),
        timeouts=ServiceTimeouts(connect=1, upstream_head=300),
        retries=2,
        body_bytes=10_000_000,
        queue_seconds=5,
        queue_length=7,
        allow=("10.0.0.0/8", "::1/128"),
        deny=("10.1.1.1/32",),
        rate_limits=(RateLimit(100, 0.5, "header:x-key"), RateLimit(1, 1.0, "service")),
        basic_auth=BasicAuth((("ann", HASH),), "Team"),
        forward_auth=ForwardAuth("http://auth.internal/check", ("Cookie",), ("X-User",), 2),
        maintenance=Maintenance("<p>Soon</p>", "text/html; charset=utf-8", 60),
        request_headers=FieldChanges(remove=("X-Debug",), set=(("X-Env", "prod"),)),
        response_headers=FieldChanges(add=(("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"), ("X-A", ""))),
    )
    assert (wild.name, wild.backends, wild.policy) == ("*.example.org", (), DEFAULTS)


def test_routes_are_read(tmp_path: Path) -> None:
    routes = read(
        tmp_path,
        """
        [[route]]
        host = "WWW.example.com"
        path = "/api/"
        service = "app.example.com"
        strip_path = true
        [[route]]
        host = "*.example.com"
        redirect = "https://example.com$uri"
        status = 301
        [[route]]
        host = "www.example.com"
        path = "/"
        redirect = "/home?from=$uri"
        """,
    ).routes
    assert routes == (
        Route("www.example.com", "/api", "app.example.com", True),
        Route("*.example.com", "", "", False, "https://example.com$uri", 301),
        Route("www.example.com", "", "", False, "/home?from=$uri", 308),
    )


def test_included_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        'include = ["services.d/*.toml", "services.d/b.toml"]\n[[service]]\nname = "main"\n',
        b='[[service]]\nname = "b"\n[[route]]\nhost = "x"\nservice = "b"\n',
        a='[[service]]\nname = "a"\n',
    )
    assert [service.name for service in config.services] == ["main", "a", "b"]
    assert [route.host for route in config.routes] == ["x"]


def test_a_pattern_may_match_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, 'include = "none.d/*.toml"').services == ()


def test_files_that_a_service_names_are_beside_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "services.d").mkdir()
    (tmp_path / "services.d" / "users").write_text(f"# those\n\nann:{HASH}\nbob:{HASH}\n")
    (tmp_path / "services.d" / "page.txt").write_text("<soon>\n")
    seen = Seen()
    read(
        tmp_path,
        'include = "services.d/*.toml"',
        app='[[service]]\nname = "a"\nbasic_auth.users_file = "users"\nmaintenance.page_file = "page.txt"\n',
    )
    [service] = load({"config": str(tmp_path / "portero.toml")}, {}, seen).services
    assert service.policy.basic_auth == BasicAuth((("ann", HASH), ("bob", HASH)))
    assert service.policy.maintenance == Maintenance("<soon>\n", "text/plain; charset=utf-8")
    inside = {path.removeprefix(f"{tmp_path}/") for path in seen.paths}
    assert inside == {
        "portero.toml",
        "services.d/*.toml",
        "services.d/app.toml",
        "services.d/users",
        "services.d/page.txt",
    }


def test_what_was_opened_before_a_fault_is_known(tmp_path: Path) -> None:
    refusal(tmp_path, 'include = "services.d/*.toml"', app="[[service]]\nnam = 1\n")
    seen = Seen()
    with pytest.raises(ConfigError):
        load({"config": str(tmp_path / "portero.toml")}, {}, seen)
    assert str(tmp_path / "services.d" / "app.toml") in seen.paths


def test_maintenance_may_be_a_switch(tmp_path: Path) -> None:
    on, off = read(
        tmp_path, '[[service]]\nname="a"\nmaintenance=true\n[[service]]\nname="b"\nmaintenance=false'
    ).services
    assert on.policy.maintenance is not None
    assert on.policy.maintenance.content_type == "text/plain; charset=utf-8"
    assert off.policy == DEFAULTS


SERVICE = '\n[[service]]\nname = "a.example"\n'
ROUTE = '\n[[route]]\nhost = "a.example"\n'
AT_A = 'portero.toml:4: service "a.example": '


@pytest.mark.parametrize(
    ("content", "said"),
    [
        # the shape
        ("service = 1", "portero.toml:1: service: must be written as [[service]]"),
        ("[service]\nname = 1", "portero.toml:1: service: must be written as [[service]]"),
        ("service = [1]", "portero.toml:1: service 1: must be a table of "),
        ("[[service]]\n\n[[service]]\nname = 'b'", "portero.toml:1: service 1: name: is missing"),
        ("[[service]]\nname = 1", "portero.toml:2: service 1: name: must be text, not a number"),
        (
            "[[service]]\nname = 'a b'",
            (
                'portero.toml:2: service "a b": name: "a b" is no service: '
                "use a host name (without a port, in xn-- form), an address or *.example.com"
            ),
        ),
        (SERVICE + "balnce = 1", AT_A + 'balnce: unknown key: the nearest is "balance"'),
        (
            SERVICE + 'sticky = { cooky = "x" }',
            AT_A + 'sticky.cooky: unknown key: the nearest is "cookie"',
        ),
        (SERVICE + '"\\u001b" = 1', AT_A + '"\ufffd": unknown key: the nearest is "'),
        # values
        (
            SERVICE + 'balance = "fastest"',
            AT_A + 'balance: must be round-robin, least-requests, random-two, source or hash, not "fastest"',
        ),
        (SERVICE + 'balance = "hash"', AT_A + 'balance: hash needs hash_on, such as "header:x-user"'),
        (SERVICE + 'hash_on = "path"', AT_A + 'hash_on: needs balance = "hash"'),
        (
            SERVICE + 'hash_on = "query"',
            AT_A + 'hash_on: must be header:NAME, cookie:NAME, path or host, not "query"',
        ),
        (
            SERVICE + "rate_limit = { requests = 0 }",
            AT_A + "rate_limit.requests: must be a whole number from 1 to 1073741824, not 0",
        ),
        (SERVICE + "rate_limit = { seconds = 1 }", AT_A + "rate_limit.requests: is missing"),
        (
            SERVICE + 'rate_limit = [\n  { requests = 1 },\n  { requests = 1, key = "ip" },\n]',
            (
                'portero.toml:6: service "a.example": rate_limit[1].key: '
                'must be client, service or header:NAME, not "ip"'
            ),
        ),
        (
            SERVICE + '[service.rate_limit]\nrequests = "x"',
            (
                'portero.toml:5: service "a.example": rate_limit.requests: '
                'must be a whole number from 1 to 1073741824, not "x"'
            ),
        ),
        (
            SERVICE + 'rate_limit = { requests = 1, key = "header:X-Forwarded-For" }',
            AT_A + "rate_limit.key: X-Forwarded-For is no key: it does not go on to backends as clients ",
        ),
        (SERVICE + 'sticky = "x"', AT_A + "sticky: must be a table of cookie or mode, not text"),
        (
            SERVICE + 'sticky = { cookie = "a;b" }',
            AT_A + 'sticky.cookie: must be the name of a cookie, not "a;b"',
        ),
        (SERVICE + 'allow = ["10.0.0.1/8"]', AT_A + "allow[0]: "),
        (SERVICE + "timeouts = { connect = 0 }", AT_A + "timeouts.connect: must be a number of seconds "),
        (SERVICE + "health.statuses = [200]", AT_A + "health.statuses[0]: must be a whole number "),
        (SERVICE + 'health_path = "up"', AT_A + "health_path: must be a path that begins with / "),
        # backends
        (SERVICE + 'backends = ["10.0.0.5"]', AT_A + 'backends[0]: "10.0.0.5" has no port '),
        (SERVICE + 'backends = ["10.0.0.5:0"]', AT_A + "backends[0]: "),
        (
            SERVICE + 'backends = [\n"a:1",\n"0.0.0.0:1"]',
            'portero.toml:6: service "a.example": backends[1]: must be one machine\'s own address, ',
        ),
        (
            SERVICE + 'backends = ["a:1", { address = "A.:1" }]',
            AT_A + "backends[1]: a:1 is there twice",
        ),
        (SERVICE + "backends = [{ tls = true }]", AT_A + "backends[0].address: is missing"),
        (
            SERVICE + 'backends = { address = "a:1", protocol = "h2" }',
            AT_A + "backends[0].protocol: h2 backends are not supported by this version: use http1",
        ),
        (
            SERVICE + f'backends = {{ address = "a:1", tls_fingerprint = "{"0" * 64}" }}',
            AT_A + "backends[0].tls_fingerprint: needs tls = true",
        ),
        # header fields
        (
            SERVICE + 'request_headers = { set = { Host = "x" } }',
            AT_A + "request_headers.set.Host: Host is the proxy's own: it cannot be changed here",
        ),
        (
            SERVICE + 'request_headers.remove = ["x", "X_Forwarded-For"]',
            AT_A + "request_headers.remove[1]: X_Forwarded-For is the proxy's own: ",
        ),
        (
            SERVICE + 'response_headers.add = { Transfer-Encoding = "x" }',
            AT_A + "response_headers.add.Transfer-Encoding: Transfer-Encoding is the proxy's own: ",
        ),
        (
            SERVICE + 'request_headers.set = { "a b" = "x" }',
            AT_A + 'request_headers.set."a b": must be the name of a header field, not "a b"',
        ),
        (
            SERVICE + 'request_headers.set = { a = "x\\r\\ny" }',
            AT_A + "request_headers.set.a: must be visible ASCII characters, with spaces and tabs between ",
        ),
        (SERVICE + 'request_headers.set = { a = "x", A = "y" }', AT_A + "request_headers.set.A: is there "),
        # who may come in
        (
            SERVICE + "basic_auth = {}",
            AT_A + "basic_auth: needs users or users_file: without any nobody could come in",
        ),
        (
            SERVICE + 'basic_auth.users = ["ann:secret"]',
            AT_A + 'basic_auth.users[0]: user "ann" has no bcrypt hash ($2b$...): '
            "make one by htpasswd -nB NAME",
        ),
        (SERVICE + 'basic_auth.users = ["secret"]', AT_A + "basic_auth.users[0]: must be NAME:HASH, "),
        (
            SERVICE + f'basic_auth.users = ["ann:{HASH.replace("10", "31")}"]',
            AT_A + 'basic_auth.users[0]: user "ann" has a hash of cost 31: 4 to 16 will do',
        ),
        (
            SERVICE + f'basic_auth.users = ["ann:{HASH}", "ann:{HASH}a"]',
            AT_A + "basic_auth.users[1]: ",
        ),
        (SERVICE + 'basic_auth.users_file = "gone"', AT_A + "basic_auth.users_file: cannot read gone: No "),
        (
            SERVICE + 'forward_auth.url = "ftp://x"',
            AT_A + 'forward_auth.url: "ftp://x" is no http:// or https:// address',
        ),
        (SERVICE + "forward_auth = {}", AT_A + "forward_auth.url: is missing"),
        (
            SERVICE + 'maintenance = { page = "a", page_file = "portero.toml" }',
            AT_A + "maintenance: has both page and page_file: use one of them",
        ),
        # routes
        (ROUTE, 'portero.toml:2: route "a.example": needs either service or redirect'),
        (
            ROUTE + 'service = "b"\nredirect = "/"',
            'portero.toml:2: route "a.example": needs either service or redirect',
        ),
        (
            ROUTE + 'path = "api"\nservice = "b"',
            (
                'portero.toml:4: route "a.exampleapi": path: must be a path such as /api, without ? and #, '
                'not "api"'
            ),
        ),
        (
            ROUTE + 'service = "b"\nstrip_path = true',
            'portero.toml:5: route "a.example": strip_path: needs a path to strip, and a service',
        ),
        (
            ROUTE + 'redirect = "/"\nstatus = 300',
            'portero.toml:5: route "a.example": status: must be 301, 302, 303, 307 or 308, not 300',
        ),
        (
            ROUTE + 'service = "b"\nstatus = 301',
            'portero.toml:5: route "a.example": status: is that of a redirect, which this is not',
        ),
        (
            ROUTE + 'redirect = "//evil.example"',
            (
                'portero.toml:4: route "a.example": redirect: "//evil.example" is no https:// or http:// '
                "address and no path"
            ),
        ),
        (
            ROUTE + 'redirect = "https://$uri"',
            (
                'portero.toml:4: route "a.example": redirect: "https://$uri": '
                "the host is missing, and a client's path would take its place"
            ),
        ),
        (
            ROUTE + 'redirect = "https://x/$host"',
            (
                'portero.toml:4: route "a.example": redirect: "https://x/$host": '
                "$uri is all that can be filled in"
            ),
        ),
        # twice
        (
            SERVICE + SERVICE,
            'portero.toml:6: service "a.example" is at portero.toml:3 too',
        ),
        (
            ROUTE + 'path = "/x"\nservice = "b"' + ROUTE + 'path = "/x/"\nservice = "c"',
            'portero.toml:7: route "a.example/x" is at portero.toml:3 too',
        ),
        # include
        ("include = 1", "portero.toml:1: include: must be text, not a number"),
        ('include = ["x*", ""]', 'portero.toml:1: include: must be a path such as "services.d/*.toml"'),
        ('\ninclude = "gone.toml"', "portero.toml:2: include: cannot read gone.toml: No such file or "),
        ('servce = "a"', 'portero.toml:1: unknown key "servce": the nearest is "service"'),
    ],
    ids=str,
)
def test_a_fault_is_named_with_its_line_and_its_key(tmp_path: Path, content: str, said: str) -> None:
    told = refusal(tmp_path, content)
    assert told.startswith(said)  # the rest lists what would do
    assert told.isprintable()


@pytest.mark.parametrize(
    ("content", "included", "said"),
    [
        (
            'include = "services.d/*.toml"',
            "\n" * 10 + '[[service]]\nname = "app.example.com"\nrate_limit = { requests = "many" }',
            (
                'services.d/app.toml:13: service "app.example.com": rate_limit.requests: '
                'must be a whole number from 1 to 1073741824, not "many"'
            ),
        ),
        (
            'include = "services.d/*.toml"\n[[service]]\nname = "a"',
            '[[service]]\nname = "A."',
            'services.d/app.toml:2: service "a" is at portero.toml:3 too',
        ),
        (
            'include = "services.d/*.toml"',
            "[limits]\nh2_streams = 1",
            (
                'services.d/app.toml:1: unknown key "limits": '
                "an included file has [[service]] and [[route]] only"
            ),
        ),
        (
            'include = "services.d/*.toml"',
            "[[service",
            "services.d/app.toml: no valid TOML: Expected ']]' at the end of an array declaration ",
        ),
    ],
)
def test_a_fault_in_an_included_file_names_that_file(
    tmp_path: Path, content: str, included: str, said: str
) -> None:
    assert refusal(tmp_path, content, app=included).startswith(said)


_LEAF = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["a.example", "10.0.0.1:80", "[::1", "https://[x", "header:x", "/x", "$2b$10$", "x" * 5000]
    ),
    st.integers(-2, 400),
    st.floats(),
    st.booleans(),
    st.dates(),
)
_KEYS = (
    "name backends balance hash_on slow_start sticky health_path max_in_flight health timeouts retries "
    "body_bytes queue_seconds queue_length allow deny rate_limit basic_auth forward_auth maintenance "
    "request_headers response_headers host path service strip_path redirect status address tls weight "
    "tls_fingerprint protocol cookie mode requests seconds key users users_file realm url page page_file "
    "content_type set add remove include"
)
_KEY = st.sampled_from(_KEYS.split())
_VALUE = st.recursive(
    _LEAF,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(_KEY, st.text(max_size=5)), inner, max_size=3)
    ),
    max_leaves=8,
)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(c):08x}" for c in value) + '"'
    if isinstance(value, list):
        return "[" + ",\n".join(map(_toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(inner)}" for key, inner in value.items()) + "}"
    return str(value)


@settings(deadline=None)
@given(st.sampled_from(["service", "route"]), st.lists(st.dictionaries(_KEY, _VALUE, max_size=5), max_size=3))
@example("service", [{"name": "a"}, {"name": "a", "maintenance": True}])
def test_whatever_stands_in_a_service_is_taken_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, kind: str, tables: list[dict[str, Any]]
) -> None:
    file = tmp_path_factory.getbasetemp() / "services.toml"
    file.write_text(
        "\n".join(
            f"[[{kind}]]\n" + "\n".join(f"{key} = {_toml(value)}" for key, value in table.items())
            for table in tables
        )
    )
    told = ""
    try:
        load({"config": str(file)}, {})
    except ConfigError as error:
        told = str(error)
    assert told == "" or told.startswith(f"{file}:")
    assert told == "" or told.isprintable()
    assert len(told) < 1000


@pytest.mark.parametrize(
    "line",
    [
        f'basic_auth = "bob:{HASH}"',
        f'basic_auth = ["bob:{HASH}"]',
        'request_headers = "Authorization: hunter2"',
        'request_headers = { set = ["Authorization: hunter2"] }',
        'forward_auth = { url = "https://bob:hunter2@auth.example/" }',
        'forward_auth = "https://bob:hunter2@auth.example/"',
    ],
)
def test_what_may_be_a_secret_is_not_shown(tmp_path: Path, line: str) -> None:
    said = refusal(tmp_path, f'[[service]]\nname = "a"\n{line}')
    assert said.startswith('portero.toml:3: service "a": ')
    assert "hunter2" not in said
    assert HASH[:10] not in said


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    said = refusal(tmp_path, 'include = ["services.d/*.toml", "loop/*.toml"]')
    assert said.startswith("portero.toml:1: include: cannot read loop: Too many levels of symbolic links")
    assert refusal(tmp_path, 'include = "loop/*/a.toml"').startswith("portero.toml:1: include: cannot read ")
    assert (
        read(tmp_path, 'include = ["nowhere/*.toml", "nowhere*/*/*.toml", "portero.toml/*"]').services == ()
    )


def test_a_listed_file_that_cannot_be_looked_at_has_not_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.lstat, os.open

    def refuse(number: int) -> Any:  # a folder that may be listed, and not be entered
        def ask(path: Any, *rest: Any, **options: Any) -> Any:
            if str(path).endswith("a.toml"):
                raise PermissionError(13, "Permission denied")
            return whole[number](path, *rest, **options)

        return ask

    (tmp_path / "services.d").mkdir()
    (tmp_path / "services.d" / "a.toml").write_text('[[service]]\nname = "a"')
    (tmp_path / "portero.toml").write_text('include = "services.d/*.toml"')
    monkeypatch.setattr(os, "lstat", refuse(0))
    monkeypatch.setattr(os, "open", refuse(1))
    with pytest.raises(ConfigError, match="Permission denied"):
        load({"config": str(tmp_path / "portero.toml")}, {})


def test_a_mark_of_the_order_of_bytes_is_no_fault(tmp_path: Path) -> None:
    config = read(tmp_path, '\ufeffinclude = "services.d/*.toml"\n', a='\ufeff[[service]]\r\nname = "a"\r\n')
    assert [service.name for service in config.services] == ["a"]


def test_a_default_service_is_no_longer_than_names_are(tmp_path: Path) -> None:
    # The registry would refuse it later: at the next start, in the midst of what serves.
    name = ".".join(["a" * 50] * 5)
    assert refusal(tmp_path, f'[proxy]\ndefault_service = "{name}"').startswith(
        "portero.toml:2: proxy.default_service: "
    )
    assert read(tmp_path, f'[proxy]\ndefault_service = "{name[:253]}"').proxy.default_service == name[:253]
