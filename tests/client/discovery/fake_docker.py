"""A Docker Engine that has no containers but says so: its API over a unix socket, in real HTTP.

It answers as Docker 20.10 and later do (versions agreed on and refused, chunked events, one JSON object a
line), and fails as it is told: slowly, with another status, or by breaking its streams off.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.client.discovery.inspections import id_of, inspection

_VERSIONED = re.compile(r"/v(\d+)\.(\d+)(/.*)")


class FakeDocker:
    """`async with`: serves at `path`, and on a port after `listen`.

    `start`, `signal`, `end` and the like do what docker does, and tell it.
    """

    def __init__(self, path: Path, version: str = "1.41", least: str = "1.12") -> None:
        self.path = path
        self.version, self.least = version, least
        self.containers: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        #: What is answered instead, by the end of the path; or how long an answer takes.
        self.refused: dict[str, int] = {}
        self.delays: dict[str, float] = {}
        self.name = "host"
        self.streams: set[web.StreamResponse] = set()
        self._gone: set[asyncio.Event] = set()
        self._writes: set[asyncio.Future[None]] = set()
        self._clock = 1_800_000_000.0
        self._runner: web.AppRunner | None = None

    @property
    def host(self) -> str:
        return f"unix://{self.path}"

    async def __aenter__(self) -> FakeDocker:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.path)).start()

    async def listen(self, tls: ssl.SSLContext | None = None) -> int:
        """Serve on a port of loopback too."""
        assert self._runner is not None
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        port: int = self._runner.addresses[-1][1]
        return port

    async def close(self) -> None:
        """As when the daemon is stopped: its streams break off, nobody listens at the socket."""
        if self._runner is not None:
            self.break_streams()
            runner, self._runner = self._runner, None
            await runner.cleanup()
            self.path.unlink(missing_ok=True)

    # What happens

    def start(self, name: str, labels: Mapping[str, str] | None = None, **more: Any) -> None:
        """`docker run`, or `docker start` of one that has ended."""
        said = inspection(name, labels, **more)
        said["State"]["StartedAt"] = datetime.fromtimestamp(self._tick(), UTC).isoformat()
        self.containers[name] = said
        self.tell("start", name)

    def signal(self, name: str, number: int) -> None:
        """`docker kill --signal`, and what `docker stop` begins with."""
        self.tell("kill", name, signal=str(number))

    def end(self, name: str, *, remove: bool = False) -> None:
        """Its process ends."""
        said = self.containers[name]
        said["State"].update(Running=False, Status="exited")
        said["NetworkSettings"]["Networks"] = {}
        self.tell("die", name, exitCode="0")
        if remove:
            del self.containers[name]
            self.tell("destroy", name)

    def pause(self, name: str, *, paused: bool = True) -> None:
        self.containers[name]["State"]["Paused"] = paused
        self.tell("pause" if paused else "unpause", name)

    def health(self, name: str, status: str) -> None:
        self.containers[name]["State"]["Health"] = {"Status": status, "Log": []}
        self.tell(f"health_status: {status}", name)

    def move(self, name: str, networks: Mapping[str, str]) -> None:
        """`docker network disconnect` and `connect`."""
        moved = inspection(name, networks=networks)["NetworkSettings"]["Networks"]
        self.containers[name]["NetworkSettings"]["Networks"] = moved
        self.tell("connect", "network", kind="network", container=id_of(name))

    def tell(self, action: str, name: str, *, kind: str = "container", **attributes: str) -> None:
        """One event, to all who listen."""
        actor = {"ID": id_of(name), "Attributes": {"image": "box", "name": name, **attributes}}
        said = {"Type": kind, "Action": action, "Actor": actor, "timeNano": int(self._tick() * 1e9)}
        self.write(json.dumps(said).encode() + b"\n")

    def write(self, data: bytes) -> None:
        """Bytes into the streams of events."""
        for stream in self.streams:
            task = asyncio.ensure_future(self._write(stream, data))
            self._writes.add(task)
            task.add_done_callback(self._writes.discard)

    def break_streams(self) -> None:
        """Break off in the middle of a chunked answer."""
        for gone in self._gone:
            gone.set()

    def is_watched(self) -> bool:
        """Whether somebody listens to its events."""
        return bool(self.streams)

    # Private

    def _tick(self) -> float:
        self._clock += 60.0
        return self._clock

    async def _write(self, stream: web.StreamResponse, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            await stream.write(data)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        self.asked.append(path)
        match = _VERSIONED.fullmatch(path)
        if match is not None:
            asked, path = (int(match[1]), int(match[2])), match[3]
            if not _number(self.least) <= asked <= _number(self.version):
                return _error(400, f"client version {match[1]}.{match[2]} is too old or too new")
        for end, seconds in self.delays.items():
            if path.endswith(end):
                await asyncio.sleep(seconds)
        for end, status in self.refused.items():
            if path.endswith(end):
                return _error(status, "administrative rules forbid this request")
        answers: dict[str, Callable[[], Awaitable[web.StreamResponse]]] = {
            "/version": self._version,
            "/info": self._info,
            "/containers/json": self._list,
        }
        if path == "/events":
            return await self._events(request)
        if path in answers:
            return await answers[path]()
        found = [each for each in self.containers.values() if f"/containers/{each['Id']}/json" == path]
        return web.json_response(found[0]) if found else _error(404, f"No such container: {path}")

    async def _version(self) -> web.StreamResponse:
        return web.json_response({"Version": "99.1", "ApiVersion": self.version, "MinAPIVersion": self.least})

    async def _info(self) -> web.StreamResponse:
        return web.json_response({"ID": "PCY5:VJAD", "Name": self.name})

    async def _list(self) -> web.StreamResponse:
        return web.json_response(
            [
                {"Id": said["Id"], "Names": [said["Name"]], "Labels": said["Config"]["Labels"]}
                for said in self.containers.values()
                if said["State"]["Running"]
            ]
        )

    async def _events(self, request: web.Request) -> web.StreamResponse:
        filters = json.loads(request.query["filters"])
        assert set(filters) == {"type", "event"}, filters
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        gone = asyncio.Event()
        self.streams.add(response)
        self._gone.add(gone)
        try:
            await gone.wait()
        finally:
            self.streams.discard(response)
            self._gone.discard(gone)
        if request.transport is not None:
            request.transport.abort()
        return response


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"message": message}, status=status)
