"""What is known about a client."""

from __future__ import annotations

import ssl
from ipaddress import ip_network
from typing import TYPE_CHECKING, cast

import pytest

from portero_py.proxy.peer import MAX_CHAIN, MAX_KNOWN, Peer, Peers, Proxies

if TYPE_CHECKING:
    import asyncio

    from portero_py.core.certificates import Certificate

TRUSTED = (ip_network("192.0.2.0/24"), ip_network("2001:db8::/32"))


class Transport:
    """Has extra info."""

    def __init__(self, peer: object, tls: object = None) -> None:
        self._info = {"peername": peer, "ssl_object": tls}

    def get_extra_info(self, name: str) -> object:
        return self._info[name]


def peer(name: object, tls: object = None) -> Peer:
    return Peers(TRUSTED).of(cast("asyncio.Transport", Transport(name, tls)))


@pytest.mark.parametrize(
    ("name", "address", "trusted"),
    [
        (("192.0.2.1", 5), "192.0.2.1", True),
        (("198.51.100.1", 5), "198.51.100.1", False),
        (("2001:db8::1", 5, 0, 0), "2001:db8::1", True),
        (("2001:db9::1", 5, 0, 0), "2001:db9::1", False),
        (("::ffff:192.0.2.1", 5, 0, 0), "192.0.2.1", True),
        (("::ffff:198.51.100.1", 5, 0, 0), "198.51.100.1", False),
        (("fe80::1%eth0", 5, 0, 2), "fe80::1%eth0", False),
        (None, "unknown", False),
        ("", "unknown", False),
        ((), "unknown", False),
    ],
)
def test_the_address_and_whether_it_is_trusted(name: object, address: str, trusted: bool) -> None:
    about = peer(name)
    assert about.address == address
    sent = [(b"X-Forwarded-For", b"203.0.113.9")]
    chain = dict(about.forwarding.fields(b"app.example", sent).fields)[b"X-Forwarded-For"]
    assert chain == (b"203.0.113.9, " if trusted else b"") + address.encode()


def test_a_plain_client_has_no_tls() -> None:
    about = peer(("192.0.2.1", 5))
    assert (about.tls_version, about.sni, about.certificate, about.port) == ("", "", None, 5)
    assert dict(about.forwarding.fields(b"a", ()).fields)[b"X-Forwarded-Proto"] == b"http"


def test_a_tls_client_says_what_was_negotiated() -> None:
    class Tls(ssl.SSLObject):
        sni = "app.example"
        certificate = cast("Certificate", object())

        def __init__(self) -> None:
            pass

        def version(self) -> str:
            return "TLSv1.3"

    about = peer(("192.0.2.1", 5), Tls())
    assert (about.tls_version, about.sni) == ("TLSv1.3", "app.example")
    assert about.certificate is Tls.certificate
    assert dict(about.forwarding.fields(b"a", ()).fields)[b"X-Forwarded-Proto"] == b"https"


def test_nobody_is_trusted_unless_the_configuration_says_so() -> None:
    about = Peers(()).of(cast("asyncio.Transport", Transport(("192.0.2.1", 5))))
    assert about.forwarding.request_id([(b"X-Request-ID", b"theirs")]) == b""


def test_what_follows_from_an_address_is_remembered_for_some() -> None:
    peers = Peers(TRUSTED)

    def of(host: str, port: int, tls: object = None) -> Peer:
        return peers.of(cast("asyncio.Transport", Transport((host, port), tls)))

    first = of("192.0.2.1", 5)
    again = of("192.0.2.1", 6)
    assert (again.address, again.port) == ("192.0.2.1", 6)
    assert again.forwarding is first.forwarding
    assert of("192.0.2.1", 7, tls=object()).forwarding is not first.forwarding  # it says https
    for number in range(MAX_KNOWN):
        of(f"10.0.{number >> 8}.{number & 255}", 5)
    assert of("192.0.2.1", 8).forwarding is not first.forwarding


@pytest.mark.parametrize(
    ("sender", "chain", "client"),
    [
        ("198.51.100.1", [b"203.0.113.9"], "198.51.100.1"),  # who is no trusted proxy speaks for himself
        ("192.0.2.1", [], "192.0.2.1"),
        ("192.0.2.1", [b"203.0.113.9"], "203.0.113.9"),
        ("192.0.2.1", [b"10.0.0.1, 203.0.113.9, 192.0.2.8", b"2001:db8::5"], "203.0.113.9"),
        ("192.0.2.1", [b"192.0.2.9, 192.0.2.8"], "192.0.2.9"),
        ("192.0.2.1", [b"203.0.113.9:4711"], "203.0.113.9"),
        ("192.0.2.1", [b"[2001:db9::1]:4711"], "2001:db9::1"),
        ("192.0.2.1", [b"2001:db9::1"], "2001:db9::1"),
        ("192.0.2.1", [b"203.0.113.9, unknown"], "192.0.2.1"),
        ("", [b"203.0.113.9"], "unknown"),
    ],
)
def test_the_client_behind_a_proxy_is_the_last_that_is_none_itself(
    sender: str, chain: list[bytes], client: str
) -> None:
    peers = Peers(TRUSTED)
    about = peers.of(cast("asyncio.Transport", Transport((sender, 5) if sender else None)))
    assert about.client([(b"X-Forwarded-For", each) for each in chain]) == client


def test_a_long_chain_is_read_and_not_remembered() -> None:
    proxies = Proxies(TRUSTED)
    for number in range(20):
        padding = b"%d" % number * 1000
        said = [(b"X-Forwarded-For", padding + b", 198.51.100.7, 192.0.2.9")]
        assert proxies.client_of("192.0.2.1", said) == "198.51.100.7"
    assert sum(len(chain) for _, chain in proxies._named) <= 20 * MAX_CHAIN
    short = [(b"X-Forwarded-For", b"198.51.100.7")]
    assert proxies.client_of("192.0.2.1", short) == "198.51.100.7"
    assert list(proxies._named) == [("192.0.2.1", b"198.51.100.7")]
