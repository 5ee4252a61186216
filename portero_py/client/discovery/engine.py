"""What is asked of Docker: who runs, what one is, what happens. Its API over a unix socket or TCP.

The rules
- The version is agreed on: ours when the daemon has it, else the nearest that it has. One that does not tell
  its versions (a filtering proxy before the socket) is asked without any: it then answers in its own.
- Every answer has a limit of time and size. Events come for ever, so what is limited there is a line.
- Whatever goes wrong is a `DockerUnreachable`, with one line that says what. The caller tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlsplit

import aiohttp
import orjson

from portero_py.client.discovery.events import FILTERS, Event, read_event
from portero_py.errors import ConfigError, DockerUnreachable

DEFAULT_HOST: Final = "unix:///var/run/docker.sock"

#: The version whose answers these are; any since 1.24 will do.
OURS: Final = (1, 43)

#: Seconds for an answer, and bytes: a listing of ten thousand containers is some 20 MB.
ANSWER_SECONDS: Final = 20.0
MAX_ANSWER: Final = 128 << 20
MAX_EVENT: Final = 1 << 20

_log = logging.getLogger(__name__)

_LONGEST_SHOWN: Final = 500

_OK: Final = 200
_NOT_FOUND: Final = 404
#: What a proxy before the socket says to what it does not let through.
_NOT_FOR_US: Final = (401, 403, 404, 405, 501)

_VERSION: Final = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})", re.ASCII)
_TLS_PORT: Final = 2376
_PLAIN_PORT: Final = 2375


@dataclass(frozen=True, slots=True)
class Address:
    """Where Docker listens: at the path `socket`, or else at `url`. `tls` is what it takes to speak TLS."""

    shown: str
    url: str
    socket: str = ""
    tls: ssl.SSLContext | None = None


def parse_address(host: str, cert_path: str = "") -> Address:
    """What `--docker` and DOCKER_HOST may say. `cert_path` (ca.pem, cert.pem, key.pem) asks for TLS over TCP.

    Raises ConfigError.
    """
    scheme, mark, rest = host.partition("://")
    if not mark or not host.isprintable():
        raise ConfigError(f"--docker: {host!r} is neither unix:///path nor tcp://host:port")
    if scheme == "unix":
        if not rest.startswith("/"):
            raise ConfigError(f"--docker: {host!r}: the path of the socket begins with /")
        return Address(host, "http://docker", socket=rest)
    if scheme not in {"tcp", "http", "https"}:
        raise ConfigError(f"--docker: {scheme}:// is not spoken here, only unix:// and tcp://")
    try:
        parts = urlsplit(f"//{rest.rstrip('/')}")
        name, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"--docker: {host!r}: {error}") from None
    if not name or parts.path or parts.query or parts.username is not None:
        raise ConfigError(f"--docker: {host!r} is not tcp://host:port")
    tls = _tls(cert_path) if cert_path or scheme == "https" else None
    port = port or (_TLS_PORT if tls else _PLAIN_PORT)
    bare = f"[{name}]" if ":" in name else name
    return Address(host, f"{'https' if tls else 'http'}://{bare}:{port}", tls=tls)


class Engine:
    """One Docker: `async with`, then `connect` before anything else. All of it raises DockerUnreachable."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._version = ""
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        if self._address.socket:
            connector: aiohttp.BaseConnector = aiohttp.UnixConnector(self._address.socket)
        else:
            connector = aiohttp.TCPConnector(ssl=self._address.tls or True)
        self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    @property
    def address(self) -> str:
        """Where it is, for the log."""
        return self._address.shown

    async def connect(self) -> str:
        """Agree on a version; returns what to tell of this Docker."""
        self._version = ""
        status, said = await self._ask("/version")
        if status == _OK and isinstance(said, dict):
            version = agree(said.get("ApiVersion"), said.get("MinAPIVersion"))
            release = said.get("Version")
            name = f"Docker {release}" if isinstance(release, str) and release.isprintable() else "Docker"
        elif status in _NOT_FOR_US:
            version, name = "", "Docker"
        else:
            raise self._unreachable(f"/version is answered with {status}")
        self._version = f"/v{version}" if version else ""
        return f"{name}, API {version or 'of its own version'}"

    async def info(self) -> Mapping[str, Any]:
        """What it says of itself; nothing where that is not for us."""
        status, said = await self._ask("/info")
        if status in _NOT_FOR_US:
            return {}
        return self._object(status, said, "/info")

    async def containers(self) -> list[Any]:
        """A summary of each container that runs."""
        status, said = await self._ask("/containers/json")
        if status != _OK or not isinstance(said, list):
            raise self._refused(status, said, "/containers/json")
        return said

    async def inspect(self, container_id: str) -> Mapping[str, Any] | None:
        """What one container is, None when there is none."""
        path = f"/containers/{container_id}/json"
        status, said = await self._ask(path)
        return None if status == _NOT_FOUND else self._object(status, said, path)

    @contextlib.asynccontextmanager
    async def events(self) -> AsyncIterator[EventStream]:
        """What happens from now on."""
        url, query = f"{self._address.url}{self._version}/events", {"filters": json.dumps(FILTERS)}
        async with contextlib.AsyncExitStack() as stack:
            with self._told():
                async with asyncio.timeout(ANSWER_SECONDS):
                    response = await stack.enter_async_context(
                        self._session.get(url, params=query, allow_redirects=False)
                    )
            if response.status != _OK:
                raise self._unreachable(f"/events is answered with {response.status}")
            yield EventStream(response.content, self._told)

    # Private

    async def _ask(self, path: str) -> tuple[int, object]:
        """Status and JSON, None where there is none."""
        url = f"{self._address.url}{self._version}{path}"
        with self._told():
            async with (
                asyncio.timeout(ANSWER_SECONDS),
                self._session.get(url, allow_redirects=False) as response,
            ):
                data = bytearray()
                async for chunk in response.content.iter_any():
                    data += chunk
                    if len(data) > MAX_ANSWER:
                        raise self._unreachable(f"the answer to {path} is too long")
        try:
            return response.status, orjson.loads(data)
        except orjson.JSONDecodeError:
            return response.status, None

    def _object(self, status: int, said: object, path: str) -> Mapping[str, Any]:
        if status != _OK or not isinstance(said, dict):
            raise self._refused(status, said, path)
        return said

    def _refused(self, status: int, said: object, path: str) -> DockerUnreachable:
        why = said.get("message") if isinstance(said, dict) else None
        return self._unreachable(f"{path} is answered with {status}{f': {why}' if why else ''}")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise self._unreachable(str(error) or "no answer in time") from error

    def _unreachable(self, why: str) -> DockerUnreachable:
        return DockerUnreachable(f"{self._address.shown}: {why[:_LONGEST_SHOWN]}")


class EventStream:
    """The events as they come. It ends with an error only: Docker says nothing when it leaves."""

    def __init__(
        self, content: aiohttp.StreamReader, told: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        self._content = content
        self._told = told
        self._rest = bytearray()
        self._was_unreadable = False

    async def next(self) -> list[Event]:
        """Those that came, at least a part of one. Whoever gives up waiting loses none."""
        with self._told():
            # A wait that is cancelled has taken nothing out: a line would be lost in parts.
            data = await self._content.readany()
            if not data:
                raise aiohttp.ClientPayloadError("the stream of events ended")
            *lines, self._rest = (self._rest + data).split(b"\n")
            if len(self._rest) > MAX_EVENT:
                raise aiohttp.ClientPayloadError("an event is too long")
        return [event for line in lines if line.strip() and (event := self._read(bytes(line))) is not None]

    # Private

    def _read(self, line: bytes) -> Event | None:
        try:
            return read_event(line)
        except ValueError:
            # The next one may be well; what this one said, the next listing shows.
            if not self._was_unreadable:
                self._was_unreadable = True
                _log.warning("an event of Docker's is no JSON, and passed over: %r", line[:80])
            return None


def agree(greatest: object, least: object) -> str:
    """The version to speak: ours, as far as the daemon's greatest and least allow; "" when it has none."""
    found = _version(greatest)
    if found is None:
        return ""
    agreed = max(min(OURS, found), min(_version(least) or found, found))
    return f"{agreed[0]}.{agreed[1]}"


# Private


def _version(said: object) -> tuple[int, int] | None:
    match = _VERSION.fullmatch(said) if isinstance(said, str) else None
    return (int(match[1]), int(match[2])) if match else None


def _tls(cert_path: str) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(Path(cert_path, "ca.pem")) if cert_path else None)
        if cert_path and Path(cert_path, "cert.pem").exists():
            # A key that is encrypted is an error: else OpenSSL asks for its password at the terminal.
            context.load_cert_chain(Path(cert_path, "cert.pem"), Path(cert_path, "key.pem"), password="")
    except (OSError, ValueError) as error:
        raise ConfigError(f"DOCKER_CERT_PATH: {cert_path}: {error}") from None
    return context
