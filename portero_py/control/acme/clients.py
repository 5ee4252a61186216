"""The one client that all orders share: opened by the first that needs it, closed by the last that leaves.

While anybody uses it the account's key cannot be changed (`account_in_use`), and the CA is asked for its
directory once. Who comes while it is being opened waits for that; when it fails, it fails for all of them,
and the next one tries again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from portero_py.control.acme.locks import account_in_use

if TYPE_CHECKING:
    from portero_py.control.acme.client import AcmeClient


class SharedClient:
    """`open_client` makes a client whose account exists; `account_lock` is the file that guards its key."""

    def __init__(self, open_client: Callable[[], Awaitable[AcmeClient]], account_lock: Path) -> None:
        self._open_client = open_client
        self._account_lock = account_lock
        self._current: _Opened | None = None

    @asynccontextmanager
    async def use(self) -> AsyncIterator[AcmeClient]:
        """The client, for as long as the block runs. Raises AcmeError, Busy while the key is changed."""
        opened = self._current
        if opened is None:
            opened = self._current = _Opened(self._open_client, self._account_lock)
        opened.users += 1
        try:
            try:
                client = await opened.client()
            except BaseException:  # raised on, cancellation too: who comes next opens anew
                self._forget(opened)
                raise
            yield client
        finally:
            opened.users -= 1
            if not opened.users:
                self._forget(opened)
                opened.close()

    def open_anew(self) -> None:
        """The account has changed: who comes from now on gets another client."""
        self._current = None

    # Private

    def _forget(self, opened: _Opened) -> None:
        if self._current is opened:
            self._current = None


class _Opened:
    def __init__(self, open_client: Callable[[], Awaitable[AcmeClient]], account_lock: Path) -> None:
        self.users = 0
        self._open_client = open_client
        self._account_lock = account_lock
        self._held = ExitStack()
        self._opening = asyncio.create_task(self._open(), name="acme account")

    async def client(self) -> AcmeClient:
        return await asyncio.shield(self._opening)

    def close(self) -> None:
        opening = self._opening
        opening.cancel()
        if opening.done() and not opening.cancelled():
            opening.exception()  # who waited for it has it
        self._held.close()

    async def _open(self) -> AcmeClient:
        self._held.enter_context(account_in_use(self._account_lock))
        client = await self._open_client()
        self._held.callback(client.close)
        return client
