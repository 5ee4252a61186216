"""HPACK (RFC 7541) for both directions of a connection: the one place that knows which library does it.

`jh2.hpack`, the documented name, is a Python implementation that takes 8 to 11 µs a block. The Rust one that
jh2 ships, `jh2._hazmat`, takes 0.9 µs; its name is private, so pyproject.toml pins `jh2>=5.0.4,<6` and
nothing else in portero imports it.

The traps
- The Rust decoder panics on a literal that is cut short, with a line on stderr for each: a client could fill
  the disk with them. `changes_table` walks over the block first and refuses it. It also refuses what the
  decoder lets pass: a table size update behind a field (RFC 7541, 4.2).
- The Rust decoder takes zeros as padding of a Huffman-coded string; RFC 7541, 5.2 demands the beginning of
  EOS, which is ones. Where the padding begins only the decoded string tells: it is the string's length in
  bits less the lengths of the codes of its bytes. 0.3 µs a string, for blocks that are not known yet.
- The decoder's limit on the size of a list is for good: once it was passed, nothing decodes any more. So it
  is set far above the limit of a request's head and ends the connection; a head between the two is decoded,
  which keeps the table right, and refused with 431.
- One block of 16 KiB can name a table entry of 4 KiB 16,000 times: that limit is what stops it.
- A peer may shrink and grow the table many times before the next block; the encoder would announce each step.
  Only the smallest and the last size matter (RFC 7541, 4.2).

Both directions belong to one connection: no client's bytes meet another's. The responses of several backends
share its encoder. One that is equal to the last, in status and all fields, gets the last one's block; and a
decoder with the same table reads every block as what was encoded, whatever came before.
"""

from __future__ import annotations

from typing import Final, cast

from jh2._hazmat import (  # type: ignore[import-untyped]  # jh2 ships stubs without a py.typed
    Decoder,
    Encoder,
    HPACKError,
    OversizedHeaderListError,
)

from portero_py.wire.http2.frames import ConnectionFault, ErrorCode
from portero_py.wire.message import Fields

#: (name, value, sensitive): a sensitive field is never put into a table.
HeaderList = list[tuple[bytes, bytes, bool]]

TABLE_SIZE: Final = 4096
#: A decoded list may be so many times larger than the limit of a head before the connection ends.
BOMB_FACTOR: Final = 4

# Indexed fields of one byte; 0xff begins a longer index.
_INDEXED: Final = bytes(range(0x80, 0xFF))


class HeaderDecoder:
    """Decodes the blocks of one connection, in the order in which they came."""

    __slots__ = ("_decoder",)

    def __init__(self, head_limit: int) -> None:
        self._decoder = Decoder(head_limit * BOMB_FACTOR)
        self._decoder.max_allowed_table_size = TABLE_SIZE

    def decode(self, block: bytes) -> tuple[HeaderList, bool]:
        """Return the fields of one complete block, and whether it changed the table. Raises ConnectionFault.

        Until the table is changed, the same block means the same fields.
        """
        coded: list[tuple[int, int, int]] = []
        changed = changes_table(block, coded)
        try:
            fields: HeaderList = self._decoder.decode(block, True)
        except HPACKError as error:
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, f"HPACK: {error}") from None
        except OversizedHeaderListError:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "the header list is far too large") from None
        if coded:
            _check_padding(block, fields, coded)
        return fields, changed


class HeaderEncoder:
    """Encodes the blocks of one connection, in the order in which they are sent."""

    __slots__ = ("_encoder", "_last", "_smallest", "_stable", "_status", "_table_size")

    def __init__(self) -> None:
        self._encoder = Encoder()
        self._table_size = TABLE_SIZE
        self._smallest = TABLE_SIZE
        # the response that was encoded last, and its block once it is known to repeat
        self._status = 0
        self._last: Fields = []
        self._stable = b""

    def set_table_size(self, size: int) -> None:
        """The peer allows a dynamic table of `size` bytes; more than TABLE_SIZE is not used."""
        size = min(size, TABLE_SIZE)
        self._smallest = min(self._smallest, size)
        self._table_size = size
        self._status = 0

    def encode(self, fields: HeaderList) -> bytes:
        """Return the block for `fields`."""
        encoder = self._encoder
        self._status = 0
        if self._smallest < encoder.header_table_size:
            encoder.header_table_size = self._smallest
        if self._table_size != encoder.header_table_size:
            encoder.header_table_size = self._table_size
        self._smallest = self._table_size
        return cast("bytes", encoder.encode(fields))

    def encode_response(self, status: int, fields: Fields) -> bytes:
        """Return the block for a response; `fields` as in a ResponseHead.

        A backend's small responses are often all alike. When the same one comes a third time in a row its
        block is taken from memory, provided that it adds nothing to the table.
        """
        if status == self._status and fields == self._last:
            if self._stable:
                return self._stable
            block = self.encode(response_list(status, fields))
            self._status = status
            self._stable = b"" if changes_table(block) else block
            return block
        block = self.encode(response_list(status, fields))
        self._status = status
        self._last = fields
        self._stable = b""
        return block


def response_list(status: int, fields: Fields) -> HeaderList:
    """Return a response's fields as HTTP/2 wants them: :status, lower-case names, nothing hop-by-hop."""
    result: HeaderList = [(b":status", b"%d" % status, False)]
    result += field_list(fields)
    return result


def field_list(fields: Fields) -> HeaderList:
    """Return fields with lower-case names and without those that RFC 9113, 8.2.2 forbids."""
    result: HeaderList = []
    for name, value in fields:
        lower = name.lower()
        if lower not in CONNECTION_SPECIFIC:
            result.append((lower, value, lower in _UNINDEXED))
    return result


#: RFC 9113, 8.2.2; TE is a request's field.
CONNECTION_SPECIFIC: Final = frozenset(
    {b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"}
)

# Secrets, and values that hardly ever come again: they would only push others out of the table.
_UNINDEXED: Final = frozenset(
    {b"set-cookie", b"content-length", b"content-range", b"etag", b"last-modified", b"x-request-id", b"age"}
)


def changes_table(block: bytes, coded: list[tuple[int, int, int]] | None = None) -> bool:
    """Say whether decoding `block` changes the dynamic table; its values are not looked at.

    `coded` gets the Huffman-coded strings: twice the field's number, plus 1 for its value; start and end.
    Raises ConnectionFault when the block is cut short or a table size update comes too late.
    """
    if not block.translate(None, _INDEXED):
        return False
    changes = False
    position = 0
    fields = 0
    end = len(block)
    try:
        while position < end:
            byte = block[position]
            position += 1
            if byte >= 0x80:
                if byte == 0xFF:
                    position = _skip_integer(block, position)
            elif 0x20 <= byte < 0x40:
                if fields:
                    raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, "a table size update behind a field")
                changes = True
                if byte == 0x3F:
                    position = _skip_integer(block, position)
                continue
            else:
                mask = 0x0F
                if byte >= 0x40:
                    changes = True
                    mask = 0x3F
                index = byte & mask
                if index == mask:
                    position = _skip_integer(block, position)
                elif index == 0:
                    position = _skip_string(block, position, coded, fields)
                position = _skip_string(block, position, coded, fields + 1)
            fields += 2
    except IndexError:
        position = end + 1
    if position > end:
        raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, "a header block is cut short")
    return changes


# Private


def _skip_integer(block: bytes, position: int) -> int:
    while block[position] >= 0x80:
        position += 1
    return position + 1


def _skip_string(block: bytes, position: int, coded: list[tuple[int, int, int]] | None, number: int) -> int:
    first = block[position]
    length = first & 0x7F
    position += 1
    if length == 0x7F:
        shift = 0
        byte = 0x80
        while byte >= 0x80:
            byte = block[position]
            position += 1
            length += (byte & 0x7F) << shift
            shift += 7
            if shift > 35:
                raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, "a string's length is no length")
    if first >= 0x80 and length and coded is not None:
        coded.append((number, position, position + length))
    return position + length


def _check_padding(block: bytes, fields: HeaderList, coded: list[tuple[int, int, int]]) -> None:
    """Refuse Huffman-coded strings that do not end as RFC 7541, 5.2 wants: in up to seven bits, all ones."""
    for number, start, end in coded:
        name, value, _ = fields[number >> 1]
        text = value if number & 1 else name
        # A number modulo 255 is the sum of its digits in base 256, here of the lengths of the codes; and the
        # padding is far smaller. `sum` would take three times as long. The decoder has refused eight bits.
        padding = (8 * (end - start) - int.from_bytes(text.translate(_CODE_BITS), "big")) % 255
        if (block[end - 1] + 1) & ((1 << padding) - 1):
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, "a Huffman-coded string ends in no padding")


# Bits of the Huffman code of each byte (RFC 7541, appendix B).
_CODE_BITS: Final = bytes.fromhex(
    "0d171c1c1c1c1c1c1c181e1c1c1e1c1c1c1c1c1c1c1c1e1c1c1c1c1c1c1c1c1c060a0a0c0d06080b0a0a080b08060606"
    "0505050606060606060607080f060c0a0d06070707070707070707070707070707070707070707070807080d130d0e06"
    "0f05060506050606060507070606060506070605050607070707070f0b0e0d1c14161414161616171617171717171817"
    "181816171817171717151617161717181615141616171715171616181516171715151615171617171416161617161617"
    "1a1a1413161716191a1a1a1b1b1a181913151a1b1b1a1b1815151a1a1c1b1b1b14181415161515171616191918181a17"
    "1a1b1a1a1b1b1b1b1b1c1b1b1b1b1b1a"
)
