"""Binding: from addresses and inherited descriptors to listening sockets, before anything serves them.

Kept apart from serving so that sockets can be opened once, as root or by systemd, and shared by processes.

- `proto=IPPROTO_TCP` explicitly: with 0, plain asyncio leaves TCP_NODELAY off on accepted connections.
- `[::]` takes IPv4 too (IPV6_V6ONLY off), and so does an empty host; where the machine has no IPv6 an
  empty host, or `[::]` itself, means every IPv4 address.
- Sockets inherited for a name take the place of the configured addresses of that name.
- A socket of the former generation that is bound where one is wanted is used again: clients wait in its
  queue, and ports below 1024 need no privilege a second time. The others are closed.
"""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from portero_py.config.model import Address, Config
from portero_py.errors import ConfigError

#: Connections that may wait to be accepted; the kernel lowers it to net.core.somaxconn.
BACKLOG: Final = 4096

Inherited = Mapping[str, list[socket.socket]]

#: What `getaddrinfo` gives.
_Place = tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]


@dataclass(slots=True)
class Listening:
    """The listening sockets of one portero, by what is served there. Whoever opened them closes them."""

    proxy: list[socket.socket] = field(default_factory=list)
    registration: list[socket.socket] = field(default_factory=list)
    plain_http: list[socket.socket] = field(default_factory=list)
    scheme: str = "https"  # what the proxy speaks
    kept: frozenset[str] = frozenset()  # the names of those that systemd holds too

    def summary(self) -> str:
        """Where portero listens, in one line."""
        parts = [f"{self.scheme} on {_said(self.proxy)}", f"registration on {_said(self.registration)}"]
        if self.plain_http:
            parts.append(f"http on {_said(self.plain_http)}")
        return "; ".join(parts)

    def named(self) -> Iterator[tuple[str, socket.socket]]:
        """Each with its name."""
        for name, group in (
            ("https", self.proxy),
            ("register", self.registration),
            ("http", self.plain_http),
        ):
            for sock in group:
                yield name, sock

    def close(self) -> None:
        """Close all of them; harmless when some are closed already."""
        self.close_proxy()
        self.close_control()

    def close_proxy(self) -> None:
        """Close those of the data plane."""
        for sock in self.proxy:
            sock.close()

    def close_control(self) -> None:
        """Close those of the control plane."""
        for sock in (*self.registration, *self.plain_http):
            sock.close()


class Rendezvous:
    """Where workers find control: a unix socket without a name, for this process and those it forks.

    It is bound in a directory that only its owner may enter, and taken off the disk at once. What stays is
    `path`, through which only a process that has inherited the descriptor behind it can connect; the keys of
    all certificates pass there. Raises `ConfigError` where the system has no such paths (Linux has).
    """

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        try:
            with tempfile.TemporaryDirectory(prefix="portero-") as directory:
                place = os.path.join(directory, "feed")  # noqa: PTH118 - bind takes text
                self.socket.bind(place)
                self.socket.listen(BACKLOG)
                self._descriptor = os.open(place, os.O_PATH | os.O_CLOEXEC)
            self.path = f"/proc/self/fd/{self._descriptor}"
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
                trial.connect(self.path)
                self.socket.accept()[0].close()
        except (OSError, AttributeError) as error:
            self.socket.close()
            raise ConfigError(
                f"--workers: several need Linux, /proc and a directory for temporary files: {error}"
            ) from None

    def stop_listening(self) -> None:
        """Leave listening to the other processes that have the socket."""
        self.socket.close()

    def close(self) -> None:
        """Close both ends in this process."""
        self.socket.close()
        os.close(self._descriptor)


def rehearse(config: Config) -> None:
    """Raises the `ConfigError` that `open_sockets` would, whoever has the ports now; nothing is bound."""
    _require_apart(_wanted(config, {}))
    if config.workers > 1:
        Rendezvous().close()


def open_sockets(config: Config, inherited: Inherited, former: Inherited | None = None) -> Listening:
    """Every socket that `config` asks for, listening. Raises `ConfigError`; then none stays open.

    `former` are those of the generation before: what is not wanted of them is closed.
    """
    with ExitStack() as opened, ExitStack() as unwanted:
        for group in inherited.values():
            for sock in group:
                opened.callback(sock.close)
        left = {name: list(group) for name, group in (former or {}).items()}
        unwanted.callback(_close_all, left)

        wanted = _wanted(config, inherited)
        _require_apart(wanted)

        def listen(name: str) -> list[socket.socket]:
            if inherited.get(name):
                return list(inherited[name])
            flag, addresses = wanted[name]
            sockets = []
            for address in addresses:
                for sock in _bind(address, flag, left.get(name, [])):
                    opened.callback(sock.close)
                    sockets.append(sock)
            return sockets

        listening = Listening(
            proxy=listen("https"),
            registration=listen("register"),
            plain_http=listen("http"),
            scheme="https" if config.tls.enabled else "http",
            kept=frozenset(name for name, group in inherited.items() if group),
        )
        opened.pop_all()
        return listening


def address_of(sock: socket.socket) -> Address:
    """Where a socket listens, with the port that the system chose for port 0."""
    host, port = sock.getsockname()[:2]
    return Address(host, port)


# Private


def _said(sockets: list[socket.socket]) -> str:
    return ", ".join(str(address_of(sock)) for sock in sockets)


def _wanted(config: Config, inherited: Inherited) -> dict[str, tuple[str, Sequence[Address]]]:
    """What is to be bound, by the name of what is served there: the flag and the addresses."""
    plain = config.plain_http.listen
    wanted: dict[str, tuple[str, Sequence[Address]]] = {
        "https": ("listen-addr", config.proxy.listen),
        "register": ("register-addr", [config.registration.listen]),
        "http": ("http-addr", [plain] if plain else []),
    }
    return {name: each for name, each in wanted.items() if not inherited.get(name)}


def _require_apart(wanted: Mapping[str, tuple[str, Sequence[Address]]]) -> None:
    """No two of them are the same place. Raises `ConfigError`, also for what cannot be resolved."""
    taken: list[tuple[tuple[str, int], str]] = []
    for flag, addresses in wanted.values():
        for address in addresses:
            places = [(str(place[0]), address.port) for *_, place in _resolve(address, flag)]
            for place in places if address.port else ():
                for other, owner in taken:
                    if _overlap(place, other):
                        raise ConfigError(f"--{flag}: {address} is taken by --{owner}: choose another port")
            taken += [(place, flag) for place in places]


def _overlap(one: tuple[str, int], other: tuple[str, int]) -> bool:
    """Whether not both can be bound: `::` takes IPv4 too."""
    hosts = {one[0], other[0]}
    if one[1] != other[1]:
        return False
    return len(hosts) == 1 or "::" in hosts or ("0.0.0.0" in hosts and not any(":" in h for h in hosts))  # noqa: S104 - compared


def _resolve(address: Address, flag: str) -> list[_Place]:
    try:
        places = socket.getaddrinfo(
            address.host or "::",
            address.port,
            type=socket.SOCK_STREAM,
            proto=socket.IPPROTO_TCP,
            flags=socket.AI_PASSIVE,
        )
    except socket.gaierror as error:
        raise ConfigError(f"--{flag}: cannot resolve {address}: {error.strerror}") from None
    except UnicodeError as error:  # Python's own idea of a host name comes before the resolver's
        raise ConfigError(f"--{flag}: cannot resolve {address}: {error}") from None
    return list(dict.fromkeys(places))


def _bind(address: Address, flag: str, former: list[socket.socket]) -> list[socket.socket]:
    """`former` may have some of them; then they are taken out of it."""
    sockets: list[socket.socket] = []
    for family, kind, proto, _, place in _resolve(address, flag):
        try:
            sockets.append(_taken_over(former, family, place) or _listen(family, kind, proto, place))
        except OSError as error:
            if family == socket.AF_INET6 and address.host in {"", "::"} and _no_ipv6(error):
                any_ipv4 = Address("0.0.0.0", address.port)  # noqa: S104 - what was asked for
                return _bind(any_ipv4, flag, former)
            for sock in sockets:
                sock.close()
            raise ConfigError(f"--{flag}: cannot listen on {address}: {_reason(error)}") from None
    return sockets


def _taken_over(former: list[socket.socket], family: int, place: tuple[object, ...]) -> socket.socket | None:
    host, port = place[:2]
    for sock in former:
        name = sock.getsockname()
        if sock.family == family and name[0] == host and port in {0, name[1]}:
            former.remove(sock)
            return sock
    return None


def _close_all(groups: Mapping[str, list[socket.socket]]) -> None:
    for group in groups.values():
        for sock in group:
            sock.close()


def _listen(family: int, kind: int, proto: int, place: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, kind, proto)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # For a single address this changes nothing.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(place)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _no_ipv6(error: OSError) -> bool:
    return error.errno in {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is taken by another process"
    if error.errno == errno.EACCES:
        return "ports below 1024 need root or CAP_NET_BIND_SERVICE"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address"
    return os.strerror(error.errno or 0)
