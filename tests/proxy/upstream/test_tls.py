"""TLS to backends: which context, SNI, verification, pins."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from portero_py.config.model import Proxy
from portero_py.core.model import Backend
from portero_py.demo.self_signed import Authority, KeyPair, self_signed
from portero_py.errors import ConfigError, UpstreamTlsFailed
from portero_py.proxy.upstream.tls import UpstreamTls

AUTHORITY = Authority()
SIGNED = AUTHORITY.issue("app.example")
SELF_SIGNED = self_signed("whatever.example", days=-1)


@asynccontextmanager
async def backend(pair: KeyPair, folder: Path, pin: str = "") -> AsyncIterator[tuple[Backend, list[object]]]:
    """A TLS server, the Backend that stands for it, and the names (SNI) and bytes that it received."""
    received: list[object] = []
    pair.write(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "fullchain.pem", folder / "privkey.pem")
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.sni_callback = lambda _tls, name, _context: received.append(name)

    class Server(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            received.append(data)

    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, ssl=context)
    try:
        port = server.sockets[0].getsockname()[1]
        yield Backend("127.0.0.1", port, use_tls=True, tls_fingerprint=pin), received
    finally:
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0.01)


async def connect(tls: UpstreamTls, to: Backend, host: str = "app.example") -> asyncio.Transport:
    """Connect as the pool does."""
    transport, _ = await asyncio.get_running_loop().create_connection(
        asyncio.Protocol, to.host, to.port, ssl=tls.context(to), server_hostname=host
    )
    return transport


async def test_without_verification_any_certificate_does_and_the_name_is_the_host(tmp_path: Path) -> None:
    tls = UpstreamTls(Proxy())
    async with backend(SELF_SIGNED, tmp_path) as (there, received):
        transport = await connect(tls, there)
        tls.check_pin(there, transport)
        secure = transport.get_extra_info("ssl_object")
        assert secure.selected_alpn_protocol() == "http/1.1"
        transport.close()
        assert received == ["app.example"]


async def test_with_verification_the_host_must_be_covered_by_a_trusted_certificate(tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_bytes(AUTHORITY.pem)
    tls = UpstreamTls(Proxy(upstream_tls_verify=True, upstream_ca_file=str(bundle)))
    async with backend(SIGNED, tmp_path / "signed") as (there, received):
        transport = await connect(tls, there)
        tls.check_pin(there, transport)
        transport.close()
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            await connect(tls, there, "other.example")
    async with backend(SELF_SIGNED, tmp_path / "self") as (there, _):
        with pytest.raises(ssl.SSLCertVerificationError):
            await connect(tls, there, "whatever.example")
    assert received == ["app.example", "other.example"]


async def test_without_a_bundle_the_systems_authorities_are_asked(tmp_path: Path) -> None:
    tls = UpstreamTls(Proxy(upstream_tls_verify=True))
    async with backend(SIGNED, tmp_path) as (there, _):
        assert tls.context(there).verify_mode is ssl.CERT_REQUIRED
        with pytest.raises(ssl.SSLCertVerificationError):
            await connect(tls, there)


@pytest.mark.parametrize("verify", [False, True])
async def test_a_pinned_backend_needs_no_authority_no_name_and_no_date(tmp_path: Path, verify: bool) -> None:
    tls = UpstreamTls(Proxy(upstream_tls_verify=verify))
    async with backend(SELF_SIGNED, tmp_path, SELF_SIGNED.fingerprint) as (there, _):
        transport = await connect(tls, there)
        tls.check_pin(there, transport)
        transport.close()


async def test_a_backend_with_another_certificate_than_its_pin_gets_not_a_byte(tmp_path: Path) -> None:
    tls = UpstreamTls(Proxy())
    async with backend(SIGNED, tmp_path, SELF_SIGNED.fingerprint) as (there, received):
        transport = await connect(tls, there)
        with pytest.raises(UpstreamTlsFailed) as caught:
            tls.check_pin(there, transport)
        transport.abort()
        assert str(caught.value) == (
            f"backend {there.address} pinned {SELF_SIGNED.fingerprint} but presented {SIGNED.fingerprint}"
        )
        await asyncio.sleep(0.02)
        assert received == ["app.example"]  # the name, and nothing after it


class NoTls(asyncio.Transport):
    """A transport without TLS, as a pool's bug would hand it over."""


def test_a_pin_is_never_met_without_tls() -> None:
    pinned = Backend("127.0.0.1", 1, use_tls=True, tls_fingerprint="00" * 32)
    with pytest.raises(UpstreamTlsFailed, match="presented none"):
        UpstreamTls(Proxy()).check_pin(pinned, NoTls())


def test_contexts_are_made_once() -> None:
    tls = UpstreamTls(Proxy(upstream_tls_verify=True))
    one, two = Backend("::1", 1, use_tls=True), Backend("::1", 2, use_tls=True)
    pinned = Backend("::1", 3, use_tls=True, tls_fingerprint="00" * 32)
    assert tls.context(one) is tls.context(two)
    assert tls.context(pinned) is not tls.context(one)


def test_a_bundle_that_cannot_be_used_is_an_error_in_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    with pytest.raises(ConfigError, match=r"--upstream-ca-file .*missing.pem: No such file or directory"):
        UpstreamTls(Proxy(upstream_tls_verify=True, upstream_ca_file=str(missing)))
    empty = tmp_path / "empty.pem"
    empty.touch()
    with pytest.raises(ConfigError, match="no usable PEM certificates"):
        UpstreamTls(Proxy(upstream_tls_verify=True, upstream_ca_file=str(empty)))


def test_a_bundle_is_not_read_when_nothing_is_verified() -> None:
    UpstreamTls(Proxy(upstream_ca_file="/nowhere"))
