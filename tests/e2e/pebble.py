"""Pebble, the CA for tests, with the DNS server that comes with it: on loopback, started by the suite.

Every name leads to 127.0.0.1. Pebble validates at the two ports it was started with, which are the proxy's.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import ssl
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.certificates import Authority
from tests.e2e.proxy_process import free_port
from tests.e2e.waiting import eventually

#: Pebble's example for external accounts: base64url, as a CA gives it.
EAB_KID = "kid-1"
EAB_HMAC = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"


@dataclass(frozen=True)
class Answer:
    """What an HTTPS server said."""

    status: int
    fields: dict[str, str]
    body: bytes


class Pebble:
    """One CA. `http_port` and `tls_port` are where it validates; `nonce_reject` in percent.

    `dns` is the name server that it asks, its own one if there is none.
    """

    def __init__(
        self,
        folder: Path,
        http_port: int,
        tls_port: int,
        *,
        nonce_reject: int = 15,
        authz_reuse: int = 0,
        eab: bool = False,
        dns: str = "",
    ) -> None:
        for program in ("pebble", "pebble-challtestsrv"):
            if shutil.which(program) is None:
                pytest.skip(f"{program} is not installed")
        folder.mkdir(parents=True)
        self.port, self._management_port = free_port(), free_port()
        self._dns_port, self._dns_management = free_port(), free_port()
        authority = Authority()
        pair = authority.issue("localhost", "127.0.0.1")
        pair.write(folder)
        self.ca_file = folder / "ca.pem"
        self.ca_file.write_bytes(authority.pem)
        config = {
            "listenAddress": f"127.0.0.1:{self.port}",
            "managementListenAddress": f"127.0.0.1:{self._management_port}",
            "certificate": str(folder / "fullchain.pem"),
            "privateKey": str(folder / "privkey.pem"),
            "httpPort": http_port,
            "tlsPort": tls_port,
            "ocspResponderURL": "",
            "externalAccountBindingRequired": eab,
            "externalAccountMACKeys": {EAB_KID: EAB_HMAC} if eab else {},
        }
        (folder / "config.json").write_text(json.dumps({"pebble": config}))
        self._log = folder / "pebble.log"
        self._environment = {
            **os.environ,
            "PEBBLE_VA_NOSLEEP": "1",
            "PEBBLE_WFE_NONCEREJECT": str(nonce_reject),
            "PEBBLE_AUTHZREUSE": str(authz_reuse),
        }
        self._commands: Sequence[Sequence[str]] = (
            [
                *("pebble-challtestsrv", "-dns01", f"127.0.0.1:{self._dns_port}", "-http01", ""),
                *("-https01", "", "-tlsalpn01", "", "-defaultIPv6", "", "-defaultIPv4", "127.0.0.1"),
                *("-management", f"127.0.0.1:{self._dns_management}"),
            ],
            [
                *("pebble", "-strict", "-config", str(folder / "config.json")),
                *("-dnsserver", dns or self.dns),
            ],
        )
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def directory(self) -> str:
        """The address that `--acme-directory` wants."""
        return f"https://127.0.0.1:{self.port}/dir"

    @property
    def dns(self) -> str:
        """Its own name server."""
        return f"127.0.0.1:{self._dns_port}"

    @property
    def dns_management(self) -> str:
        """Where the records of that can be changed."""
        return f"http://127.0.0.1:{self._dns_management}"

    def start(self) -> Pebble:
        """Start both, and wait until they answer."""
        with self._log.open("wb") as log:
            for command in self._commands:
                self._processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=self._environment,
                    )
                )
        try:
            eventually(self._answers, "Pebble answers")
        except AssertionError:
            self.stop()
            raise AssertionError(self.log()) from None
        return self

    def stop(self) -> None:
        """End both."""
        for process in self._processes:
            process.kill()
            process.wait()

    def log(self) -> str:
        """What it did."""
        return self._log.read_text("utf-8", "replace")

    def root(self) -> bytes:
        """Its root certificate, PEM: new with every start."""
        return self._get("/roots/0").body

    def lead(self, name: str, address: str) -> None:
        """Let a name lead to another address than 127.0.0.1."""
        connection = http.client.HTTPConnection("127.0.0.1", self._dns_management, timeout=60)
        try:
            connection.request("POST", "/add-a", json.dumps({"host": name, "addresses": [address]}))
            assert connection.getresponse().status == 200
        finally:
            connection.close()

    def status_of(self, serial: int) -> str:
        """`Valid` or `Revoked`."""
        answer = self._get(f"/cert-status-by-serial/{serial:x}")
        found: dict[str, Any] = json.loads(answer.body)
        return str(found["Status"])

    # Private

    def _answers(self) -> bool:
        try:
            return self._get("/roots/0").status == 200
        except OSError:
            return False

    def _get(self, path: str) -> Answer:
        return ask(self._management_port, "GET", path)


def ask(port: int, method: str, path: str, body: bytes = b"", fields: dict[str, str] | None = None) -> Answer:
    """One request to an HTTPS server on loopback, whose certificate is not looked at."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
    try:
        connection.request(method, path, body or None, fields or {})
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()
