"""`portero-py demo`: everything at once, on this machine only, without root, until Ctrl-C.

It is what a user would do by hand: certificates into a directory, the proxy as its own process, two backends
that register through the real API with real tokens and renew their leases. The secrets are made up at each
start. The proxy is a child in a process group of its own, so that Ctrl-C reaches the demo alone and things
end in order: leases are given back, then the proxy drains.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp

from portero_py.client.registrar import Api, Registrar, Registration
from portero_py.core.auth import sign_token
from portero_py.demo.backends import DemoBackend
from portero_py.demo.self_signed import Authority
from portero_py.errors import ConfigError

APP: Final = "app.localhost"
API: Final = "api.localhost"

#: Named for CSS colours: the pages show them.
BACKENDS: Final = ("coral", "teal")

#: Seconds that the proxy has to start and to end; the drain is told to be done before.
PATIENCE: Final = 20.0
DRAIN: Final = 3

#: The token in the printed curl line is good for this long, seconds.
TOKEN_TTL: Final = 86_400


@dataclass(frozen=True, slots=True)
class Places:
    """Where the demo serves: `host` is the loopback that the backends use, "::1" unless there is no IPv6."""

    directory: Path
    host: str
    https: int
    http: int
    register: int

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.register}"


def run(directory: str) -> int:
    """Run the demo until SIGINT, SIGTERM or SIGHUP; certificates go to `directory`, or a temporary one.

    Returns the exit status: 0, or 1 when the proxy ended by itself. Raises `ConfigError`.
    """
    with ExitStack() as stack:
        if not directory:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="portero-demo-"))
        host = "::1" if _is_free("::1", 0) else "127.0.0.1"
        ports = {"https": 8443, "http": 8080, "register": 18080}
        chosen = {name: _port(name, wanted, host) for name, wanted in ports.items()}
        places = Places(Path(directory).resolve(), host, **chosen)
        _write_files(places.directory)
        return asyncio.run(_demo(places))


# Private


def _write_files(directory: Path) -> None:
    try:
        authority = Authority()
        (directory / "certs").mkdir(parents=True, exist_ok=True)
        (directory / "ca.pem").write_bytes(authority.pem)
        (directory / "portero.toml").write_text(f"[timeouts]\ndrain = {DRAIN}\n")
        for name in (APP, API):
            authority.issue(name).write(directory / "certs" / name)
    except OSError as error:
        raise ConfigError(f"cannot write to {directory}: {os.strerror(error.errno or 0)}") from None


def _port(name: str, wanted: int, host: str) -> int:
    """`wanted`, or a free port when somebody else has it."""
    if _is_free("127.0.0.1", wanted) and _is_free(host, wanted):
        return wanted
    while True:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            free: int = sock.getsockname()[1]
        if _is_free(host, free):
            _say(f"port {wanted} ({name}) is taken: using {free}")
            return free


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
    except OSError:
        return False
    return True


async def _demo(places: Places) -> int:
    told_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, told_to_stop.set)
    api = Api(places.api_url, secrets.token_urlsafe(24), secrets.token_urlsafe(32))
    stop = asyncio.create_task(told_to_stop.wait())
    proxy = await _start_proxy(places, api)
    ended = asyncio.create_task(proxy.wait())
    try:
        async with AsyncExitStack() as stack:
            serving = asyncio.create_task(_serve(places, api, stack))
            await asyncio.wait({serving, stop, ended}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                _say(_tour(places, api, serving.result()))
                await asyncio.wait({stop, ended}, return_when=asyncio.FIRST_COMPLETED)
            serving.cancel()
            await asyncio.wait({serving})
            if not ended.done():
                _say("\nending: the backends deregister, the proxy drains")
    finally:
        stop.cancel()
        fell = ended.done()
        await _end(proxy, ended)
    if fell:
        _say(f"the proxy ended by itself, with status {proxy.returncode}")
    elif proxy.returncode:
        _say(f"the proxy did not end as it should, but with status {proxy.returncode}")
    return 1 if fell or proxy.returncode else 0


async def _start_proxy(places: Places, api: Api) -> asyncio.subprocess.Process:
    listen = [f"--listen-addr=127.0.0.1:{places.https}"]
    if places.host == "::1":
        listen.append(f"--listen-addr=[::1]:{places.https}")
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "portero_py",
        *listen,
        f"--register-addr=127.0.0.1:{places.register}",
        f"--http-addr={'[::1]' if places.host == '::1' else '127.0.0.1'}:{places.http}",
        f"--tls-cert-dir={places.directory / 'certs'}",
        f"--config={places.directory / 'portero.toml'}",
        "--access-log=text",
        env={
            **_without_portero(os.environ),
            "PORTERO_REGISTER_SECRET": api.secret,
            "PORTERO_JWT_HMAC_KEY": api.hmac_key,
        },
        process_group=0,
    )


def _without_portero(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what would change how the demo's proxy runs."""
    bare = {"LISTEN_ADDR", "REGISTER_ADDR", "TLS_CERT_DIR", "REGISTER_SECRET", "JWT_HMAC_KEY"}
    bare |= {f"{name}_FILE" for name in ("REGISTER_SECRET", "JWT_HMAC_KEY")} | {"CREDENTIALS_DIRECTORY"}
    return {
        name: value
        for name, value in environ.items()
        if name not in bare and (name == "PORTERO_LOG" or not name.startswith("PORTERO_"))
    }


async def _serve(places: Places, api: Api, stack: AsyncExitStack) -> dict[str, int]:
    """Start and register the backends, once the proxy is ready; their ports by name."""
    await _ready(places)
    ports = {}
    for name in BACKENDS:
        backend = DemoBackend(name)
        stack.push_async_callback(backend.close)
        ports[name] = await backend.start(places.host)
    leases = [(APP, "coral"), (APP, "teal"), (API, "teal")]
    for service, name in leases:
        registration = Registration(service, places.host, ports[name], ttl_seconds=30, instance_id=name)
        # All of it ends together: a tab that keeps a WebSocket open is not waited for.
        await stack.enter_async_context(Registrar(api, registration, drain_seconds=0))
    return ports


async def _ready(places: Places) -> None:
    give_up_at = time.monotonic() + PATIENCE
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
        while time.monotonic() < give_up_at:
            try:
                async with session.get(f"{places.api_url}/readyz") as response:
                    if response.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError):
                pass  # it does not listen yet
            await asyncio.sleep(0.05)
    raise ConfigError(f"the proxy was not ready within {PATIENCE:g} seconds")


async def _end(proxy: asyncio.subprocess.Process, ended: asyncio.Task[int]) -> None:
    if not ended.done():
        proxy.terminate()
        await asyncio.wait({ended}, timeout=PATIENCE)
    if not ended.done():
        proxy.kill()
        await ended


def _tour(places: Places, api: Api, ports: Mapping[str, int]) -> str:
    curl = f"curl --cacert {shlex.quote(str(places.directory / 'ca.pem'))}"
    app = f"https://{APP}:{places.https}"
    token = sign_token(API, api.hmac_key, "", TOKEN_TTL, time.time())
    body = (
        f'{{"service_name":"{API}","host":"{places.host}","port":{ports["coral"]},'
        '"ttl_seconds":120,"use_tls":false,"instance_id":"by-hand"}'
    )
    return f"""
portero-py runs: {app}/ and https://{API}:{places.https}/
Two backends, {" and ".join(BACKENDS)}, have registered and renew their leases. Try, in another terminal:

  # HTTP/2 and HTTP/1.1; the two backends take turns
  {curl} --http2 {app}/
  {curl} --http1.1 {app}/

  # a stream of events, passed on as they come
  {curl} -N {app}/events

  # plain HTTP is sent to https
  curl -i 'http://{APP}:{places.http}/some/page?x=1'

  # who has registered; metrics for Prometheus
  curl -H 'X-Register-Secret: {api.secret}' {places.api_url}/backends
  curl {places.api_url}/metrics

  # a registration by hand: for two minutes coral serves {API} too
  curl {places.api_url}/register -H 'X-Register-Secret: {api.secret}' \\
    -H 'Authorization: Bearer {token}' \\
    -H 'Content-Type: application/json' \\
    -d '{body}'
  {curl} https://{API}:{places.https}/

Below is the proxy's own log. Ctrl-C ends everything.
"""


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
