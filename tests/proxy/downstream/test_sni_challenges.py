"""tls-alpn-01 on the live listener: who is shown the challenge, who is not, and what it costs nobody."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from cryptography import x509

from portero_py.config.model import Config
from portero_py.control.acme.pairs import tls_alpn_pair
from portero_py.core.certificate_pairs import parse_pair
from portero_py.core.certificates import CertificateTable
from portero_py.core.challenges import Challenges
from portero_py.demo.self_signed import Authority
from portero_py.proxy.downstream.sni import FrontTls
from portero_py.proxy.worker import Worker
from tests.proxy.downstream.tls_listener import LOOPS
from tests.waiting import until

AUTHORITY = Authority()
PAIR = AUTHORITY.issue("a.example")
CERTIFICATE = parse_pair("a.example", PAIR.chain_pem, PAIR.key_pem, "certs/a.example")
PROOF = "token.thumbprint"
PENDING = Challenges(1, {"a.example": tls_alpn_pair("a.example", PROOF)})
IDENTIFIER = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")

Scene = Callable[[Worker, int], Awaitable[None]]


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Worker, int]]:
    worker = Worker(Config(), asyncio.get_running_loop(), log_descriptor=2)
    worker.apply_certificates(CertificateTable([CERTIFICATE], 1))
    listener = socket.create_server(("127.0.0.1", 0))
    await worker.start([listener], tls=True)
    try:
        yield worker, listener.getsockname()[1]
    finally:
        await worker.drain(0.2)


@pytest.fixture(params=LOOPS)
def play(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Callable[[Scene], None]:
    """Run a scene with a worker on one kind of loop; the log must stay silent."""

    def run(scene: Scene) -> None:
        caplog.set_level(logging.WARNING)
        with asyncio.Runner(loop_factory=LOOPS[request.param], debug=False) as runner:

            async def whole() -> None:
                async with serving() as (worker, port):
                    await scene(worker, port)

            runner.run(whole())
        assert [record.getMessage() for record in caplog.records] == []

    return run


def connect(port: int, name: str, *protocols: str) -> tuple[x509.Certificate, str | None, bytes]:
    """What a client gets: certificate, protocol, and the bytes that follow when it sends a request."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(list(protocols))
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=name) as secure,
    ):
        shown = x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")
        chosen = secure.selected_alpn_protocol()
        answer = b""
        if chosen in (None, "http/1.1"):
            secure.sendall(b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n")
        if chosen != "h2":
            while part := secure.recv(1000):
                answer += part
        return shown, chosen, answer


def hello(name: str, *protocols: str) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(list(protocols))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def is_challenge(certificate: x509.Certificate) -> bool:
    return any(extension.oid == IDENTIFIER for extension in certificate.extensions)


def test_the_ca_is_shown_the_proof_and_then_the_end(play: Callable[[Scene], None]) -> None:
    async def scene(worker: Worker, port: int) -> None:
        worker.apply_challenges(PENDING)
        shown, chosen, answer = await asyncio.to_thread(connect, port, "A.Example", "acme-tls/1")
        extension = shown.extensions.get_extension_for_oid(IDENTIFIER)
        assert extension.critical
        assert isinstance(extension.value, x509.UnrecognizedExtension)
        assert extension.value.value == b"\x04\x20" + hashlib.sha256(PROOF.encode()).digest()
        names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["a.example"]
        assert (chosen, answer) == ("acme-tls/1", b"")
        assert worker.counters.handshakes == {("TLSv1.3", "acme-tls/1", "ok"): 1}
        await until(lambda: worker.counters.connections_open == 0)

    play(scene)


@pytest.mark.parametrize(
    ("protocols", "chosen"),
    [
        ((), None),
        (("http/1.1",), "http/1.1"),
        (("h2", "http/1.1"), "h2"),
        (("acme-tls/1", "http/1.1"), "http/1.1"),
        (("h2", "acme-tls/1"), "h2"),
        (("acme-tls/1", "acme-tls/1"), None),
        (("acme-tls/10",), None),
    ],
)
def test_other_clients_of_the_name_are_served_as_ever(
    play: Callable[[Scene], None], protocols: tuple[str, ...], chosen: str | None
) -> None:
    async def scene(worker: Worker, port: int) -> None:
        worker.apply_challenges(PENDING)
        shown, found, answer = await asyncio.to_thread(connect, port, "a.example", *protocols)
        assert not is_challenge(shown)
        assert found == chosen
        assert answer.startswith(b"HTTP/1.1 404 ") or chosen == "h2"

    play(scene)


def test_another_name_is_not_shown_the_challenge(play: Callable[[Scene], None]) -> None:
    async def scene(worker: Worker, port: int) -> None:
        worker.apply_challenges(PENDING)
        shown, _, _ = await asyncio.to_thread(connect, port, "b.example", "acme-tls/1")
        assert not is_challenge(shown)

    play(scene)


def test_when_it_is_over_nothing_is_shown_any_more(play: Callable[[Scene], None]) -> None:
    async def scene(worker: Worker, port: int) -> None:
        worker.apply_challenges(PENDING)
        worker.apply_challenges(Challenges(2))
        worker.apply_challenges(PENDING)  # it was overtaken
        shown, _, _ = await asyncio.to_thread(connect, port, "a.example", "acme-tls/1")
        assert not is_challenge(shown)

    play(scene)


def test_a_connection_that_lives_is_not_touched(play: Callable[[Scene], None]) -> None:
    async def scene(worker: Worker, port: int) -> None:
        context = ssl.create_default_context(cadata=AUTHORITY.pem.decode())
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=context, server_hostname="a.example"
        )
        for challenges in (Challenges(0), PENDING, Challenges(2)):
            worker.apply_challenges(challenges)
            writer.write(b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n")
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 404")
            while await reader.readuntil(b"\r\n") != b"\r\n":
                pass
            await reader.readuntil(b"\n")
        writer.close()

    play(scene)


@pytest.mark.parametrize("step", [1, 7, 100])
def test_a_hello_in_pieces_is_understood(play: Callable[[Scene], None], step: int) -> None:
    async def scene(worker: Worker, port: int) -> None:
        worker.apply_challenges(PENDING)

        def talk(first: bytes) -> bytes:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for at in range(0, len(first), step):
                    plain.sendall(first[at : at + step])
                    time.sleep(0.0005)
                return plain.recv(6)

        whole = hello("a.example", "acme-tls/1")
        records = b"".join(
            b"\x16\x03\x01" + len(part).to_bytes(2) + part
            for part in (whole[5:][at : at + 50] for at in range(0, len(whole) - 5, 50))
        )
        for first in (whole, records):
            answer = await asyncio.to_thread(talk, first)
            assert answer[:1] + answer[5:6] == b"\x16\x02"  # a ServerHello

    play(scene)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\xff\xff",
        b"\x16\x03\x01\x00\x05\x01\xff\xff\xff\xff",
        b"\x00" * 20000,
    ],
)
def test_garbage_is_refused_as_ever(play: Callable[[Scene], None], garbage: bytes) -> None:
    async def scene(worker: Worker, port: int) -> None:
        def talk() -> bytes:
            got = b""
            with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
                try:
                    plain.sendall(garbage)
                    plain.shutdown(socket.SHUT_WR)
                    while part := plain.recv(1000):
                        got += part
                except ConnectionError:
                    pass
            return got

        before = await asyncio.to_thread(talk)
        worker.apply_challenges(PENDING)
        assert await asyncio.to_thread(talk) == before

    play(scene)


def test_a_client_that_leaves_in_its_hello_is_forgotten(play: Callable[[Scene], None]) -> None:
    async def scene(worker: Worker, port: int) -> None:
        worker.apply_challenges(PENDING)

        def leave() -> None:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
                plain.sendall(hello("a.example", "acme-tls/1")[:100])

        await asyncio.to_thread(leave)
        await until(lambda: (gc.collect(), worker.counters.handshakes)[1])
        assert worker.counters.handshakes == {("", "", "gone"): 1}

    play(scene)


def test_a_pair_that_openssl_refuses_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    front = FrontTls(Config().tls)
    front.apply_challenges(Challenges(1, {"bad.example": (b"no", b"pem"), **PENDING.tls_alpn}))
    assert list(front.challenge_contexts) == ["a.example"]
    assert "for bad.example cannot be served" in caplog.text
    known = front.challenge_contexts["a.example"]
    front.apply_challenges(Challenges(2, PENDING.tls_alpn))
    assert front.challenge_contexts["a.example"] is known
