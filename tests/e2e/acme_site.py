"""A proxy that gets its certificates from Pebble: both on loopback, with folders of their own."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryptography import x509

from tests.e2e.pebble import Pebble
from tests.e2e.proxy_process import ProxyProcess, free_port
from tests.e2e.waiting import eventually

#: Seconds in which a certificate comes, on a busy machine.
ISSUE_PATIENCE = 60.0


class AcmeSite:
    """Folders and ports of one proxy; `start` it as often as needed. `directory` is the CA's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certs, self.state = folder / "certs", folder / "state"
        self.certs.mkdir(parents=True)
        self.state.mkdir(mode=0o700)
        self.tls_port, self.http_port = free_port(), free_port()
        self.directory, self.ca_file = "", Path()
        self._proxies: list[ProxyProcess] = []

    def use(self, pebble: Pebble) -> AcmeSite:
        """Get certificates from there."""
        self.directory, self.ca_file = pebble.directory, pebble.ca_file
        return self

    def flags(self) -> list[str]:
        """What commands need to find the same CA and the same folders."""
        return [
            *("--tls-cert-dir", str(self.certs), "--state-dir", str(self.state)),
            *("--acme-directory", self.directory, "--acme-ca-file", str(self.ca_file)),
        ]

    def start(
        self,
        *domains: str,
        challenge: str = "auto",
        http: bool = True,
        more: Sequence[str] = (),
        toml: str = "",
    ) -> ProxyProcess:
        """Start the proxy; the caller stops or kills it."""
        flags = [
            *("--listen-addr", f"127.0.0.1:{self.tls_port}"),
            *self.flags()[2:],
            *("--acme-agree-tos", "--acme-challenge", challenge),
            *(flag for domain in domains for flag in ("--acme-domain", domain)),
            *(("--http-addr", f"127.0.0.1:{self.http_port}") if http else ()),
            *more,
        ]
        proxy = ProxyProcess(
            self.folder / f"proxy-{len(self._proxies)}",
            certificates=self.certs,
            toml=toml or "[timeouts]\ndrain = 2\nshutdown = 5\n",
            flags=flags,
        )
        self._proxies.append(proxy)
        return proxy.start()

    def end(self) -> None:
        """Leave nobody behind when a test has failed."""
        for proxy in self._proxies:
            if proxy.is_running:
                proxy.kill()

    # What became of it

    def leaf(self, name: str) -> x509.Certificate | None:
        """The certificate in the folder."""
        path = self.certs / name / "fullchain.pem"
        return x509.load_pem_x509_certificate(path.read_bytes()) if path.exists() else None

    def issued(self, name: str, *, other_than: int = 0, patience: float = ISSUE_PATIENCE) -> x509.Certificate:
        """Wait for a certificate that is installed and served, whose serial number is a new one."""

        def look() -> x509.Certificate | None:
            found = self.leaf(name)
            if found is None or found.serial_number == other_than:
                return None
            return found if presented(self.tls_port, name) == found else None

        found = eventually(look, f"{name} has a certificate", patience)
        assert found is not None
        return found

    def issued_wildcard(self, parent: str) -> x509.Certificate:
        """Wait for the first certificate of `*.<parent>`, installed and served."""

        def look() -> x509.Certificate | None:
            found = self.leaf(f"_wildcard.{parent}")
            return found if found and presented(self.tls_port, f"x.{parent}") == found else None

        found = eventually(look, f"*.{parent} has a certificate", ISSUE_PATIENCE)
        assert found is not None
        return found

    def progress(self, name: str) -> dict[str, Any]:
        """The state that is on disk."""
        found = list(self.state.glob(f"acme/*/{name}/progress.json"))
        return dict(json.loads(found[0].read_text())) if found else {}

    def change_progress(self, name: str, **values: object) -> None:
        """Change the state on disk, as if time had passed."""
        path = next(self.state.glob(f"acme/*/{name}/progress.json"))
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    def account(self) -> dict[str, Any]:
        """The account that is on disk."""
        return dict(json.loads(next(self.state.glob("acme/*/account.json")).read_text()))


def presented(port: int, name: str, *protocols: str) -> x509.Certificate | None:
    """What the listener shows to a client that asks for `name`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(list(protocols))
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=60) as plain,
            context.wrap_socket(plain, server_hostname=name) as secure,
        ):
            shown = x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")
            with suppress(OSError):
                secure.unwrap()  # leave in order: when it returns the listener knows
            return shown
    except OSError:
        return None


def in_the_future(seconds: float) -> float:
    """Epoch seconds."""
    return time.time() + seconds
