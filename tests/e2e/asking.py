"""Clients of one service that ask all the time and write down whatever was not answered as it should be."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

from tests.e2e.http1_client import get
from tests.e2e.messages import Closed, Truncated
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import PATIENCE, eventually


class Asking:
    """`with`: threads that GET `path` of `service`, on kept and on fresh connections; each once, never again.

    An answer is right when it is a 200. `by` counts the answers by their bodies.
    """

    def __init__(self, proxy: ProxyProcess, service: str, path: str = "/", pause: float = 0.005) -> None:
        self.by: Counter[bytes] = Counter()
        self.lost: list[str] = []
        self._proxy, self._service, self._path, self._pause = proxy, service, path, pause
        self._done = threading.Event()
        kinds: list[Callable[[], None]] = [self._kept, self._kept, self._fresh]
        self._threads = [threading.Thread(target=self._until_done, args=(kind,)) for kind in kinds]

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        self.goes_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE)

    @property
    def answered(self) -> int:
        return self.by.total()

    def goes_on(self, answers: int = 30) -> None:
        """Wait until so many more were answered."""
        before = self.answered
        eventually(lambda: self.answered >= before + answers, f"{answers} more answers ({self.lost[:5]})")

    def goes_to(self, *bodies: bytes) -> None:
        """Wait until all of these have answered again."""
        before = self.by.copy()
        eventually(
            lambda: all(self.by[body] > before[body] for body in bodies),
            f"answers of {bodies} ({self.by}, {self.lost[:5]})",
        )

    # Private

    def _until_done(self, kind: Callable[[], None]) -> None:
        while not self._done.is_set():
            try:
                kind()
            except (Closed, Truncated, OSError) as error:
                self.lost.append(f"{time.time():.3f} {kind.__name__} {error!r}")

    def _kept(self) -> None:
        with self._proxy.connect() as client:
            while not self._done.is_set():
                response = client.ask(get(self._service, self._path))
                self._judge(response.status, response.body)
                if b"close" in response.values(b"connection"):
                    return
                time.sleep(self._pause)

    def _fresh(self) -> None:
        with self._proxy.connect() as client:
            response = client.ask(get(self._service, self._path, "Connection: close"))
            self._judge(response.status, response.body)
        time.sleep(self._pause)

    def _judge(self, status: int, body: bytes) -> None:
        if status == 200:
            self.by[body.strip()] += 1
        else:
            self.lost.append(f"{time.time():.3f} {status} {body[:80]!r}")
