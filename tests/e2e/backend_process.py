"""A backend in a process of its own, for what is done to processes: SIGSTOP, SIGCONT, SIGKILL."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Final

#: Answers each request with its name; `/wait` is answered when somebody has asked for `/go`, `/slow` after
#: 5 s. `/seen` says which numbers (`X-Number`) have come.
_SCRIPT: Final = """
import asyncio, sys

async def serve(reader, writer):
    while True:
        try:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            return
        for line in head.lower().split(b"\\r\\n"):
            if line.startswith(b"content-length:"):
                await reader.readexactly(int(line[15:]))
            if line.startswith(b"x-number:"):
                seen.append(line[9:].strip())
        path = head.split(b" ")[1]
        if path == b"/wait":
            waiting.append(path)
            await go.wait()
        elif path == b"/go":
            go.set()
        elif path == b"/slow":
            await asyncio.sleep(5)
        body = b"%d" % len(waiting) if path == b"/waiting" else sys.argv[1].encode()
        if path == b"/seen":
            body = b" ".join(seen)
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%b" % (len(body), body))

async def main():
    global go, waiting, seen
    go, waiting, seen = asyncio.Event(), [], []
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


class BackendProcess:
    """Runs from the beginning; `close` it."""

    host: Final = "127.0.0.1"

    def __init__(self, name: str) -> None:
        self.name = name.encode()
        self._process = subprocess.Popen([sys.executable, "-c", _SCRIPT, name], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def close(self) -> None:
        """SIGKILL, whatever it is doing."""
        self._process.kill()
        self._process.communicate()
