"""The load: a process of its own that asks at a steady rate until it is told to stop, and counts.

    python -m benchmarks.faults.load --port 443 --certificates both.pem --seed 1

It begins when it has said `ready`, stops asking at the first line on stdin (or its end), lets what is open
finish, and prints its Tally as JSON. Nothing is asked again.

Two kinds of load: `--rate` asks a second whatever comes back (`asks.stream`), or `--clients`, each of whom
opens a connection, takes half a second's download, closes it and begins again: more than there is room for.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import Iterable

import uvloop

from benchmarks.faults import asks, http1, http2, websocket
from benchmarks.faults.asks import Ask, Kind
from benchmarks.faults.connections import Place, contexts
from benchmarks.faults.ledger import Ledger, Lost, Tally

#: Seconds after which an ask is lost as `timed out`.
PATIENCE = 30.0

#: Pieces of the download that each of many clients takes: half a second.
_SHORT = 5


class Load:
    """The clients of one run."""

    def __init__(self, place: Place, patience: float = PATIENCE) -> None:
        self._place = place
        self._patience = patience
        self._http1 = http1.Connections(place)
        self._http2 = http2.Connections(place)
        self._ledger = Ledger()
        self._begun = 0.0
        self._late = 0.0

    async def steady(self, due_asks: Iterable[tuple[float, Ask]], stopped: asyncio.Event) -> Tally:
        """Ask each when it is due, until `stopped` or until there are no more, and wait for what is open."""
        self._begun = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for at, ask in due_asks:
                due = self._begun + at
                await _until(due, stopped)
                if stopped.is_set():
                    break
                self._late = max(self._late, time.monotonic() - due)
                self._ledger.send(ask)
                group.create_task(self._one(ask, due))
            seconds = time.monotonic() - self._begun
        return self._close(seconds)

    async def crowd(self, seed: str, clients: int, stopped: asyncio.Event) -> Tally:
        """Let so many clients come, all within the first second, and each again and again until `stopped`."""
        self._begun = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._come_again(f"{seed}-{number}", number / clients, stopped))
            await stopped.wait()
            seconds = time.monotonic() - self._begun
        return self._close(seconds)

    # Private

    def _close(self, seconds: float) -> Tally:
        self._http1.close()
        self._http2.close()
        return self._ledger.close(seconds=seconds, late=self._late)

    async def _come_again(self, name: str, first: float, stopped: asyncio.Event) -> None:
        await _until(self._begun + first, stopped)
        turn = 0
        while not stopped.is_set():
            turn += 1
            ask = Ask(f"{name}-{turn}", Kind.DOWNLOAD, _SHORT, fresh=True)
            self._ledger.send(ask)
            await self._one(ask, time.monotonic())
            await _until(time.monotonic() + 0.1, stopped)

    async def _one(self, ask: Ask, due: float) -> None:
        way = ""
        try:
            async with asyncio.timeout(self._patience):
                status, body = await self._answer(ask)
        except TimeoutError:
            way = "timed out"
        except Lost as lost:
            way = str(lost)
        now = time.monotonic()
        took = max(0.0, now - due)  # a timer may be early by its resolution
        if way:
            self._ledger.lose(ask, way, took, now - self._begun)
        else:
            self._ledger.answer(ask, status, body, took, now - self._begun)

    async def _answer(self, ask: Ask) -> tuple[int, bytes]:
        if ask.kind is Kind.WEBSOCKET:
            status = await websocket.talk(self._place, ask)
            return status, ask.answer if status == 200 else b""  # `talk` has compared every message
        return await (self._http2 if ask.http2 else self._http1).ask(ask)


async def _until(due: float, stopped: asyncio.Event) -> None:
    """Sleep until `due`, or until it is all over."""
    pause = due - time.monotonic()
    if pause > 0:
        try:
            async with asyncio.timeout(pause):
                await stopped.wait()
        except TimeoutError:
            return


async def _main(options: argparse.Namespace) -> Tally:
    place = Place(options.port, *contexts(options.certificates))
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin.fileno(), stopped.set)
    load = Load(place)
    print("ready", flush=True)
    try:
        if options.clients:
            return await load.crowd(options.seed, options.clients, stopped)
        return await load.steady(asks.stream(options.seed, options.rate), stopped)
    finally:
        loop.remove_reader(sys.stdin.fileno())


def main() -> None:
    """What the command line asks for; the Tally goes to stdout."""
    parser = argparse.ArgumentParser(prog="load")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--certificates", required=True, help="whom to trust, PEM")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--rate", type=float, default=200)
    parser.add_argument("--clients", type=int, default=0)
    tally = uvloop.run(_main(parser.parse_args()))
    print(json.dumps(dataclasses.asdict(tally)), flush=True)


if __name__ == "__main__":
    main()
