"""A backend that hangs under load: who pays for it until the others are asked instead.

The load is in time: what hangs keeps nobody from beginning the next request. Each has a number, so that the
backend says afterwards which of them were sent to it.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from itertools import count

import pytest

from tests.e2e.backend_process import BackendProcess
from tests.e2e.conftest import SHORT_GOODBYE, StartProcess, StartProxy
from tests.e2e.health_backend import backend_of, until_state
from tests.e2e.http1_client import Http1Client, get, post
from tests.e2e.http2_client import Http2Client, fields_of
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import PATIENCE, eventually

#: Requests a second, a tenth of the HTTP/1 ones are POSTs.
HTTP1, HTTP2 = 160, 40


@dataclass
class Asked:
    """A request and what became of it."""

    kind: str
    began: float
    status: int = 0
    body: bytes = b""


class Load:
    """Asks all the time, from the beginning to the end of the `with`; then everything has been answered."""

    def __init__(self, proxy: ProxyProcess, service: str) -> None:
        self.asked: dict[int, Asked] = {}
        self._proxy, self._service = proxy, service
        self._numbers = count(1)
        self._done = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._http1, self._http2)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE)

    def begun_after(self, moment: float) -> int:
        """How many requests have begun since then."""
        return sum(asked.began > moment for asked in list(self.asked.values()))

    # Private

    def _begin(self, kind: str) -> int:
        number = next(self._numbers)
        self.asked[number] = Asked(kind, time.monotonic())
        return number

    def _http1(self) -> None:
        asyncio.run(self._ask_in_time())

    async def _ask_in_time(self) -> None:
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in count():
                if self._done.is_set():
                    return
                group.create_task(self._ask("GET" if number % 10 else "POST"))
                await asyncio.sleep(max(began + number / HTTP1 - time.monotonic(), 0))

    async def _ask(self, kind: str) -> None:
        number = self._begin(kind)
        fields = (f"X-Number: {number}", "Connection: close")
        request = get(self._service, "/", *fields)
        if kind == "POST":
            request = post(self._service, b"abc", "/", *fields)
        reader, writer = await asyncio.open_connection("127.0.0.1", self._proxy.port)
        writer.write(request)
        async with asyncio.timeout(2 * PATIENCE):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        self.asked[number].status = int(head.split(b" ")[1])
        self.asked[number].body = body

    def _http2(self) -> None:
        seconds = []
        while not self._done.is_set():
            seconds.append(threading.Thread(target=self._one_second))
            seconds[-1].start()
            self._done.wait(1)
        for each in seconds:
            each.join(2 * PATIENCE)

    def _one_second(self) -> None:
        with Http2Client(("127.0.0.1", self._proxy.port), None, self._service) as client:
            streams = {}
            for _ in range(HTTP2):
                number = self._begin("GET over HTTP/2")
                streams[number] = client.request(
                    fields_of(self._service, b"/", (b"x-number", b"%d" % number))
                )
                time.sleep(1 / HTTP2)
            for number, stream in streams.items():
                outcome = client.outcome(stream)
                self.asked[number].status = outcome.status
                self.asked[number].body = outcome.body


def seen(backend: BackendProcess) -> set[int]:
    """The numbers that a backend has got."""
    with Http1Client((backend.host, backend.port)) as direct:
        return {int(number) for number in direct.ask(get("any.example", "/seen")).body.split()}


@pytest.mark.parametrize(
    ("workers", "health_path"),
    [
        ("1", ""),
        ("2", "/up"),
        pytest.param("1", "/up", marks=pytest.mark.minutes),
        pytest.param("2", "", marks=pytest.mark.minutes),
    ],
)
def test_a_frozen_backend_of_two_costs_no_get_its_answer_and_is_soon_left_alone(
    workers: str, health_path: str, start_proxy: StartProxy, start_process: StartProcess, service: str
) -> None:
    proxy = start_proxy(flags=("--workers", workers))
    frozen, well = start_process("frozen"), start_process("well")
    for backend in (frozen, well):
        proxy.register(service, backend.host, backend.port, health_path=health_path)
        until_state(proxy, service, backend.port, "ready")
    with Load(proxy, service) as load:
        eventually(lambda: len(seen(frozen)) > 100, "there is traffic")
        frozen.signal(signal.SIGSTOP)
        froze = time.monotonic()
        until_state(proxy, service, frozen.port, "down")
        down = time.monotonic()
        eventually(lambda: load.begun_after(down) > 400, "the load goes on")
        eventually(
            lambda: all(
                asked.status
                for asked in list(load.asked.values())
                if asked.kind != "POST" and asked.began < down
            ),
            "every GET that was there is answered",
        )
        waiting = [asked for asked in list(load.asked.values()) if asked.kind == "POST" and not asked.status]
        melts = time.monotonic()
        frozen.signal(signal.SIGCONT)
        until_state(proxy, service, frozen.port, "ready")
        ready = time.monotonic()
        eventually(
            lambda: any(load.asked[number].began > ready for number in seen(frozen)), "it is asked again"
        )
    found = Counter((asked.kind, asked.status) for asked in load.asked.values())
    assert {status for _, status in found} == {200}, found
    numbers = seen(frozen)
    there = [load.asked[number] for number in numbers if froze < load.asked[number].began < melts]
    last = max(asked.began for asked in there) - froze
    moved = sum(asked.body == b"well" for asked in there)
    print(
        f"{len(there)} requests were sent to it, the last {last:.1f} s after it froze, down after "
        f"{down - froze:.1f} s; {moved} of them were moved, {len(waiting)} POSTs waited"
    )
    assert last <= down - froze, "once it is known to be down nothing is sent to it"
    assert proxy.metric("portero_retries_total", service=service, reason="moved") >= moved > 0
    since_then = [asked for asked in waiting if asked.began > froze]
    assert len(since_then) <= sum(asked.kind == "POST" for asked in there)
    assert {asked.body for asked in there if asked.kind != "POST"} == {b"well"}


@pytest.mark.parametrize("workers", ["1", "2"], ids=["one-worker", "two-workers"])
def test_backends_that_take_their_time_keep_all_of_their_requests(
    workers: str, start_proxy: StartProxy, start_process: StartProcess, service: str
) -> None:
    # A probe is asked for when they have waited for as long as one may take: that is less than they wait.
    proxy = start_proxy(toml=f"{SHORT_GOODBYE}[health]\ntimeout = 3\n", flags=("--workers", workers))
    one, other = start_process("one"), start_process("other")
    for backend in (one, other):
        proxy.register(service, backend.host, backend.port)
    found: Counter[tuple[int, bytes]] = Counter()

    def ask() -> None:
        with proxy.connect() as client:
            for _ in range(2):
                response = client.ask(get(service, "/slow"))
                found[response.status, response.body] += 1

    clients = [threading.Thread(target=ask) for _ in range(60)]
    for client in clients:
        client.start()
    eventually(lambda: proxy.metric("portero_probes_total", result="ok") >= 2, "both are asked how they are")
    for client in clients:
        client.join(2 * PATIENCE)
    assert found == {(200, b"one"): 60, (200, b"other"): 60}
    assert proxy.metric("portero_ejections_total") == 0
    assert proxy.metric("portero_retries_total") == 0
    for backend in (one, other):
        shown = backend_of(proxy, service, backend.port)
        assert (shown["state"], shown["ejected"]) == ("ready", 0)
    assert "down:" not in proxy.operator_log()
