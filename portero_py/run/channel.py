"""Between the main process and a generation: words both ways, and descriptors with them.

A message is one packet of a unix socket: JSON, `{"word": ..., ...}`, and the descriptors that belong to it.
Packets are kept apart and in order by the kernel; the end of the other side is an empty one.

The rules
- The two ends may be of different versions: a word that is not known is skipped, and so is a field. What a
  word means never changes; something new is a new word.
- Nobody waits for the other: a reader takes what is there, a writer whose peer is gone has said nothing.
- Processes without an event loop, and without threads, hear of a new message by SIGIO (`signal_arrivals`).
  Left to itself it ends a process. So whoever asks for it holds it back first and takes it by `sigwait`; who
  lets it come again has put an end to it before (`stop_signals`), and taken what waits.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

#: The longest message, bytes, and the most descriptors that come with one.
_LONGEST: Final = 65_536
_MOST: Final = 16


class Word(Enum):
    """What can be said."""

    # a generation says
    PREPARED = "prepared"  # everything is there, and nothing is served yet
    OFFERED = "offered"  # with the file of the ticket keys
    YIELDED = "yielded"  # the control plane is closed, what it knew is in memory
    HOLD = "hold"  # keep this descriptor for the next generation; field `name`
    READY = "ready"  # serves; field `patience`: seconds that its end may take
    PATIENCE = "patience"  # field `seconds`: its end may take another time than it said at READY
    NOTIFY = "notify"  # field `text`, for systemd
    # the main process says
    OFFER = "offer"  # a new generation is about to be started
    YIELD = "yield"  # close the control plane
    RESUME = "resume"  # open it again
    GO = "go"  # serve
    LEAVE = "leave"  # another one serves: drain and end


@dataclass(slots=True)
class Message:
    """A word with its fields; who receives one owns the descriptors."""

    word: Word
    fields: dict[str, Any] = field(default_factory=dict)
    descriptors: list[int] = field(default_factory=list)

    def close(self) -> None:
        """Nobody wants its descriptors."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()


class Channel:
    """One end."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self.is_over = False  # the other end is closed

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Both ends."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(one), cls(other)

    @classmethod
    def of(cls, descriptor: int) -> Channel:
        """The end that was inherited as `descriptor`."""
        os.set_inheritable(descriptor, False)
        return cls(socket.socket(fileno=descriptor))

    def fileno(self) -> int:
        """Its descriptor."""
        return self._socket.fileno()

    def signal_arrivals(self) -> None:
        """Hold SIGIO back, and have this process told by it of each message from now on, and of the end."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
        fcntl.fcntl(self._socket, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(self._socket, fcntl.F_GETFL)
        fcntl.fcntl(self._socket, fcntl.F_SETFL, flags | os.O_ASYNC)

    def stop_signals(self) -> None:
        """No SIGIO comes from here any more. It is still held back: one may have come before."""
        flags = fcntl.fcntl(self._socket, fcntl.F_GETFL)
        fcntl.fcntl(self._socket, fcntl.F_SETFL, flags & ~os.O_ASYNC)

    def say(self, word: Word, descriptors: Sequence[int] = (), **fields: Any) -> None:
        """Send one message, if there is still somebody."""
        content = json.dumps({"word": word.value, **fields}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        with contextlib.suppress(ConnectionError, BlockingIOError):
            if self._socket.fileno() >= 0:
                self._socket.sendmsg([content], rights if descriptors else [])

    def heard(self) -> list[Message]:
        """The messages that have come; afterwards `is_over` says whether more can come."""
        found = []
        while not self.is_over and self._socket.fileno() >= 0:
            try:
                content, ancillary, _, _ = self._socket.recvmsg(
                    _LONGEST, socket.CMSG_SPACE(_MOST * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                break
            except ConnectionError:
                content, ancillary = b"", []
            descriptors = array.array("i")
            for _, kind, data in ancillary:
                if kind == socket.SCM_RIGHTS:
                    descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
            if not content:
                self.is_over = True
                break
            message = _message(content, list(descriptors))
            if message is not None:
                found.append(message)
        return found

    def close(self) -> None:
        """Close this end."""
        self._socket.close()


# Private


def _message(content: bytes, descriptors: list[int]) -> Message | None:
    try:
        fields = json.loads(content)
        return Message(Word(fields.pop("word")), fields, descriptors)
    except (ValueError, KeyError, TypeError, AttributeError):  # of another version
        for descriptor in descriptors:
            os.close(descriptor)
        return None
