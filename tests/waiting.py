"""Waiting on a loop for what another task, a thread or the other end of a socket brings about."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

#: Seconds that anything may take on a machine busy with other things.
PATIENCE = 60.0


async def until(condition: Callable[[], object]) -> None:
    """Return when `condition` holds; TimeoutError when it does not come to hold."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.002)
