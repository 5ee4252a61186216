"""How much nonsense one HTTP/2 connection may send: leaky buckets, the time is an argument.

Every frame that costs portero work and brings no request forward is drawn from a bucket; an empty one ends
the connection with ENHANCE_YOUR_CALM. The figures leave busy, honest clients far below:

    resets    RST_STREAM from the peer (rapid reset, CVE-2023-44487), and streams beyond the limit.
              A browser cancels a page full of images at once: nghttp2's 1000, then 33 a second.
    faults    stream errors that portero had to answer with RST_STREAM (MadeYouReset, CVE-2025-8671).
              A correct client causes none.
    settings  each wants an answer. Clients send one, or a few.
    chores    PING, WINDOW_UPDATE, PRIORITY, empty DATA, unknown frames, late frames. A client that downloads
              may send two WINDOW_UPDATE for each DATA frame, and gRPC a PING a round trip while data flows:
              so what portero sends of a response gives credit.

CONTINUATION (CVE-2024-27316) is bounded for each block, where the block is gathered.
"""

from __future__ import annotations

from portero_py.wire.http2.frames import ConnectionFault, ErrorCode


class Bucket:
    """`burst` drops at once, refilled by `rate` drops a second."""

    __slots__ = ("_burst", "_level", "_name", "_rate", "_time")

    def __init__(self, name: str, burst: float, rate: float) -> None:
        self._name = name
        self._burst = burst
        self._rate = rate
        self._level = burst
        self._time = 0.0

    def draw(self, now: float) -> None:
        """Take one drop at `now`, in seconds of any clock. Raises ConnectionFault when empty."""
        level = min(self._burst, self._level + (now - self._time) * self._rate) - 1.0
        self._time = now
        self._level = level
        if level < 0.0:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, f"too many {self._name}")

    def give(self, drops: float) -> None:
        """Put drops back; more than the burst is not kept."""
        self._level = min(self._burst, self._level + drops)


class Floods:
    """The buckets of one connection."""

    __slots__ = ("chores", "faults", "resets", "settings")

    def __init__(self) -> None:
        self.resets = Bucket("reset or refused streams", 1000, 33)
        self.faults = Bucket("stream errors", 100, 10)
        self.settings = Bucket("SETTINGS", 50, 5)
        self.chores = Bucket("frames that bring nothing forward", 4000, 1000)
