"""A TLS client that has every byte in its hands: it can hold records back, cut them, join them, break them.

Everything here blocks, and so belongs in a thread. `ForgingWire` seals records itself, with the secrets that
OpenSSL tells, so that it can send what no honest TLS library would.
"""

from __future__ import annotations

import hmac
import select
import socket
import ssl
import struct
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.proxy.downstream.tls_listener import client

#: What kind of end it was, beside the reason of OpenSSL for an alert.
NOTIFIED, RAGGED, RESET = "close_notify", "FIN without a word", "reset"

HANDSHAKE, APPLICATION_DATA = 22, 23
ASK_FOR_NEW_KEYS = b"\x18\x00\x00\x01\x01"


def narrow_socket(port: int) -> socket.socket:
    """A connection whose kernel takes little before it is read."""
    plain = socket.socket()
    plain.settimeout(10)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    plain.connect(("127.0.0.1", port))
    return plain


class Wire:
    """One connection; `shake` it before anything else."""

    def __init__(
        self,
        port: int,
        context: ssl.SSLContext | None = None,
        session: ssl.SSLSession | None = None,
        *,
        name: str = "a.example",
    ) -> None:
        self.socket = narrow_socket(port)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = (context or client()).wrap_bio(
            self.incoming, self.outgoing, server_hostname=name, session=session
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    # The handshake

    def hello(self) -> bytes:
        """The first flight, not sent."""
        with suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self.outgoing.read()

    def shake(self, send: Callable[[bytes], object] | None = None) -> Self:
        """The whole handshake; each flight leaves through `send`."""
        (send or self.socket.sendall)(self.shake_but_last())
        return self

    def shake_but_last(self) -> bytes:
        """The handshake up to the client's last flight, which is returned and not sent."""
        while True:
            try:
                self.tls.do_handshake()
                return self.outgoing.read()
            except ssl.SSLWantReadError:
                self.socket.sendall(self.outgoing.read())
                self._receive()

    # Records

    def seal(self, data: bytes) -> bytes:
        """The records for `data`."""
        view = memoryview(data)
        while view:
            view = view[self.tls.write(view) :]
        return self.outgoing.read()

    def farewell(self) -> bytes:
        """The record that ends this side of TLS."""
        with suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        return self.outgoing.read()

    def send(self, data: bytes) -> None:
        self.socket.sendall(self.seal(data))

    def send_until_cut_off(self, data: bytes) -> None:
        """Send, and do not mind when nobody takes it any more."""
        with suppress(ConnectionError):
            self.send(data)

    def read(self, size: int) -> bytes:
        """Exactly so many bytes."""
        got = bytearray()
        while len(got) < size:
            try:
                part = self.tls.read(size - len(got))
                assert part, "the listener said goodbye"
                got += part
            except ssl.SSLWantReadError:
                assert self._receive(), "the listener closed"
        return bytes(got)

    def read_all(self) -> tuple[bytes, str]:
        """Everything until the end, and what kind of end it was."""
        got = bytearray()
        while True:
            try:
                part = self.tls.read(65536)
                if not part:
                    return bytes(got), NOTIFIED
                got += part
            except ssl.SSLWantReadError:
                try:
                    if not self._receive():
                        return bytes(got), RAGGED
                except ConnectionResetError:
                    return bytes(got), RESET
            except ssl.SSLZeroReturnError:
                return bytes(got), NOTIFIED
            except ssl.SSLError as error:
                return bytes(got), error.reason or ""

    def converse(self, data: bytes, reads: Callable[[], bool]) -> bytes:
        """Send `data` and take as much back, reading only while `reads()`."""
        left, got = memoryview(self.seal(data)), bytearray()
        deadline = time.monotonic() + 10
        while len(got) < len(data):
            assert time.monotonic() < deadline
            readable, writable, _ = select.select(
                [self.socket] if reads() else [], [self.socket] if left else [], [], 0.01
            )
            if writable:
                left = left[self.socket.send(left[:100_000], socket.MSG_DONTWAIT) :]
            if readable:
                assert self._receive(), "the listener closed"
                with suppress(ssl.SSLWantReadError):
                    while True:
                        got += self.tls.read(65536)
        return bytes(got)

    def end(self) -> str:
        """How TCP ended, when nothing more is to come."""
        try:
            data = self.socket.recv(65536)
        except ConnectionResetError:
            return RESET
        assert not data, data
        return "FIN"

    def reset(self) -> None:
        """Vanish with RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    # Private

    def _receive(self) -> int:
        data = self.socket.recv(65536)
        self.incoming.write(data)
        return len(data)


class ForgingWire(Wire):
    """TLS 1.3, and after the handshake it seals whatever it likes."""

    def __init__(self, port: int) -> None:
        context = client()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "secrets"
            context.keylog_filename = str(path)
            super().__init__(port, context)
            self.shake()
            assert self.tls.cipher()[0] == "TLS_AES_256_GCM_SHA384"  # type: ignore[index]
            lines = [line.split() for line in path.read_text().splitlines()]
        self._secret = next(bytes.fromhex(line[2]) for line in lines if line[0] == "CLIENT_TRAFFIC_SECRET_0")
        self._number = 0

    def forge(self, kind: int, content: bytes) -> bytes:
        """A record (RFC 8446, 5.2)."""
        nonce = int.from_bytes(self._expand("iv", 12)) ^ self._number
        self._number += 1
        header = struct.pack(">BHH", APPLICATION_DATA, 0x0303, len(content) + 1 + 16)
        seal = AESGCM(self._expand("key", 32))
        return header + seal.encrypt(nonce.to_bytes(12), content + bytes([kind]), header)

    def ask_for_new_keys(self) -> bytes:
        """A KeyUpdate that wants one in return; what is forged next has the new keys."""
        record = self.forge(HANDSHAKE, ASK_FOR_NEW_KEYS)
        self._secret = self._expand("traffic upd", 48)
        self._number = 0
        return record

    def take(self, size: int) -> None:
        """Take so many bytes of what the listener sends, still sealed."""
        while size > 0:
            taken = self._receive()
            assert taken, "the listener closed"
            size -= taken

    def _expand(self, label: str, size: int) -> bytes:
        name = b"tls13 " + label.encode()
        info = struct.pack(">HB", size, len(name)) + name + b"\x00\x01"
        return hmac.digest(self._secret, info, "sha384")[:size]
