"""A backend for thousands of connections: /endless has no end, /large?N has N bytes, all others are short."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType

PIECE = bytes(65_536)
SHORT = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class EndlessBackend:
    """One thread with an event loop of its own."""

    def __init__(self) -> None:
        self.host, self.port = "127.0.0.1", 0
        self._loop = asyncio.new_event_loop()
        self._listening = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> EndlessBackend:
        self._thread.start()
        assert self._listening.wait(30)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)

    # Private

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop, debug=False) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        tasks: set[asyncio.Task[None]] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                await _answer(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass  # whoever was at the other end has gone
            finally:
                tasks.discard(task)
                writer.transport.abort()

        server = await asyncio.start_server(serve, self.host, 0, backlog=4096)
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        await self._stop.wait()
        server.close()
        for task in list(tasks):
            task.cancel()
        while tasks:
            await asyncio.sleep(0.01)


# Private


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split(b" ")[1]
        if path == b"/endless":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n\r\n")
            while True:
                writer.write(PIECE)
                await writer.drain()
        if path.startswith(b"/large?"):
            size = int(path[7:])
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
            await writer.drain()
        else:
            writer.write(SHORT)
