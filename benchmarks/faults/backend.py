"""A backend that fails as it is told: one process, commands as lines on stdin, each answered with a line.

    python -m benchmarks.faults.backend --port 9001 --posts FILE

| command | from now on |
|---|---|
| `accept` | all is well |
| `refuse` | nobody listens on the port, and connections that are not in use are closed |
| `blackhole` | a SYN gets no answer (the backlog is full), and connections that are not in use are closed |
| `status N` | every request, that for the health page too, is answered with N at once |
| `reset` | every request is answered with a RST |
| `leave` | finish: what still comes is served with `Connection: close`, and a second after the last it ends |
| `exit` | end at once |

POSTs that it carries out it writes down, one identity a line, in a file that all backends share: a POST that
was carried out twice is found there, whatever the client was answered.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import struct
import sys
from pathlib import Path

import uvloop
from aiohttp import WSMsgType, web
from aiohttp.web_protocol import RequestHandler

from benchmarks.faults.asks import HEALTH_PATH, PIECE_SECONDS, WEBSOCKET_PATH, content, piece, receipt

#: Seconds without a request after which a backend that is to leave believes that none will come.
QUIET = 1.0

#: Longer than anybody keeps a connection that nobody uses.
KEEP_ALIVE = 600.0

#: The most that a backlog of 0 takes is one; these fill it for sure.
_FILLERS = 4


class Backend:
    """The server and its mood."""

    def __init__(self, port: int, posts: int) -> None:
        self._port = port
        self._posts = posts
        self._server = web.Server(self._answer, keepalive_timeout=KEEP_ALIVE, access_log=None)
        self._listening: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._fillers: list[socket.socket] = []
        self._status = 0
        self._resets = False
        self._leaving = False
        self._busy: set[RequestHandler] = set()  # connections with an exchange
        self._last = 0.0
        self.done = asyncio.Event()

    async def obey(self, line: str) -> None:
        """Do what a command says; ValueError: there is no such command."""
        word, _, rest = line.partition(" ")
        self._status, self._resets = 0, False
        if word == "accept":
            await self._listen(1024)
        elif word == "refuse":
            await self._deaf(closed=True)
        elif word == "blackhole":
            await self._deaf(closed=False)
        elif word == "status":
            self._status = int(rest)
        elif word == "reset":
            self._resets = True
        elif word == "leave":
            self._leaving = True
            asyncio.get_running_loop().call_later(QUIET, self._leave_if_quiet)
        elif word == "exit":
            self.done.set()
        else:
            raise ValueError(f"no such command: {line!r}")

    # Private

    async def _listen(self, backlog: int) -> None:
        for filler in self._fillers:
            filler.close()
        self._fillers.clear()
        if self._listening is None:
            self._listening = socket.create_server(("127.0.0.1", self._port), backlog=backlog)
            self._listening.setblocking(False)
        self._listening.listen(backlog)
        if self._accepting is None:
            self._accepting = asyncio.create_task(self._accept(self._listening))

    async def _deaf(self, *, closed: bool) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
            self._accepting = None
        if self._listening is None:
            return
        if closed:
            self._listening.close()
            self._listening = None
        else:
            self._listening.listen(0)
            for _ in range(_FILLERS):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", self._port))
                self._fillers.append(filler)
        for connection in set(self._server.connections) - self._busy:
            connection.force_close()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listening)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                await loop.connect_accepted_socket(self._server, connection)
            except OSError:  # it was gone again
                connection.close()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self._busy.add(request.protocol)
        try:
            return await self._answer_by_path(request)
        finally:
            self._busy.discard(request.protocol)
            self._last = asyncio.get_running_loop().time()

    async def _answer_by_path(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._resets:
            assert request.transport is not None
            sock = request.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.transport.abort()
            return web.Response(status=500)
        if self._status:
            return web.Response(status=self._status, text="out of order\n")
        if request.path == HEALTH_PATH:
            return web.Response(status=503 if self._leaving else 200)
        if request.path == WEBSOCKET_PATH:
            return await self._echo(request)
        _, kind, identity, *rest = request.path.split("/")
        if kind == "download":
            return await self._download(request, identity, int(rest[0]))
        if kind == "post":
            body = await request.read()
            os.write(self._posts, f"{identity}\n".encode())
            return self._response(receipt(identity, body))
        return self._response(content(identity, int(rest[0])))

    def _response(self, body: bytes) -> web.Response:
        response = web.Response(body=body)
        if self._leaving:
            response.force_close()
        return response

    async def _download(self, request: web.BaseRequest, identity: str, pieces: int) -> web.StreamResponse:
        response = web.StreamResponse()
        if self._leaving:
            response.force_close()
        await response.prepare(request)
        for number in range(pieces):
            await asyncio.sleep(PIECE_SECONDS)
            await response.write(piece(identity, number))
        await response.write_eof()
        return response

    async def _echo(self, request: web.BaseRequest) -> web.StreamResponse:
        response = web.WebSocketResponse(compress=False)
        await response.prepare(request)
        async for message in response:
            if message.type is WSMsgType.TEXT:
                await response.send_str(message.data)
        return response

    def _leave_if_quiet(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._busy and loop.time() - self._last >= QUIET:
            self.done.set()
        else:
            loop.call_later(0.1, self._leave_if_quiet)


async def _main(port: int, posts: int) -> None:
    backend = Backend(port, posts)
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    commands = asyncio.create_task(_obey(backend, reader))
    ended = asyncio.create_task(backend.done.wait())
    await asyncio.wait([commands, ended], return_when=asyncio.FIRST_COMPLETED)
    ended.cancel()
    if commands.done():
        commands.result()
    else:
        commands.cancel()


async def _obey(backend: Backend, reader: asyncio.StreamReader) -> None:
    while line := await reader.readline():
        await backend.obey(line.decode().strip())
        print("ok", flush=True)


def main() -> None:
    """Serve until told to end, or until stdin ends."""
    parser = argparse.ArgumentParser(prog="backend")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--posts", type=Path, required=True)
    options = parser.parse_args()
    posts = os.open(options.posts, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    uvloop.run(_main(options.port, posts))


if __name__ == "__main__":
    main()
