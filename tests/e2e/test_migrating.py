"""The files of examples/migrating: what docs/migrating.md promises of each is asked of portero-py, and of the
proxy that it comes from where that is installed.
"""

from __future__ import annotations

import importlib
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from portero_py.client.discovery.labels import read
from tests.e2e.acme_site import presented
from tests.e2e.certificates import Authority, server_context
from tests.e2e.conftest import Need, StartBackend
from tests.e2e.migrating import (
    ANNA,
    ELSEWHERE,
    EVE,
    EXAMPLES,
    HERE,
    Front,
    Stage,
    asked_for_a_pass,
    example,
    original,
    portero,
    said,
)
from tests.e2e.pebble import Pebble
from tests.e2e.proxy_process import KEY, PROXY, SECRET, ProxyProcess, clean_environment, free_port
from tests.e2e.test_acme import names_of
from tests.e2e.test_dns01 import Hook
from tests.e2e.waiting import eventually

HSTS = b"max-age=31536000"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Programs that change their user can read it."""
    tmp_path.chmod(0o755)
    return tmp_path


# HAProxy


def _addresses_of_the_lab(stage: Stage) -> dict[str, str]:
    router = stage.pair.write(stage.folder / "router")
    return {
        "192.168.1.11:8080": stage.backend("cloud1"),
        "192.168.1.12:8080": stage.backend("cloud2"),
        "192.168.1.21:8096": stage.backend("media1"),
        "192.168.1.22:8080": stage.backend("feed1"),
        "192.168.1.1:8443": stage.backend("router1", server_context(router)),
        "192.168.1.31:8080": stage.backend("notes1"),
        "192.168.1.41:8080": stage.backend("start1"),
        "192.168.0.0/16": f"{HERE}/32",
    }


def _hook(stage: Stage) -> str:
    """A program for dns-01, which nobody has to call: the certificates are there."""
    program = stage.folder / "hook"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    return str(program)


@contextmanager
def _haproxy(stage: Stage, need: Need) -> Iterator[Front]:
    program = need("haproxy")
    port, plain_port = free_port(), free_port()
    pems = stage.folder / "pems"
    pems.mkdir()
    (pems / "lab.pem").write_bytes(stage.pair.chain + stage.pair.key)
    text = example(
        "haproxy.cfg",
        {
            **_addresses_of_the_lab(stage),
            "0.0.0.0:443": f"{HERE}:{port}",
            "0.0.0.0:80": f"{HERE}:{plain_port}",
            "/etc/haproxy/certs/": f"{pems}/",
        },
    )
    file = str(stage.folder / "haproxy.cfg")
    with original(
        stage,
        "haproxy.cfg",
        text,
        (port, plain_port),
        [program, "-db", "-f", file],
        [program, "-c", "-f", file],
    ) as front:
        yield front


@pytest.fixture(params=["portero-py", "haproxy"])
def lab(
    request: pytest.FixtureRequest, folder: Path, authority: Authority, need: Need
) -> Iterator[tuple[Front, Stage]]:
    """The home lab, behind each of the two."""
    stage = Stage(folder, authority, "home.example", "*.home.example")
    try:
        if request.param == "haproxy":
            with _haproxy(stage, need) as front:
                yield front, stage
        else:
            hook = {"/etc/portero/dns-hook": _hook(stage)}
            with portero(stage, example("haproxy.toml", {**_addresses_of_the_lab(stage), **hook})) as (
                front,
                _,
            ):
                yield front, stage
    finally:
        stage.close()


def test_the_home_lab_of_haproxy_is_served_as_its_file_says(lab: tuple[Front, Stage]) -> None:
    front, stage = lab
    _the_host_decides(front)
    _a_cookie_keeps_a_client_where_it_is_well(front, stage)
    _a_path_is_another_service_and_bounded(front)
    _guarded_hosts_let_in_whom_they_know(front)


def _the_host_decides(front: Front) -> None:
    assert said(front.ask("media.home.example", "/x?y=1"))["backend"] == "media1"
    assert said(front.ask("MEDIA.home.example"))["backend"] == "media1"
    assert said(front.ask("home.example"))["backend"] == "start1"
    assert said(front.ask("nobody.home.example"))["backend"] == "start1"
    moved = front.ask("old.home.example", "/a/b?c=d")
    assert (moved.status, front.location(moved)) == (308, "https://home.example/a/b?c=d")
    plain = front.ask_plainly("media.home.example", "/a?b=c")
    assert (plain.status, front.location(plain)) == (301, "https://media.home.example/a?b=c")
    answer = front.ask("media.home.example")
    assert answer.value(b"strict-transport-security") == HSTS
    assert not answer.values(b"server")
    seen = said(answer)["fields"]
    assert (seen["x-env"], seen["x-forwarded-proto"], seen["x-forwarded-for"]) == ("home", "https", HERE)
    assert seen["host"] == "media.home.example"


def _a_cookie_keeps_a_client_where_it_is_well(front: Front, stage: Stage) -> None:
    host = "cloud.home.example"
    found = {said(front.ask(host))["backend"] for _ in range(20)}
    assert found == {"cloud1", "cloud2"}
    first = front.ask(host)
    cookie = first.value(b"set-cookie").decode()
    assert "httponly" in cookie.lower()
    assert "secure" in cookie.lower()

    def kept() -> list[tuple[str, tuple[str, str]]]:
        """Where a new client stays, and its cookie; until both are ready it may have to go once."""
        home, held = _new_client(front, host)
        answers = [front.ask(host, fields=[held]) for _ in range(8)]
        for answer in answers:
            assert "cookie" not in said(answer)["fields"], "the cookie is not the application's"
        stays = all(said(each)["backend"] == home and not each.values(b"set-cookie") for each in answers)
        return [(home, held)] if stays else []

    ((home, held),) = eventually(kept, "a client stays with its backend")
    stage.scripts[home].is_well = False

    def has_moved() -> bool:
        answer = front.ask(host, fields=[held])
        return answer.status == 200 and said(answer)["backend"] != home and bool(answer.values(b"set-cookie"))

    eventually(has_moved, "the health check has taken the backend out, and its client is elsewhere")
    stage.scripts[home].is_well = True
    eventually(lambda: said(front.ask(host))["backend"] == home, "it is back")


def _new_client(front: Front, host: str) -> tuple[str, tuple[str, str]]:
    """Who answers a client without a cookie, and what it sends from then on."""
    first = front.ask(host)
    cookie = first.value(b"set-cookie").decode()
    return said(first)["backend"], ("Cookie", cookie.partition(";")[0])


def _a_path_is_another_service_and_bounded(front: Front) -> None:
    host = "media.home.example"
    assert said(front.ask(host, "/feedback"))["backend"] == "media1"
    got = said(front.ask(host, "/feed/new?n=1"))
    assert (got["backend"], got["target"]) == ("feed1", "/new?n=1")
    assert said(front.ask(host, "/feed", source=ELSEWHERE))["target"] == "/"
    assert front.served_before_refusal(host, "/feed/x") >= 19
    assert said(front.ask(host, "/feed/x", source=ELSEWHERE))["backend"] == "feed1"


def _guarded_hosts_let_in_whom_they_know(front: Front) -> None:
    assert said(front.ask("router.home.example"))["backend"] == "router1"
    assert front.ask("router.home.example", source=ELSEWHERE).status == 403
    for fields in ((), [EVE]):
        refused = front.ask("notes.home.example", fields=fields)
        assert refused.status == 401
        assert b'realm="notes"' in refused.value(b"www-authenticate")
    assert said(front.ask("notes.home.example", fields=[ANNA]))["backend"] == "notes1"
    large = [ANNA, ("Content-Length", "1000001")]
    assert front.ask("notes.home.example", method="POST", fields=large).status == 413


def test_the_home_lab_gets_its_wildcard_certificate_by_dns_01(folder: Path, authority: Authority) -> None:
    stage = Stage(folder, authority, "home.example", "*.home.example", has_certificates=False)
    pebble = Pebble(folder / "pebble", free_port(), free_port()).start()
    try:
        hook = Hook(folder / "hook", pebble)
        called = {'"/etc/portero/dns-hook"': f'"{hook.program}", "word"'}
        text = example("haproxy.toml", {**_addresses_of_the_lab(stage), **called})
        flags = ("--acme-directory", pebble.directory, "--acme-ca-file", str(pebble.ca_file))
        with portero(stage, text, *flags, *hook.flags[2:]) as (front, _):
            shown = eventually(lambda: presented(front.port, "cloud.home.example"), "it has a certificate")
            assert shown is not None
            assert names_of(shown) == ["*.home.example", "home.example"]
            eventually(lambda: len(hook.calls("end cleanup")) == 2, "both records are removed")
    finally:
        pebble.stop()
        stage.close()


# nginx


def _addresses_of_the_shop(stage: Stage) -> dict[str, str]:
    return {
        "10.0.0.11:8080": stage.backend("shop1"),
        "10.0.0.12:8080": stage.backend("shop2"),
        "10.0.0.21:8080": stage.backend("api1"),
        "10.0.0.31:8080": stage.backend("login1"),
        "10.0.0.41:8080": stage.backend("reports1"),
        "10.0.0.51:8080": stage.backend("account1"),
        "10.0.0.61:8080": stage.peer("auth1", asked_for_a_pass),
        "10.0.0.0/8": f"{HERE}/32",
    }


@contextmanager
def _nginx(stage: Stage, need: Need, users: Path) -> Iterator[Front]:
    program = need("nginx")
    port, plain_port = free_port(), free_port()
    within = stage.folder / "nginx"
    within.mkdir()
    places = "".join(
        f"{kind}_temp_path {within}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = example(
        "nginx.conf",
        {
            **_addresses_of_the_shop(stage),
            "0.0.0.0:443": f"{HERE}:{port}",
            "0.0.0.0:80": f"{HERE}:{plain_port}",
            "/etc/letsencrypt/live/": f"{stage.certificates}/",
            "/etc/nginx/htpasswd": str(users),
            "http {": f"http {{ access_log off; {places}",
        },
    )
    file = str(stage.folder / "nginx.conf")
    main = f"daemon off; pid {within}/pid; error_log {within}/error.log;"
    main += " user root;" if os.geteuid() == 0 else ""
    command = [program, "-p", str(within), "-e", str(within / "error.log"), "-c", file, "-g", main]
    with original(stage, "nginx.conf", text, (port, plain_port), command, [*command, "-t"]) as front:
        yield front


@pytest.fixture(params=["portero-py", "nginx"])
def shop(
    request: pytest.FixtureRequest, folder: Path, authority: Authority, need: Need
) -> Iterator[tuple[Front, Stage]]:
    """The shop, behind each of the two."""
    stage = Stage(folder, authority, "shop.example", "www.shop.example")
    users = folder / "users"
    users.write_text(_bcrypt_line())
    try:
        if request.param == "nginx":
            with _nginx(stage, need, users) as front:
                yield front, stage
        else:
            text = example("nginx.toml", {**_addresses_of_the_shop(stage), '"htpasswd"': f'"{users}"'})
            with portero(stage, text) as (front, _):
                yield front, stage
    finally:
        stage.close()


def _bcrypt_line() -> str:
    """Anna's line of an htpasswd file, as the examples have it."""
    text = (EXAMPLES / "haproxy.toml").read_text()
    return text.partition('users = ["')[2].partition('"')[0] + "\n"


def test_the_shop_of_nginx_is_served_as_its_file_says(shop: tuple[Front, Stage]) -> None:
    front, _ = shop
    _a_client_keeps_its_backend(front)
    _hosts_and_redirects(front)
    _locations(front)
    _locations_that_are_guarded(front)


def _a_client_keeps_its_backend(front: Front) -> None:
    answer = front.ask("shop.example")
    home = said(answer)["backend"]
    assert home in ("shop1", "shop2")
    assert {said(front.ask("shop.example"))["backend"] for _ in range(10)} == {home}
    assert answer.value(b"strict-transport-security") == HSTS
    assert not answer.values(b"x-powered-by")
    seen = said(answer)["fields"]
    assert (seen["x-forwarded-proto"], seen["x-forwarded-for"]) == ("https", HERE)
    assert seen["host"] == "shop.example"


def _hosts_and_redirects(front: Front) -> None:
    moved = front.ask("www.shop.example", "/a/b?c=d")
    assert (moved.status, front.location(moved)) == (308, "https://shop.example/a/b?c=d")
    plain = front.ask_plainly("shop.example", "/a?b=c")
    assert (plain.status, front.location(plain)) == (301, "https://shop.example/a?b=c")
    assert front.ask("nobody.example", sni="shop.example").status == 404


def _locations(front: Front) -> None:
    got = said(front.ask("shop.example", "/api/orders?n=1"))
    assert (got["backend"], got["target"], got["fields"]["x-env"]) == ("api1", "/orders?n=1", "prod")
    assert said(front.ask("shop.example", "/apix"))["backend"] in ("shop1", "shop2")
    got = said(front.ask("shop.example", "/login/form", source=ELSEWHERE))
    assert (got["backend"], got["target"]) == ("login1", "/login/form")
    assert front.served_before_refusal("shop.example", "/login/") >= 20
    assert said(front.ask("shop.example", "/login/", source=ELSEWHERE))["backend"] == "login1"
    large = [("Content-Length", "1048577")]
    assert front.ask("shop.example", method="POST", fields=large).status == 413


def _locations_that_are_guarded(front: Front) -> None:
    assert front.ask("shop.example", "/reports/", fields=[ANNA], source=ELSEWHERE).status == 403
    for fields in ((), [EVE]):
        refused = front.ask("shop.example", "/reports/", fields=fields)
        assert refused.status == 401
        assert b'realm="reports"' in refused.value(b"www-authenticate")
    assert said(front.ask("shop.example", "/reports/", fields=[ANNA]))["backend"] == "reports1"
    for spelling in ("/%72eports/", "//reports/", "/x/../reports/", "/reports;x/", "/REPORTS/"):
        answer = front.ask("shop.example", spelling)
        assert answer.status in (400, 401) or said(answer)["backend"] in ("shop1", "shop2")
    _another_server_is_asked(front, "shop.example", "/account/", "account1")


def _another_server_is_asked(front: Front, host: str, target: str, backend: str) -> None:
    assert front.ask(host, target).status == 401
    assert front.ask(host, target, fields=[("X-Pass", "bad"), ("X-User", "anna")]).status == 401
    got = said(front.ask(host, target, fields=[("X-Pass", "good"), ("X-User", "eve")]))
    assert (got["backend"], got["fields"]["x-user"]) == (backend, "anna")


# Pingoo


def test_the_application_of_pingoo_is_served_as_its_file_says(folder: Path, authority: Authority) -> None:
    stage = Stage(folder, authority, "app.example")
    text = example(
        "pingoo.toml",
        {
            "10.0.0.11:8080": stage.backend("app1"),
            "10.0.0.12:8080": stage.backend("app2"),
            "192.0.2.7": ELSEWHERE,
        },
    )
    stage.backend("api1")
    try:
        with portero(stage, text) as (front, proxy):
            found = {said(front.ask("app.example"))["backend"] for _ in range(40)}
            assert found == {"app1", "app2"}
            assert front.ask("app.example", source=ELSEWHERE).status == 403
            assert front.ask("app.example", "/.git/config").status == 403
            assert front.ask("app.example", "/api/x").status == 503
            proxy.serve("api", stage.backends["api1"])  # as its container is by `discover docker`
            got = said(front.ask("app.example", "/api/x"))
            assert (got["backend"], got["target"]) == ("api1", "/api/x")
            assert front.ask("app.example", "/api/x", source=ELSEWHERE).status == 403
            plain = front.ask_plainly("app.example", "/a")
            assert (plain.status, front.location(plain)) == (301, "https://app.example/a")
    finally:
        stage.close()


# kamal-proxy


def test_the_application_of_kamal_proxy_is_deployed_paused_and_stopped(
    folder: Path, authority: Authority
) -> None:
    stage = Stage(folder, authority, "app.example", "www.app.example")
    for name in ("app-1", "app-2", "api-1"):
        stage.backend(name)
    try:
        with portero(stage, example("kamal-proxy.toml", {})) as (front, proxy):
            _deploy(proxy, stage, "app.example", "app-1")
            _deploy(proxy, stage, "api.app.internal", "api-1")
            eventually(lambda: front.ask("app.example").status == 200, "the first one is ready")
            got = said(front.ask("app.example", "/api/users?n=1"))
            assert (got["backend"], got["target"]) == ("api-1", "/users?n=1")
            moved = front.ask("www.app.example", "/a?b=c")
            assert (moved.status, front.location(moved)) == (301, "https://app.example/a?b=c")
            large = [("Content-Length", "1000001")]
            assert front.ask("app.example", method="POST", fields=large).status == 413
            _the_next_version_takes_over(front, proxy, stage)
            _held_and_stopped(front, proxy)
    finally:
        stage.close()


def _deploy(proxy: ProxyProcess, stage: Stage, service: str, name: str) -> None:
    backend = stage.backends[name]
    proxy.register(service, backend.host, backend.port, instance_id=name)


def _the_next_version_takes_over(front: Front, proxy: ProxyProcess, stage: Stage) -> None:
    """kamal-proxy deploy: healthy first, then the old one is drained."""
    stage.scripts["app-2"].is_well = False
    _deploy(proxy, stage, "app.example", "app-2")
    assert _command(proxy, "ready", "--instance-id", "app-2", "--wait", "1").returncode == 1
    assert {said(front.ask("app.example"))["backend"] for _ in range(6)} == {"app-1"}
    stage.scripts["app-2"].is_well = True
    assert _command(proxy, "ready", "--instance-id", "app-2", "--wait", "60").returncode == 0
    assert _command(proxy, "drain", "--instance-id", "app-1", "--wait", "60").returncode == 0
    assert {said(front.ask("app.example"))["backend"] for _ in range(6)} == {"app-2"}
    proxy.deregister("app.example", instance_id="app-1")
    assert {said(front.ask("app.example"))["backend"] for _ in range(6)} == {"app-2"}


def _held_and_stopped(front: Front, proxy: ProxyProcess) -> None:
    assert _command(proxy, "pause", "--seconds", "60").returncode == 0
    with ThreadPoolExecutor(1) as clients:
        held = clients.submit(front.ask, "app.example")
        eventually(lambda: proxy.metric("portero_queued", service="app.example") == 1, "one is held")
        assert not held.done()
        assert _command(proxy, "resume").returncode == 0
        assert said(held.result(60))["backend"] == "app-2"
    assert _command(proxy, "stop", "--message", "back at noon").returncode == 0
    stopped = front.ask("app.example")
    assert (stopped.status, b"back at noon" in stopped.body) == (503, True)
    assert _command(proxy, "resume").returncode == 0
    assert said(front.ask("app.example"))["backend"] == "app-2"


def _command(proxy: ProxyProcess, verb: str, *flags: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        _arguments(proxy, verb, *flags), env=_environment(), capture_output=True, timeout=120, check=False
    )


def _arguments(proxy: ProxyProcess, verb: str, *flags: str) -> list[str]:
    api = f"http://127.0.0.1:{proxy.register_port}"
    return [*PROXY, verb, "--api", api, "--service", "app.example", *flags]


def _environment() -> dict[str, str]:
    return clean_environment({"PORTERO_REGISTER_SECRET": SECRET, "PORTERO_JWT_HMAC_KEY": KEY})


# Traefik


def test_the_shop_of_traefik_is_served_as_its_labels_said(folder: Path, authority: Authority) -> None:
    names = ("shop.example", "www.shop.example", "admin.shop.example", "account.shop.example")
    stage = Stage(folder, authority, *names)
    text = example(
        "traefik.toml",
        {"http://auth:8080": f"http://{stage.peer('auth', asked_for_a_pass)}", "10.0.0.0/8": f"{HERE}/32"},
    )
    try:
        with portero(stage, text) as (front, proxy):
            _as_the_labels_say(proxy, stage)
            _routers(front)
            _middlewares(front)
            _the_load_balancer(front, stage)
    finally:
        stage.close()


def _as_the_labels_say(proxy: ProxyProcess, stage: Stage) -> None:
    """Register what `discover docker` would, for the containers of portero.compose.yaml."""
    yaml = importlib.import_module("yaml")
    compose = yaml.safe_load((EXAMPLES / "portero.compose.yaml").read_text())
    for name, container in compose["services"].items():
        found = read(container.get("labels", {}))
        assert found.complaints == ()
        for wish in found.wishes:
            assert (wish.port, wish.network) == (8080, "")
            for number in range(container.get("deploy", {}).get("replicas", 1)):
                backend = f"{name}{number + 1}"
                stage.backend(backend)
                proxy.serve(wish.service, stage.backends[backend])


def _routers(front: Front) -> None:
    eventually(lambda: front.ask("shop.example").status == 200, "the probes have found the shop")
    moved = front.ask("www.shop.example", "/a?b=c")
    assert (moved.status, front.location(moved)) == (308, "https://shop.example/a?b=c")
    plain = front.ask_plainly("shop.example", "/a?b=c")
    assert (plain.status, front.location(plain)) == (301, "https://shop.example/a?b=c")
    got = said(front.ask("shop.example", "/api/orders"))
    assert (got["backend"], got["target"], got["fields"]["x-env"]) == ("api1", "/orders", "prod")
    assert got["fields"]["x-forwarded-prefix"] == "/api"


def _middlewares(front: Front) -> None:
    answer = front.ask("shop.example")
    assert answer.value(b"strict-transport-security") == HSTS
    assert not answer.values(b"server")
    large = [("Content-Length", "1000001")]
    assert front.ask("shop.example", method="POST", fields=large).status == 413
    assert front.served_before_refusal("shop.example", "/api/x") >= 19
    assert said(front.ask("shop.example", "/api/x", source=ELSEWHERE))["backend"] == "api1"
    assert front.ask("admin.shop.example", fields=[ANNA], source=ELSEWHERE).status == 403
    assert front.ask("admin.shop.example").status == 401
    assert said(front.ask("admin.shop.example", fields=[ANNA]))["backend"] == "admin1"
    _another_server_is_asked(front, "account.shop.example", "/", "account1")


def _the_load_balancer(front: Front, stage: Stage) -> None:
    def kept() -> list[tuple[str, tuple[str, str]]]:
        home, held = _new_client(front, "shop.example")
        found = {said(front.ask("shop.example", fields=[held]))["backend"] for _ in range(8)}
        return [(home, held)] if found == {home} else []

    ((home, held),) = eventually(kept, "a client stays with its backend")
    assert held[1].startswith("shop_home=")
    stage.scripts[home].is_well = False

    def has_moved() -> bool:
        answer = front.ask("shop.example", fields=[held])
        return answer.status == 200 and said(answer)["backend"] != home

    eventually(has_moved, "the health check has taken the backend out")


# Portero


def test_the_environment_file_of_portero_is_all_that_it_takes(
    folder: Path, authority: Authority, start_backend: StartBackend
) -> None:
    stage = Stage(folder, authority, "app.example")
    certificates = folder / "portero-certs" / "app.example"  # its layout: no fullchain.pem
    certificates.mkdir(parents=True)
    (certificates / "cert.pem").write_bytes(stage.pair.chain)
    (certificates / "privkey.pem").write_bytes(stage.pair.key)
    acme = start_backend()
    port, register_port, plain_port = free_port(), free_port(), free_port()
    text = example(
        "portero.env",
        {
            "0.0.0.0:443": f"{HERE}:{port}",
            "0.0.0.0:18080": f"{HERE}:{register_port}",
            "0.0.0.0:80": f"{HERE}:{plain_port}",
            "/etc/portero/certs": str(certificates.parent),
            "/var/lib/portero": str(folder / "state"),
            "put-the-one-that-your-agents-have-here": SECRET,
            "put-the-key-that-signs-your-tokens-here": KEY,
            "127.0.0.1:5002": f"{HERE}:{acme.port}",
        },
    )
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    environment = dict.fromkeys(("PORTERO_REGISTER_SECRET", "PORTERO_JWT_HMAC_KEY"), "")
    for line in lines:
        name, _, environment[name] = line.partition("=")
    proxy = ProxyProcess(folder / "proxy", environment=environment, by_flags=False)
    proxy.port, proxy.register_port = port, register_port
    front = Front(port, plain_port, stage.tls)
    try:
        proxy.start()
        one = stage.backend("one")
        # What Portero's agent sends, and no field more.
        host, _, number = one.partition(":")
        payload = {"service_name": "app.example", "host": host, "port": int(number), "ttl_seconds": 60}
        assert proxy.call("POST", "/register", {**payload, "use_tls": False}).status == 200
        assert said(front.ask("app.example"))["backend"] == "one"
        challenge = front.ask_plainly("app.example", "/.well-known/acme-challenge/abc")
        assert (challenge.status, challenge.body) == (200, b"GET /.well-known/acme-challenge/abc ")
        plain = front.ask_plainly("app.example", "/a")
        assert (plain.status, front.location(plain)) == (301, "https://app.example/a")
        proxy.stop()
    finally:
        if proxy.is_running:
            proxy.kill()
        stage.close()
