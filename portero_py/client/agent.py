"""The agent: keeps the lease of a backend that does not know portero, until it is told to stop.

It runs beside the backend (a sidecar, or a second service of the same unit) and gives the lease back on
SIGTERM and SIGINT, so that no request goes to a backend that is about to end: stop the agent first.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from portero_py.client.registrar import Api, Registrar, Registration


async def keep_registered(
    api: Api, registration: Registration, on_registered: Callable[[], None] | None = None
) -> None:
    """Register and renew until SIGTERM or SIGINT, then deregister.

    `on_registered` is called once, when the first lease is granted. Raises `RegistrationRefused` when the
    first answer is a refusal that waiting cannot cure.
    """
    loop = asyncio.get_running_loop()
    told_to_stop = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, told_to_stop.set)
    try:
        async with Registrar(api, registration) as registrar:
            stop = asyncio.create_task(told_to_stop.wait())
            granted = asyncio.create_task(registrar.wait_registered())
            try:
                await asyncio.wait({stop, granted}, return_when=asyncio.FIRST_COMPLETED)
                if granted.done() and on_registered is not None:
                    on_registered()
                await stop
            finally:
                stop.cancel()
                granted.cancel()
    finally:
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(signal_number)
