"""BIND on loopback: primaries that take updates, secondaries that lag until they are told, a root of its own.

Nothing is ever asked of the outside: the root zone is here too.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.query
import dns.rdatatype
import pytest

from tests.e2e.waiting import eventually

KEY: Final = "portero-test"
#: base64.
SECRET: Final = "dGhlIHNlY3JldCBvZiB0aGUgc3VpdGUsIDMyIGJ5dGVz"
PATH: Final = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"

_SOA: Final = "$TTL 1\n@ SOA ns1.test. admin.test. 1 3600 600 86400 1\n@ NS ns1.test.\n"

#: Zone -> its records beside SOA and the first NS. Updates are taken for those that end in `.example`.
ZONES: Final = {
    ".": "ns1.test. A 127.0.0.1\nns2.test. A 127.0.0.2\n",
    "test": "ns1 A 127.0.0.1\nns2 A 127.0.0.2\n",
    "a.example": "@ NS ns2.test.\n",
    "b.example": "_acme-challenge CNAME b.acme.example.\n_acme-challenge.c CNAME _acme-challenge.b.example.\n"
    "_acme-challenge.round CNAME _acme-challenge.about\n_acme-challenge.about CNAME _acme-challenge.round\n",
    "acme.example": "",
    "static.test": "_acme-challenge TXT other\n",
}


class NameServer:
    """One BIND. With `primary` it copies `a.example` from there; else it has `ZONES`."""

    host: Final = "127.0.0.1"

    def __init__(self, folder: Path, primary: NameServer | None = None) -> None:
        program = shutil.which("named", path=PATH)
        if program is None:
            pytest.skip("named is not installed")
        folder.mkdir(parents=True)
        self.folder, self.port = folder, _free_port()
        # A copy: AppArmor, where it is there, knows the real one by its path, and forbids it these folders.
        self._program = shutil.copy(program, folder / "named")
        zones = _copied(primary) if primary is not None else "".join(map(self._zone, ZONES))
        (folder / "named.conf").write_text(
            f'options {{ directory "{folder}"; listen-on port {self.port} {{ {self.host}; }};\n'
            "  listen-on-v6 { none; }; pid-file none; session-keyfile none; lock-file none;\n"
            "  recursion yes; notify no; dnssec-validation no; empty-zones-enable no;\n"
            "  allow-query { any; }; allow-recursion { any; };\n"
            "  allow-transfer { any; }; allow-notify { any; }; };\n"
            "controls { };\n"
            f'key "{KEY}" {{ algorithm hmac-sha256; secret "{SECRET}"; }};\n'
            f'key "stranger" {{ algorithm hmac-sha256; secret "{SECRET}"; }};\n{zones}'
        )
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """`host:port`."""
        return f"{self.host}:{self.port}"

    def start(self) -> NameServer:
        """Start it, and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "-g", "-n", "1", "-c", str(self.folder / "named.conf")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            eventually(lambda: self.serial("a.example"), "BIND answers")
        except AssertionError:
            self.stop()
            raise AssertionError(self._log.read_text()) from None
        return self

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def ask(self, name: str, kind: str) -> dns.message.Message | None:
        """What it says; None when it does not."""
        question = dns.message.make_query(name, kind)
        try:
            return dns.query.tcp(question, self.host, timeout=5, port=self.port)
        except (OSError, EOFError, dns.exception.DNSException):
            return None

    def texts(self, name: str) -> list[str]:
        """The TXT values of a name."""
        answer = self.ask(name, "TXT")
        assert answer is not None
        return [
            b"".join(each.strings).decode()
            for group in answer.answer
            if group.rdtype == dns.rdatatype.TXT
            for each in group
        ]

    def serial(self, zone: str) -> int:
        """The number of the zone's version, 0 when it has none."""
        answer = self.ask(zone, "SOA")
        if answer is None or not answer.answer or not answer.flags & dns.flags.AA:
            return 0
        return int(answer.answer[0][0].serial)

    def notify(self, zone: str) -> None:
        """Tell it that its primary has another version."""
        message = dns.message.make_query(zone, "SOA")
        message.set_opcode(dns.opcode.NOTIFY)
        dns.query.udp(message, self.host, timeout=20, port=self.port)

    # Private

    def _zone(self, name: str) -> str:
        file = f"{name.strip('.') or 'root'}.zone"
        (self.folder / file).write_text(_SOA + ZONES[name])
        update = f"allow-update {{ key {KEY}; }}; " if name.endswith("example") else ""
        return f'zone "{name}" {{ type primary; file "{file}"; {update}}};\n'


def update_flags(folder: Path, servers: Sequence[NameServer], secret: str = SECRET) -> list[str]:
    """What portero needs to make records at the first, and to look for them at all."""
    file = folder / "tsig-secret"
    file.write_text(f"{secret}\n")
    return [
        *("--acme-dns-server", servers[0].address, "--acme-dns-resolver", servers[0].address),
        *("--acme-dns-tsig-name", KEY, "--acme-dns-tsig-secret-file", str(file)),
        *(flag for server in servers for flag in ("--acme-dns-check", server.address)),
    ]


# Private


def _free_port() -> int:
    """A port that is free for UDP and TCP."""
    while True:
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", 0))
            try:
                udp.bind(tcp.getsockname())
            except OSError:
                continue
            return int(tcp.getsockname()[1])


def _copied(primary: NameServer) -> str:
    return (
        f'zone "a.example" {{ type secondary; primaries {{ {primary.host} port {primary.port}; }};\n'
        '  file "a.copy"; masterfile-format text; };\n'
    )
