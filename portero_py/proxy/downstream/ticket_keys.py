"""Session ticket keys: the same in every worker, and none of them for ever.

The theory
- A ticket is a session's state, encrypted for ourselves. Whoever gets the key can read the sessions of TLS
  1.2 that were recorded, as long as the key was in use. So keys change every PERIOD and are forgotten.
- All processes change them at the same moment, without a message: the first secret is drawn before workers
  are forked, each secret makes the next one and its own keys (HMAC, one way), and how many periods have
  passed is read from a steady clock, which the processes of a machine share. From what a process holds the
  keys of the periods before the last cannot be computed.
- OpenSSL takes tickets for two hours (its session time-out). So with the keys of this period and of the
  one before every ticket is taken for all of its time. The former keys only open: they make no tickets.
- OpenSSL opens a ticket with the keys of the context with which the connection began; a change of the
  context while it shakes hands (SNI) is too late. So there are two, and the client's first bytes say which: a
  ticket begins with the 16 bytes that name its key, in the clear (RFC 5077, 4; in TLS 1.3 too), and the
  ClientHello holds the former name or it does not: nothing has to be parsed.
- Python's ssl cannot set the keys: `setter` does it with SSL_CTX_ctrl. It takes the SSL_CTX* from CPython's
  object, where it stands first behind the head, in the versions that are known here; and it believes
  nothing before a handshake in memory has shown a ticket with the name that it set. Where this is not to be
  had, each process turns to a fresh context instead: nothing breaks, but a client's session is then known to
  one worker only.
- After an upgrade the next generation goes on with the same keys (`written`, `former`): its clients come with
  tickets of the one before.
- A process turns with its next client, or when it is told to (`FrontTls.turn`): no timer.
"""

from __future__ import annotations

import contextlib
import ctypes
import hmac
import os
import ssl
import struct
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from time import monotonic
from typing import Final

#: Seconds for which a key makes tickets; it opens them for as long again. More than a ticket's two hours.
PERIOD: Final = 6 * 3600.0

#: Name (16 bytes), HMAC key and AES key (32 each): what SSL_CTX_ctrl takes.
KEYS: Final = 80
NAME: Final = 16

#: Puts keys into a context.
SetKeys = Callable[[ssl.SSLContext, bytes], None]

#: The versions of CPython whose PySSLContext begins with the SSL_CTX*.
_KNOWN: Final = frozenset({(3, 11), (3, 12), (3, 13)})
_WRITTEN: Final = struct.Struct(f"!d32s{KEYS}s")
_SET_TICKET_KEYS: Final = 59  # SSL_CTRL_SET_TLSEXT_TICKET_KEYS


class TicketKeys:
    """The keys of this period and of the one before. `clock` gives seconds, the same in all processes.

    With `written` they are those that another process had; what is no such thing is as if there were nothing.
    """

    def __init__(self, written: bytes = b"", *, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        if len(written) == _WRITTEN.size:
            self._turn_at, self._secret, former = _WRITTEN.unpack(written)
        else:
            self._turn_at, self._secret = clock() + PERIOD, os.urandom(32)
            former = os.urandom(KEYS)  # nobody's
        self.former: bytes = former
        self.current = _derived(self._secret)

    @property
    def written(self) -> bytes:
        """What another process needs to have the same keys: as secret as they are."""
        return struct.pack(_WRITTEN.format, self._turn_at, self._secret, self.former)

    @property
    def former_name(self) -> bytes:
        """What a ticket of the period before begins with."""
        return self.former[:NAME]

    def turn(self) -> bool:
        """Go on to the period that it is now; whether that is another one than at the last call."""
        now = self._clock()
        if now < self._turn_at:
            return False
        while now >= self._turn_at:
            self._secret = hmac.digest(self._secret, b"portero-py: the next secret", "sha256")
            self.former, self.current = self.current, _derived(self._secret)
            self._turn_at += PERIOD
        return True

    def forget(self) -> None:
        """From now on hold keys that nobody else has."""
        self._secret = os.urandom(32)
        self.current, self.former = os.urandom(KEYS), os.urandom(KEYS)


@cache
def setter() -> SetKeys | None:
    """What puts keys into a context of this process; None when this Python and OpenSSL do not let it."""
    if (
        sys.implementation.name != "cpython"
        or sys.version_info[:2] not in _KNOWN
        or sysconfig.get_config_var("Py_GIL_DISABLED")
    ):
        return None
    try:
        import _ssl

        control = ctypes.CDLL(_ssl.__file__).SSL_CTX_ctrl
    except (ImportError, AttributeError, OSError):
        return None  # built into the interpreter, or with hidden symbols
    control.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_char_p)
    control.restype = ctypes.c_long

    def set_keys(context: ssl.SSLContext, keys: bytes) -> None:
        pointer = ctypes.c_void_p.from_address(id(context) + object.__basicsize__).value
        if control(pointer, _SET_TICKET_KEYS, KEYS, keys) != 1:
            raise ssl.SSLError("OpenSSL refuses the ticket keys")

    return set_keys if _is_proven(set_keys) else None


# Private


def _derived(secret: bytes) -> bytes:
    parts = [hmac.digest(secret, b"portero-py: ticket keys %d" % part, "sha512") for part in range(2)]
    return b"".join(parts)[:KEYS]


def _is_proven(set_keys: SetKeys) -> bool:
    """Whether tickets bear the name that was set: a handshake of TLS 1.2 shows them in the clear."""
    keys = os.urandom(KEYS)
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    try:
        for context in (server, client):
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers("AECDH-AES128-SHA:@SECLEVEL=0")  # without certificates: nobody else is there
        set_keys(server, keys)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = (
            client.wrap_bio(to_client, to_server),
            server.wrap_bio(to_server, to_client, server_side=True),
        )
        seen = b""
        for _ in range(3):
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
            sent = to_client.read()
            to_client.write(sent)
            seen += sent
    except ssl.SSLError:
        return False
    return keys[:NAME] in seen
