"""The agent: keeps the lease of a backend that does not know portero, until it is told to stop.

It runs beside the backend (a sidecar, or a second service of the same unit) and gives the lease back on
SIGTERM and SIGINT, so that no request goes to a backend that is about to end: stop the agent first. It ends
when nothing is in flight at the backend any more, or after `drain_seconds`: then the backend may end too. A
second signal ends it at once; what was not given back by then ends by itself.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from portero_py.client.registrar import DRAIN_SECONDS, Api, Registrar, Registration


async def keep_registered(
    api: Api,
    registration: Registration,
    on_registered: Callable[[], None] | None = None,
    *,
    drain_seconds: float = DRAIN_SECONDS,
) -> None:
    """Register and renew until SIGTERM or SIGINT, then deregister, and wait for what is in flight.

    `on_registered` is called once, when the first lease is granted. Raises `RegistrationRefused` when the
    first answer is a refusal that waiting cannot cure.
    """
    loop = asyncio.get_running_loop()
    stops = asyncio.Semaphore(0)
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stops.release)
    registrar = Registrar(api, registration, drain_seconds=drain_seconds)
    keeping = asyncio.create_task(_keep(registrar, on_registered), name="portero agent")
    try:
        # The first makes it say goodbye, wherever it is; the next one ends that too.
        while not await _ended_before(keeping, stops):
            keeping.cancel()
    finally:
        keeping.cancel()
        await asyncio.wait({keeping})
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(signal_number)
    if not keeping.cancelled():
        keeping.result()


# Private


async def _keep(registrar: Registrar, on_registered: Callable[[], None] | None) -> None:
    async with registrar:
        await registrar.wait_registered()
        if on_registered is not None:
            on_registered()
        await asyncio.Event().wait()


async def _ended_before(keeping: asyncio.Task[None], stops: asyncio.Semaphore) -> bool:
    """Whether the task ended before a signal came."""
    told = asyncio.create_task(stops.acquire())
    try:
        await asyncio.wait({keeping, told}, return_when=asyncio.FIRST_COMPLETED)
        return keeping.done()
    finally:
        told.cancel()
