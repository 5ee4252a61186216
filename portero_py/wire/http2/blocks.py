"""Header blocks of a connection: gathered from HEADERS and CONTINUATION, decoded in order, read as heads.

- A block is decoded whatever becomes of its stream, or every later one would be decoded wrongly.
- A block is bounded by its size and by its frames (CONTINUATION flood, CVE-2024-27316): a peer that cuts 16
  bytes into 16 frames is no better than one that sends 16 MiB.
- The block of a message without a body that leaves the table alone, such as every repetition of a request,
  means the same until the table changes: it is decoded and checked once, and its head is shared (whole core:
  2.5 instead of 7.5 µs).
"""

from __future__ import annotations

from typing import Final, Generic

from portero_py.errors import WireError
from portero_py.wire.http2.frames import END_HEADERS, FRAME_LIMIT, ConnectionFault, ErrorCode
from portero_py.wire.http2.heads import Head, HeadReader
from portero_py.wire.http2.hpack import BOMB_FACTOR, HeaderDecoder, HeaderList

#: Decoded heads kept for each connection, and the longest block that is kept.
KEPT_HEADS: Final = 16
KEPT_BLOCK: Final = 256
#: CONTINUATION frames of one block beyond those that its size makes necessary.
SPARE_FRAMES: Final = 8


class HeaderBlocks(Generic[Head]):
    """The header blocks that one peer sends. `stream` is that of the block being gathered, or 0."""

    __slots__ = ("_decoder", "_flags", "_frames", "_heads", "_limit", "_pieces", "_reader", "_size", "stream")

    def __init__(self, reader: HeadReader[Head], list_bytes: int) -> None:
        self._reader = reader
        self._decoder = HeaderDecoder(list_bytes)
        self._heads: dict[bytes, Head] = {}
        # the block that is being gathered
        self._limit = list_bytes * BOMB_FACTOR
        self._pieces: list[bytes] = []
        self._flags = 0
        self._frames = 0
        self._size = 0
        self.stream = 0

    def begin(self, stream: int, flags: int, piece: bytes) -> None:
        """HEADERS came without END_HEADERS; `flags` are its flags."""
        self.stream = stream
        self._flags = flags
        self._frames = 0
        self._size = 0
        self._add(piece)

    def go_on(self, stream: int, flags: int, piece: bytes) -> tuple[int, bytes] | None:
        """CONTINUATION came: return the flags of HEADERS and the block when it is complete."""
        if not stream or stream != self.stream:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION of no header block")
        self._add(piece)
        if not flags & END_HEADERS:
            return None
        block = b"".join(self._pieces)
        self._pieces = []
        self.stream = 0
        return self._flags, block

    def decode(self, block: bytes) -> HeaderList:
        """Return the fields of a complete block. Raises ConnectionFault."""
        received, changed = self._decoder.decode(block)
        if changed and self._heads:
            self._heads = {}
        return received

    def head(self, block: bytes, *, ends: bool) -> Head | WireError:
        """Return the head that a complete block means, or what is wrong with it.

        `ends`: no body follows. Nobody may change the head. Raises ConnectionFault.
        """
        if ends:
            head = self._heads.get(block)
            if head is not None:
                return head
        received, changed = self._decoder.decode(block)
        try:
            head = self._reader.read(received, ends=ends)
        except WireError as error:
            head = None
            problem = error
        if changed:
            if self._heads:
                self._heads = {}
        elif head is not None and ends and len(block) <= KEPT_BLOCK:
            if len(self._heads) >= KEPT_HEADS:
                self._heads.clear()
            self._heads[block] = head
        return problem if head is None else head

    # Private

    def _add(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._size += len(piece)
        self._frames += 1
        if self._size > self._limit or self._frames > self._limit // FRAME_LIMIT + SPARE_FRAMES:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "the header block is far too large")
