"""Limits a client: how many connections it has, and how fast it opens them.

Who is one client is `client_of`: an IPv4 address, or an IPv6 network of 64 bits, which is what a household or
a server is given, so that an abuser would have 2^64 addresses to choose from.

The rules
- What is counted is given back once: `Clients` raises when somebody gives back what he has not taken.
- A client without a connection, and one whose bucket is full again, is in no table: ten thousand connections
  that came and went leave nothing behind.
- Several workers accept from one socket, and nobody knows who of them gets a client's next connection. A
  share of the limit for each would refuse clients that are far below it. So they count in memory that all of
  them see (`SharedCounts`), and ask each time.
"""

from __future__ import annotations

from collections import OrderedDict
from ipaddress import IPv6Address, ip_address
from typing import Final

#: Clients whose bucket is remembered, 150 bytes each. With more at once, whoever was quiet longest is
#: forgotten.
MAX_CLIENTS: Final = 65_536
#: Cells of one of the two rows that a worker has in the shared memory.
COLUMNS: Final = 16_384

_CELL: Final = 4


def client_of(address: str) -> str:
    """Return who `address`, as a socket tells it, belongs to. What is no IP address stands for itself."""
    if ":" not in address:
        return address
    if "." in address and address.startswith("::ffff:"):
        return address[7:]  # an IPv4 client of a dual-stack listener
    try:
        ip = ip_address(address)
    except ValueError:
        return address
    assert isinstance(ip, IPv6Address)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return f"{IPv6Address(int(ip) >> 64 << 64)}/64"


class SharedCounts:
    """The connections of each client in each of several workers, in `memory` that all of them see.

    A worker writes its own rows only, with single stores, and reads those of the others. It has two rows, in
    which a client has a cell each, by its hash; other clients may have the same cell, hardly ever both. So
    the smaller of the two counts is never too low, and nearly always right. Whoever takes the place of a
    worker that died begins at zero.
    """

    @staticmethod
    def size(workers: int) -> int:
        """Bytes of memory for so many workers."""
        return workers * 2 * COLUMNS * _CELL

    def __init__(self, memory: memoryview, own: int) -> None:
        self._cells = memory.cast("B").cast("I")
        self._workers = len(self._cells) // (2 * COLUMNS)
        self._own = own
        start = own * 2 * COLUMNS
        self._cells[start : start + 2 * COLUMNS] = memoryview(bytes(2 * COLUMNS * _CELL)).cast("I")

    def change(self, client: str, by: int) -> None:
        """This worker has so many connections of `client` more."""
        start = self._own * 2 * COLUMNS
        for cell in _cells_of(client):
            self._cells[start + cell] += by

    def elsewhere(self, client: str) -> int:
        """Return how many connections of `client` the other workers have."""
        counts = [
            sum(
                self._cells[worker * 2 * COLUMNS + cell]
                for worker in range(self._workers)
                if worker != self._own
            )
            for cell in _cells_of(client)
        ]
        return min(counts)


class Clients:
    """How many connections each client has; `shared` with the other workers, if there are some."""

    def __init__(self, shared: SharedCounts | None = None) -> None:
        self._counts: dict[str, int] = {}
        self._shared = shared

    def __len__(self) -> int:
        return len(self._counts)

    def enter(self, client: str, most: int) -> bool:
        """Count a connection of `client`, unless it has `most` already; say whether it was counted."""
        count = self._counts.get(client, 0)
        shared = self._shared
        if count >= most or (shared is not None and count + shared.elsewhere(client) >= most):
            return False
        self._counts[client] = count + 1
        if shared is not None:
            shared.change(client, 1)
        return True

    def leave(self, client: str) -> None:
        """A connection that was counted is gone. KeyError when there is none."""
        count = self._counts[client]
        if count == 1:
            del self._counts[client]
        else:
            self._counts[client] = count - 1
        if self._shared is not None:
            self._shared.change(client, -1)


class Rates:
    """A bucket of tokens for each client. What is kept is the time at which it will be full again."""

    def __init__(self, most: int = MAX_CLIENTS) -> None:
        self._full_at: OrderedDict[str, float] = OrderedDict()  # whoever took one last is last
        self._most = most

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, client: str, rate: float, burst: float, now: float) -> bool:
        """Take a token out of the bucket of `client`, which holds `burst` and gets `rate` a second.

        False when there is none: then nothing changes, so whoever goes on trying loses nothing by it.
        """
        full_at = max(self._full_at.get(client, now), now)
        if (full_at - now) * rate > burst - 1:
            return False
        self._full_at[client] = full_at + 1 / rate
        self._full_at.move_to_end(client)
        if len(self._full_at) > self._most:
            self._full_at.popitem(last=False)
        return True

    def forget_quiet(self, now: float) -> None:
        """Forget those with full buckets, in the order of their last tokens, up to the first that has none.

        Call it from time to time: whoever was quiet for burst / rate seconds is gone then.
        """
        while self._full_at:
            client = next(iter(self._full_at))
            if self._full_at[client] > now:
                break
            del self._full_at[client]


# Private


def _cells_of(client: str) -> tuple[int, int]:
    number = hash(client)
    return number % COLUMNS, COLUMNS + (number >> 24) % COLUMNS
