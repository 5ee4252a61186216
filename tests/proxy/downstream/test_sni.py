"""The listener's TLS against Python's own TLS client, over loopback, on asyncio and on uvloop."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import ssl
import sys
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from portero_py.config.model import Tls
from portero_py.core.certificate_pairs import parse_pair
from portero_py.core.certificates import Certificate, CertificateTable
from portero_py.errors import BadCertificate
from portero_py.proxy.downstream.sni import EAGER, FrontSSLObject, FrontTls, Trial, load_pair
from portero_py.proxy.downstream.tls import TlsTransport
from tests.odd_pairs import Key, signed
from tests.proxy.downstream.tls_listener import Play, accepting, client, issued, table
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

A = issued("a.example")
B = issued("b.example")
WILD = issued("*.w.example")


class Said(asyncio.Protocol):
    """Says what it knows about the connection, then echoes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        tls = transport.get_extra_info("ssl_object")
        assert isinstance(tls, FrontSSLObject)
        assert tls.certificate is not None
        line = f"{tls.sni or '-'} {tls.certificate.name} {tls.version()} {tls.selected_alpn_protocol()}\n"
        self.transport.write(line.encode())

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Front:
    """A listener and clients for it. Everything that blocks runs in threads."""

    def __init__(self, tls: FrontTls, port: int) -> None:
        self.tls = tls
        self.port = port

    def results(self) -> dict[tuple[str, str, str], int]:
        gc.collect()
        return dict(self.tls.counters.handshakes)

    async def result(self) -> str:
        """What became of the one handshake."""
        await until(self.results)
        ((key, count),) = self.results().items()
        assert count == 1
        return key[2]

    def _connect(
        self, sni: str | None, context: ssl.SSLContext | None, session: ssl.SSLSession | None
    ) -> tuple[ssl.SSLSocket, str]:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        try:
            secure = (context or client()).wrap_socket(plain, server_hostname=sni, session=session)
        except BaseException:
            plain.close()
            raise
        try:
            return secure, secure.recv(1000).decode().strip()
        except BaseException:
            secure.close()
            raise

    async def connect(
        self,
        sni: str | None,
        context: ssl.SSLContext | None = None,
        session: ssl.SSLSession | None = None,
    ) -> tuple[ssl.SSLSocket, str]:
        return await asyncio.to_thread(self._connect, sni, context, session)

    async def ask(self, sni: str | None, context: ssl.SSLContext | None = None) -> str:
        """Connect, and return what the listener said: SNI, certificate, version, ALPN."""
        secure, line = await self.connect(sni, context)
        secure.close()
        return line

    async def session(
        self, sni: str, context: ssl.SSLContext, session: ssl.SSLSession | None = None
    ) -> tuple[bool, ssl.SSLSession | None]:
        """Connect; whether the session was resumed, and the session for the next time."""
        secure, _ = await self.connect(sni, context, session)
        reused, fresh = bool(secure.session_reused), secure.session
        secure.close()
        return reused, fresh

    async def send(self, data: bytes) -> bytes:
        """Send raw bytes and return what comes back until the listener closes."""

        def talk() -> bytes:
            got = b""
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as plain:
                plain.sendall(data)
                plain.shutdown(socket.SHUT_WR)
                with suppress(ConnectionResetError):
                    while part := plain.recv(1000):
                        got += part
            return got

        return await asyncio.to_thread(talk)


@asynccontextmanager
async def listening(
    *certificates: Certificate, tls: Tls | None = None, handshake: float = 5
) -> AsyncIterator[Front]:
    front = FrontTls(tls or Tls())
    front.apply(table(*certificates))

    def opened(transport: TlsTransport) -> Said:
        said = Said()
        said.connection_made(transport)
        return said

    async with accepting(front, opened, handshake) as (port, _):
        yield Front(front, port)


def hello_with_name(name: bytes) -> bytes:
    """A real ClientHello, with any bytes as its server name."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    stand_in = "x" * len(name)
    tls = client().wrap_bio(incoming, outgoing, server_hostname=stand_in)
    with suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = outgoing.read()
    assert stand_in.encode() in hello
    return hello.replace(stand_in.encode(), name)


# Choosing


def test_each_name_gets_its_certificate_and_the_rest_get_the_default(play: Play) -> None:
    async def scene() -> None:
        async with listening(A, B, WILD) as front:
            assert await front.ask("a.example") == "a.example a.example TLSv1.3 None"
            assert await front.ask("B.Example") == "b.example b.example TLSv1.3 None"
            assert await front.ask("q.w.example") == "q.w.example *.w.example TLSv1.3 None"
            assert await front.ask("unknown.example") == "unknown.example *.w.example TLSv1.3 None"
            assert await front.ask(None) == "- *.w.example TLSv1.3 None"

    play(scene)


def test_the_certificate_on_the_wire_is_the_one_that_was_noted(play: Play) -> None:
    async def scene() -> None:
        async with listening(A, B) as front:
            for certificate in (A, B):
                context = client()
                context.check_hostname = True
                secure, _ = await front.connect(certificate.name, context)
                der = secure.getpeercert(binary_form=True)
                secure.close()
                assert der is not None
                assert ssl.DER_cert_to_PEM_cert(der).encode() in certificate.chain_pem

    play(scene)


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (("h2", "http/1.1"), "h2"),
        (("http/1.1", "h2"), "h2"),
        (("http/1.1",), "http/1.1"),
        (("spdy/3",), "None"),
        ((), "None"),
    ],
)
def test_alpn_prefers_h2(play: Play, offered: tuple[str, ...], chosen: str) -> None:
    async def scene() -> None:
        async with listening(A) as front:
            assert (await front.ask("a.example", client(*offered))).split()[-1] == chosen

    play(scene)


@pytest.mark.parametrize(
    "name",
    [b"caf\xc3\xa9.example", b"\xff" * 30, b"a..b..c", b"x\nlevel=error", b"*.w.example", b"a.example:1"],
)
def test_a_garbage_name_causes_no_traceback(play: Play, name: bytes) -> None:
    async def scene() -> None:
        async with listening(A, B, WILD) as front:
            answer = await front.send(hello_with_name(name))
            assert answer[0] in (0x15, 0x16)  # an alert, or the default certificate's ServerHello
            result = await front.result()
            assert result == ("gone" if name.isascii() else "bad_name")

    play(scene)


# Versions and ciphers


def test_tls_1_2_is_the_least_by_default(play: Play) -> None:
    async def scene() -> None:
        async with listening(A) as front:
            assert "TLSv1.2" in await front.ask("a.example", client(highest=ssl.TLSVersion.TLSv1_2))

    play(scene)


def test_tls_1_3_only_refuses_1_2_with_the_alert_that_says_so(play: Play) -> None:
    async def scene() -> None:
        async with listening(A, tls=Tls(min_version="1.3")) as front:
            with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
                await front.ask("a.example", client(highest=ssl.TLSVersion.TLSv1_2))
            assert await front.result() == "unsupported_version"
            assert "TLSv1.3" in await front.ask("a.example")

    play(scene)


def test_weak_ciphers_are_refused_with_an_alert(play: Play) -> None:
    async def scene() -> None:
        async with listening(A) as front:
            weak = client(highest=ssl.TLSVersion.TLSv1_2)
            weak.set_ciphers("ECDHE-ECDSA-AES128-SHA:ECDHE-ECDSA-AES256-SHA384:AES128-GCM-SHA256")
            with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"):
                await front.ask("a.example", weak)
            assert await front.result() == "no_shared_cipher"

    play(scene)


def test_all_tls_1_2_ciphers_have_forward_secrecy_and_authenticated_encryption() -> None:
    front = FrontTls(Tls())
    old = [cipher["name"] for cipher in front.context.get_ciphers() if cipher["protocol"] != "TLSv1.3"]
    assert len(old) == 6
    assert all(name.startswith("ECDHE-") and ("GCM" in name or "CHACHA20" in name) for name in old)
    for option in (ssl.OP_NO_COMPRESSION, ssl.OP_NO_RENEGOTIATION):
        assert front.context.options & option
    assert not front.context.options & ssl.OP_NO_TICKET


# Trials


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize(
    "key",
    [
        ec.SECP256R1(),
        ec.SECP384R1(),
        ec.SECP521R1(),
        rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate(),
        ed448.Ed448PrivateKey.generate(),
    ],
    ids=["P-256", "P-384", "P-521", "RSA", "Ed25519", "Ed448"],
)
def test_pairs_that_clients_can_use_pass_their_trial(key: Key | ec.EllipticCurve, version: str) -> None:
    pair = signed("odd.example", key)
    Trial(Tls(min_version=version))(parse_pair("odd.example", pair.chain_pem, pair.key_pem, "x"))


@pytest.mark.parametrize("curve", [ec.SECP256K1(), ec.SECP224R1(), ec.SECP192R1()])
def test_a_curve_that_no_client_negotiates_fails_its_trial(curve: ec.EllipticCurve) -> None:
    pair = signed("odd.example", curve)
    with pytest.raises(BadCertificate, match="OpenSSL cannot serve it: "):
        Trial(Tls())(parse_pair("odd.example", pair.chain_pem, pair.key_pem, "x"))


def test_what_the_trial_says_is_what_clients_meet(play: Play) -> None:
    """On every curve that this machine can make: no pair passes that fails, none fails that passes."""
    seen = []

    async def scene() -> None:
        for curve in (ec.SECP256K1(), ec.BrainpoolP256R1(), ec.BrainpoolP384R1(), ec.SECP521R1()):
            pair = signed("odd.example", curve)
            certificate = parse_pair("odd.example", pair.chain_pem, pair.key_pem, "x")
            try:
                Trial(Tls())(certificate)
                passed = True
            except BadCertificate:
                passed = False
            context = client()
            context.verify_mode = ssl.CERT_NONE
            async with listening(certificate) as front:
                try:
                    await front.ask("odd.example", context)
                    served = True
                except OSError:
                    served = False
            assert served is passed, curve.name
            seen.append(served)

    play(scene)
    assert seen[-1]
    assert not seen[0]


def test_a_pair_that_openssl_does_not_load_fails_its_trial() -> None:
    torn = replace(A, key_pem=B.key_pem)
    with pytest.raises(BadCertificate, match="KEY_VALUES_MISMATCH"):
        Trial(Tls())(torn)


def test_a_want_of_descriptors_is_no_fault_of_the_pair_on_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", exhausted)
    with pytest.raises(OSError, match="Too many open files"):
        Trial(Tls())(A)


# Reloading


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_sessions_are_resumed_after_a_reload(play: Play, version: ssl.TLSVersion) -> None:
    async def scene() -> None:
        async with listening(A, B) as front:
            context = client(highest=version)
            before = front.tls.context
            reused, session = await front.session("b.example", context)
            assert not reused
            front.tls.apply(table(issued("a.example"), issued("b.example"), WILD, version=2))
            assert front.tls.context is before
            reused, session = await front.session("b.example", context, session)
            assert reused
            front.tls.apply(table(issued("b.example"), version=3))
            reused, _ = await front.session("b.example", context, session)
            assert reused

    play(scene)


def test_a_client_gets_one_ticket_a_connection() -> None:
    assert FrontTls(Tls()).context.num_tickets == 1


def test_live_connections_do_not_notice_a_reload(play: Play) -> None:
    async def scene() -> None:
        async with listening(A, B) as front:
            live = [(await front.connect("a.example"))[0] for _ in range(5)]
            renewed = issued("a.example")
            front.tls.apply(table(renewed, version=2))
            for secure in live:
                await asyncio.to_thread(secure.sendall, b"still here?")
                assert await asyncio.to_thread(secure.recv, 100) == b"still here?"
                secure.close()
            secure, _ = await front.connect("a.example")
            der = secure.getpeercert(binary_form=True)
            secure.close()
            assert der is not None
            assert ssl.DER_cert_to_PEM_cert(der).encode() in renewed.chain_pem
            assert await front.ask("b.example") == "b.example a.example TLSv1.3 None"

    play(scene)


def test_only_what_changed_is_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(context: ssl.SSLContext, chain_pem: bytes, key_pem: bytes) -> None:
        loaded.append(chain_pem)
        load_pair(context, chain_pem, key_pem)

    monkeypatch.setattr("portero_py.proxy.downstream.sni.load_pair", load)
    front = FrontTls(Tls())
    front.apply(table(A, B))
    renewed = issued("b.example")
    front.apply(table(replace(A, origin="elsewhere"), renewed, version=2))
    assert loaded == [A.chain_pem, B.chain_pem, renewed.chain_pem]
    assert front.table.version == 2


def test_a_pair_that_openssl_refuses_leaves_the_others_and_its_former_version(
    caplog: pytest.LogCaptureFixture,
) -> None:
    front = FrontTls(Tls())
    front.apply(table(A))
    front.apply(table(replace(A, key_pem=B.key_pem), replace(B, key_pem=A.key_pem), WILD, version=2))
    assert front.table.certificates == (WILD, A)
    assert [record.getMessage() for record in caplog.records] == [
        "certificate certs/a.example cannot be served: KEY_VALUES_MISMATCH",
        "certificate certs/b.example cannot be served: KEY_VALUES_MISMATCH",
    ]


def test_pairs_are_loaded_without_touching_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event in {"open", "tempfile.mkstemp"}:
            opened.append(arguments[0])

    watching = True
    sys.addaudithook(audit)  # there is no way to take one away again: it is switched off instead
    FrontTls(Tls()).apply(table(A))
    watching = False
    assert all(isinstance(name, int) for name in opened)


def test_a_system_without_memfd_uses_a_temporary_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    front = FrontTls(Tls())
    front.apply(table(A))
    assert front.table.certificates == (A,)


def test_many_certificates_are_loaded_when_the_first_client_asks(play: Play) -> None:
    def many(version: int, *others: Certificate) -> CertificateTable:
        names = (f"m{number:03}.example" for number in range(3 * EAGER))
        return CertificateTable([*(replace(WILD, name=name) for name in names), *others], version)

    async def scene() -> None:
        async with listening() as front:
            front.tls.apply(many(1, replace(A, name="z.example")))
            assert len(front.tls._contexts) == EAGER
            assert await front.ask("z.example") == "z.example z.example TLSv1.3 None"
            assert len(front.tls._contexts) == EAGER + 1
            front.tls.apply(many(2, replace(A, name="z.example")))
            assert len(front.tls._contexts) == EAGER + 1

    play(scene)


def test_a_bad_pair_that_is_noticed_late_falls_back_to_its_former_version_or_to_the_default(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = FrontTls(Tls())
    front.apply(table(A))
    monkeypatch.setattr("portero_py.proxy.downstream.sni.EAGER", 0)
    front.apply(table(replace(A, key_pem=B.key_pem), replace(B, key_pem=A.key_pem), version=2))
    front.apply(table(replace(A, key_pem=WILD.key_pem), replace(B, key_pem=A.key_pem), version=3))
    assert caplog.records == []
    for name in ("a.example", "b.example", "a.example"):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = front.context.wrap_bio(incoming, outgoing, server_side=True)
        incoming.write(hello_with_name(name.encode()))
        with pytest.raises(ssl.SSLWantReadError):
            server.do_handshake()
        assert server.certificate is A
    assert len(caplog.records) == 2
    assert front.table.certificates == (A,)
    assert front.table.version == 3


def test_a_want_of_descriptors_refuses_one_client_and_blames_no_certificate(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(*_: object) -> int:
        raise OSError(24, "Too many open files")

    front = FrontTls(Tls())
    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", no_more)
        front.apply(table(A))
    for shortage in (True, False):
        with monkeypatch.context() as patch:
            if shortage:
                patch.setattr(os, "memfd_create", no_more)
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            server = front.context.wrap_bio(incoming, outgoing, server_side=True)
            incoming.write(hello_with_name(b"a.example"))
            with pytest.raises(ssl.SSLError if shortage else ssl.SSLWantReadError):
                server.do_handshake()
        assert outgoing.read()[:1] == (b"\x15" if shortage else b"\x16")  # an alert, or the server's hello
        assert server.certificate is (None if shortage else A)
    line = "a certificate cannot be loaded: [Errno 24] Too many open files"
    assert [record.getMessage() for record in caplog.records] == [line, line]


# Refusals, and how they are counted


def test_without_certificates_clients_are_refused_until_one_appears(play: Play) -> None:
    async def scene() -> None:
        async with listening() as front:
            with pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
                await front.ask("a.example")
            assert await front.result() == "no_certificate"
            front.tls.apply(table(A))
            assert await front.ask("a.example") == "a.example a.example TLSv1.3 None"

    play(scene)


def test_handshakes_are_counted_by_version_and_alpn(play: Play) -> None:
    async def scene() -> None:
        async with listening(A) as front:
            await front.ask("a.example", client("h2"))
            await front.ask("a.example", client("h2"))
            await front.ask("a.example", client("http/1.1", highest=ssl.TLSVersion.TLSv1_2))
            assert front.results() == {("TLSv1.3", "h2", "ok"): 2, ("TLSv1.2", "http/1.1", "ok"): 1}

    play(scene)


def test_a_client_that_does_not_trust_the_certificate_is_counted(play: Play) -> None:
    async def scene() -> None:
        async with listening(A) as front:
            with pytest.raises(ssl.SSLCertVerificationError):
                await front.ask("a.example", client(trusting=False))
            assert await front.result() == "certificate_refused"

    play(scene)


@pytest.mark.parametrize(
    ("sent", "result"),
    [
        (b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", "http_request"),
        (b"\x00\x01\x02\x03" * 20, "not_tls"),
        (b"\x16\x03\x01\x00\x05hello", "failed"),
        (b"\x16\x03\x01", "gone"),
        (b"", "gone"),
    ],
)
def test_bytes_that_are_no_handshake_are_counted(play: Play, sent: bytes, result: str) -> None:
    async def scene() -> None:
        async with listening(A) as front:
            await front.send(sent)
            assert await front.result() == result

    play(scene)


def test_a_client_that_stays_silent_is_ended_by_the_time_out(play: Play) -> None:
    async def scene() -> None:
        async with listening(A, handshake=0.2) as front:

            def wait() -> bytes:
                with socket.create_connection(("127.0.0.1", front.port), timeout=5) as plain:
                    with suppress(ConnectionResetError):
                        return plain.recv(100)
                    return b""

            assert await asyncio.to_thread(wait) == b""
            assert await front.result() == "gone"

    play(scene)


def test_a_client_that_ignores_its_alert_is_ended_by_its_next_bytes(play: Play) -> None:
    async def scene() -> None:
        async with listening(A) as front:

            def insist() -> float:
                with socket.create_connection(("127.0.0.1", front.port), timeout=5) as plain:
                    plain.sendall(b"\x16\x03\x01\x00\x05hello")
                    assert plain.recv(100)[0] == 0x15
                    started = time.monotonic()
                    plain.sendall(b"hello?")
                    with suppress(ConnectionResetError):
                        assert plain.recv(100) == b""
                    return time.monotonic() - started

            assert await asyncio.to_thread(insist) < 2
            assert await front.result() == "failed"

    play(scene)


def test_a_bug_in_the_choice_is_logged_and_refuses_one_client_only(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(CertificateTable):
        def select(self, sni: str | None) -> Certificate | None:
            raise ZeroDivisionError

    front = FrontTls(Tls())
    front._table = Broken([A])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = front.context.wrap_bio(incoming, outgoing, server_side=True)
    incoming.write(hello_with_name(b"a.example"))
    with pytest.raises(ssl.SSLError, match="CALLBACK_FAILED"):
        server.do_handshake()
    assert outgoing.read()[-2:] == b"\x02\x50"  # fatal, internal_error
    assert front.counters.handshakes == {("", "", "failed"): 1}
    assert caplog.records[0].exc_info is not None


def test_other_peoples_unraisable_errors_reach_their_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(type(unraisable.exc_value)))

    class Noisy:
        def __del__(self) -> None:
            raise KeyError

    class NoisyTable(CertificateTable):
        def select(self, sni: str | None) -> Certificate | None:
            Noisy()
            return super().select(sni)

    front = FrontTls(Tls())
    front.apply(table(A))
    front._table = NoisyTable([A])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = front.context.wrap_bio(incoming, outgoing, server_side=True)
    incoming.write(hello_with_name(b"a.example"))
    hook = sys.unraisablehook
    with pytest.raises(ssl.SSLWantReadError):
        server.do_handshake()
    assert seen == [KeyError]
    assert sys.unraisablehook is hook
    assert server.certificate is A
