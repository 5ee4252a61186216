"""Requests to a CA: what it never heard of is told from what it may have heard, and threads share nonces."""

from __future__ import annotations

import io
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from acme import jws, messages
from josepy import jwk

from portero_py.control.acme.network import Network
from portero_py.control.acme.pairs import new_key
from portero_py.errors import BadCaReply, CaOutOfReach, CaUnreachable


@pytest.fixture
def network() -> Network:
    return Network(jwk.JWKEC.load(new_key()), "")


def good(nonce: str = "") -> requests.Response:
    made = requests.Response()
    made.status_code, made.raw = 200, io.BytesIO(b"{}")
    made.headers["Replay-Nonce"] = nonce
    return made


def test_a_port_that_nobody_listens_on_is_out_of_reach(network: Network) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(CaOutOfReach, match=r"cannot be reached: .*refused"):
        network.fetch(f"https://127.0.0.1:{port}/dir")


def test_so_is_a_host_that_nobody_knows(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> list[object]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(CaOutOfReach):
        network.fetch("https://ca.example/dir")


@pytest.mark.parametrize(
    ("error", "is_out_of_reach"),
    [
        (requests.exceptions.ConnectTimeout(), True),
        (requests.exceptions.ProxyError(), True),
        (requests.exceptions.ReadTimeout(), False),
        (requests.exceptions.ConnectionError(), False),
        (requests.exceptions.ConnectionError("Connection aborted."), False),
        (requests.exceptions.SSLError("certificate verify failed"), False),
        (requests.exceptions.ChunkedEncodingError("broken"), False),
    ],
)
def test_what_the_ca_may_have_heard_is_not(
    network: Network, monkeypatch: pytest.MonkeyPatch, error: Exception, is_out_of_reach: bool
) -> None:
    def fail(*_: object, **__: object) -> requests.Response:
        raise error

    monkeypatch.setattr(requests.Session, "request", fail)
    with pytest.raises(CaUnreachable) as caught:
        network.fetch("https://ca.example/dir")
    assert isinstance(caught.value, CaOutOfReach) is is_out_of_reach


def test_no_two_threads_use_one_nonce_or_one_session(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter(range(10**6))
    used: Counter[str] = Counter()
    sessions: dict[int, set[requests.Session]] = {}
    guard = threading.Lock()

    def answer(session: requests.Session, method: str, url: str, **about: object) -> requests.Response:
        with guard:
            sessions.setdefault(threading.get_ident(), set()).add(session)
            if method == "POST":
                signed = jws.JWS.json_loads(str(about["data"]))
                used[signed.signature.combined.nonce.hex()] += 1
            return good(f"{next(given):08d}")

    monkeypatch.setattr(requests.Session, "request", answer)
    network.account = messages.RegistrationResource(uri="https://ca.example/1", body=messages.Registration())

    def ask(_: int) -> None:
        for _ in range(20):
            network.send("https://ca.example/order", None, "https://ca.example/nonce")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(16)))
    assert sum(used.values()) == len(used) == 16 * 20
    assert all(len(own) == 1 for own in sessions.values())
    assert len({session for own in sessions.values() for session in own}) == len(sessions)
    network.close()


def test_a_ca_without_nonces_is_no_ca(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests.Session, "request", lambda *_, **__: good())
    with pytest.raises(BadCaReply, match="no nonce"):
        network.send("https://ca.example/order", None, "https://ca.example/nonce")
