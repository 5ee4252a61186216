"""Names and passwords, before a service (RFC 7617): bcrypt hashes, compared off the event loop.

A comparison is meant to be slow, 50 to 300 ms of a core, so it is done once for a name and a password, and
remembered under a keyed hash of both. Strangers who guess can have that work done as well:
- one comparison at a time in each worker, in a thread, beside the loop;
- clients take turns, and each may have CLIENT_WAITS wait: who guesses waits for himself;
- who is over that, or comes when MOST_CLIENTS wait already, is told to come back (429);
- the same wrong password again costs nothing, and an unknown name costs what a known one does.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
from collections import deque
from typing import TYPE_CHECKING, Final

from portero_py.core.limits import client_of
from portero_py.errors import PorteroError, TooManyLogins, Unauthorized
from portero_py.proxy.gates.gate import Asking, Gate
from portero_py.wire.credentials import basic

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from portero_py.core.policies import BasicAuth
    from portero_py.proxy.endpoints import Gated

#: Credentials whose verdict is remembered, of each kind, 150 bytes each.
MOST_KNOWN: Final = 4096
#: Clients that may wait for a comparison, and how many each.
MOST_CLIENTS: Final = 64
CLIENT_WAITS: Final = 4
#: What bcrypt looks at of a password.
_BCRYPT_BYTES: Final = 72

_log = logging.getLogger(__name__)


class Comparisons:
    """The comparisons of one worker, one at a time, clients in turn. `close` at its end."""

    def __init__(self, create_task: Callable[[Coroutine[object, object, None]], asyncio.Task[None]]) -> None:
        self._create_task = create_task
        self._waiting: dict[str, deque[Comparison]] = {}  # by client; the first one is next
        self._task: asyncio.Task[None] | None = None

    def add(self, client: str, comparison: Comparison) -> None:
        """Have a comparison made. Raises TooManyLogins."""
        line = self._waiting.get(client)
        if line is None:
            if len(self._waiting) >= MOST_CLIENTS:
                raise TooManyLogins("too many passwords are being checked: come back")
            line = self._waiting[client] = deque()
        elif len(line) >= CLIENT_WAITS:
            raise TooManyLogins("too many of your passwords are being checked: come back")
        line.append(comparison)
        if self._task is None:
            self._task = self._create_task(self._work())

    def close(self) -> None:
        """Nobody hears of a verdict any more."""
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()

    # Private

    async def _work(self) -> None:
        try:
            while self._waiting:
                client, line = next(iter(self._waiting.items()))
                comparison = line.popleft()
                del self._waiting[client]
                if line:
                    self._waiting[client] = line  # behind the others
                try:
                    if comparison.is_wanted:
                        await comparison.make()
                except Exception:  # the others still wait
                    _log.exception("a fault of portero's own: a password was not checked")
        finally:
            self._task = None


class Comparison:
    """Whether a name has a password: for all exchanges that came with both while it was being found out."""

    def __init__(self, gate: Passwords, key: bytes, hashed: bytes, password: bytes, *, is_user: bool) -> None:
        self._gate = gate
        self._key = key
        self._hashed = hashed
        self._password = password
        self._is_user = is_user
        self.waiting: list[Waiting] = []

    @property
    def is_wanted(self) -> bool:
        """Whether anybody still waits; who does not is not compared for."""
        if self.waiting:
            return True
        self._gate.forget(self._key)
        return False

    async def make(self) -> None:
        """Compare, and tell who waits."""
        is_right, fault = False, None
        try:
            is_right = await asyncio.to_thread(_compare, self._password, self._hashed) and self._is_user
        except Exception as error:  # a hash that bcrypt does not take after all, or no thread: no verdict
            fault = error
        if fault is None:
            self._gate.found(self._key, is_right=is_right)
        else:
            self._gate.broke(self._key, fault)
        waiting, self.waiting = self.waiting, []
        for each in waiting:
            exchange = each.exchange
            if exchange is None:
                continue
            try:
                if is_right:
                    exchange.gate_opened()
                elif fault is not None:
                    exchange.gate_closed(PorteroError("a password could not be checked: see the log"))
                else:
                    exchange.gate_closed(self._gate.refusal())
            except Exception:
                exchange.broke()


class Waiting(Asking):
    """One exchange that waits for a comparison."""

    __slots__ = ("comparison", "exchange")

    def __init__(self, exchange: Gated, comparison: Comparison) -> None:
        self.exchange: Gated | None = exchange
        self.comparison = comparison
        comparison.waiting.append(self)

    def give_up(self) -> None:
        """The exchange is over."""
        self.exchange = None
        if self in self.comparison.waiting:
            self.comparison.waiting.remove(self)


class Passwords(Gate):
    """The users of one service."""

    __slots__ = (
        "_comparisons",
        "_fault_told",
        "_known",
        "_pending",
        "_realm",
        "_salt",
        "_users",
        "_wrong",
        "auth",
    )

    def __init__(self, auth: BasicAuth, comparisons: Comparisons) -> None:
        self.auth = auth
        self._realm = auth.realm
        self._users = {name.encode(): hashed.encode() for name, hashed in auth.users}
        self._comparisons = comparisons
        self._salt = secrets.token_bytes(32)
        self._known: dict[bytes, None] = {}  # right ones
        self._wrong: dict[bytes, None] = {}
        self._pending: dict[bytes, Comparison] = {}
        self._fault_told = False

    def admit(self, exchange: Gated, now: float) -> Asking | None:
        """Let users in. Raises Unauthorized or TooManyLogins."""
        found = basic(exchange.head.fields)
        if found is None:
            raise self.refusal()
        name, password = found
        key = hmac.digest(self._salt, b"%d:%b%b" % (len(name), name, password), hashlib.sha256)
        if key in self._known:
            return None
        if key in self._wrong:
            raise self.refusal()
        comparison = self._pending.get(key)
        if comparison is None:
            hashed = self._users.get(name)
            is_user = hashed is not None
            if hashed is None:
                hashed = next(iter(self._users.values()))
            comparison = Comparison(self, key, hashed, password, is_user=is_user)
            self._comparisons.add(client_of(exchange.peer.client(exchange.head.forwarded)), comparison)
            self._pending[key] = comparison
        return Waiting(exchange, comparison)

    def refusal(self) -> Unauthorized:
        """What everybody else gets."""
        return Unauthorized("a name and a password are needed", self._realm)

    def found(self, key: bytes, *, is_right: bool) -> None:
        """A comparison has its verdict."""
        self.forget(key)
        verdicts = self._known if is_right else self._wrong
        if len(verdicts) >= MOST_KNOWN:
            del verdicts[next(iter(verdicts))]
        verdicts[key] = None

    def broke(self, key: bytes, fault: Exception) -> None:
        """A comparison has come to no verdict: the next one may."""
        self.forget(key)
        if not self._fault_told:  # once: strangers can have it happen as often as they like
            self._fault_told = True
            _log.error("a fault of portero's own: a password could not be checked", exc_info=fault)

    def forget(self, key: bytes) -> None:
        """A comparison is not going to be made, or was."""
        self._pending.pop(key, None)


# Private


def _compare(password: bytes, hashed: bytes) -> bool:
    import bcrypt  # for those who use it

    return bcrypt.checkpw(password[:_BCRYPT_BYTES], hashed)
