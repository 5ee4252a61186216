"""sd_notify and LISTEN_FDS as systemd's manual pages have them, and the sockets that portero binds itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from portero_py.config.model import Address, Config, PlainHttp, Proxy, Registration
from portero_py.errors import ConfigError
from portero_py.run.sockets import address_of, open_sockets
from portero_py.run.systemd import Notifier, _adopt, inherited_sockets, notify


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket on which systemd would listen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(1)
        yield sock


def notifier(environ: dict[str, str]) -> Notifier:
    """As it is when a generation tells its main process."""
    return Notifier(environ, os.getpid(), lambda text: notify(environ, text))


class TestNotifier:
    def test_the_states_are_told_in_systemd_s_words(self, systemd: socket.socket) -> None:
        told = notifier({"NOTIFY_SOCKET": systemd.getsockname()})
        told.ready("https on [::]:443")
        told.stopping()
        told.alive()
        assert systemd.recv(999) == b"READY=1\nSTATUS=https on [::]:443"
        assert systemd.recv(999).startswith(b"STOPPING=1\n")
        assert systemd.recv(999) == b"WATCHDOG=1"

    def test_a_reload_carries_the_monotonic_clock_in_microseconds(self, systemd: socket.socket) -> None:
        before = time.monotonic_ns() // 1000
        notifier({"NOTIFY_SOCKET": systemd.getsockname()}).reloading()
        first, second = systemd.recv(999).decode().split("\n")
        assert first == "RELOADING=1"
        name, _, value = second.partition("=")
        assert name == "MONOTONIC_USEC"
        assert before <= int(value) <= time.monotonic_ns() // 1000

    def test_an_abstract_socket_begins_with_an_at_sign(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            name = f"portero-test-{os.getpid()}"
            sock.bind(f"\0{name}")
            sock.settimeout(1)
            notifier({"NOTIFY_SOCKET": f"@{name}"}).alive()
            assert sock.recv(999) == b"WATCHDOG=1"

    def test_without_a_socket_or_a_listener_nothing_happens(self, tmp_path: Path) -> None:
        notifier({}).ready("")
        notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).ready("")

    @pytest.mark.parametrize(
        ("environ", "seconds"),
        [
            ({}, 0),
            ({"WATCHDOG_USEC": "3000000"}, 3),
            ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3),
            ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, 0),
            ({"WATCHDOG_USEC": "soon"}, 0),
            ({"WATCHDOG_USEC": "9" * 400}, 0),
        ],
    )
    def test_the_watchdog_s_time_is_this_process_s_only(
        self, environ: dict[str, str], seconds: float
    ) -> None:
        assert notifier(environ).watchdog_seconds == seconds


def inherit(names: str, listening: bool = True, **environ: str) -> str:
    """What a process says that finds two sockets from descriptor 3 on."""
    program = """
        import os, sys
        from portero_py.errors import ConfigError
        from portero_py.run.systemd import inherited_sockets
        os.environ.setdefault("LISTEN_PID", str(os.getpid()))
        try:
            found = inherited_sockets(os.environ, os.getpid())
        except ConfigError as error:
            print("refused:", error)
        else:
            for name, sockets in sorted(found.items()):
                print(name, *(f"{s.fileno()}:{s.getsockname()[1]}:{s.get_inheritable()}" for s in sockets))
    """
    with socket.socket() as first, socket.socket() as second:
        for sock in (first, second):
            sock.bind(("127.0.0.1", 0))
            if listening:
                sock.listen()
        ports = {str(first.getsockname()[1]): "FIRST", str(second.getsockname()[1]): "SECOND"}
        launcher = f'exec {sys.executable} -c "$0" 3<&{first.fileno()} 4<&{second.fileno()}'
        said = subprocess.run(
            ["bash", "-c", launcher, textwrap.dedent(program)],
            pass_fds=(first.fileno(), second.fileno()),
            env={**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": names, **environ},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    for port, word in ports.items():
        said = said.replace(port, word)
    return said


class TestInheritedSockets:
    def test_they_are_told_apart_by_name_and_not_passed_on(self) -> None:
        assert inherit("http:https") == "http 3:FIRST:False\nhttps 4:SECOND:False\n"

    def test_nameless_ones_and_those_named_for_their_unit_serve_https(self) -> None:
        assert inherit("portero-py.socket") == "https 3:FIRST:False 4:SECOND:False\n"

    def test_another_name_is_refused(self) -> None:
        assert (
            inherit("https:ftp")
            == 'refused: LISTEN_FDNAMES holds "ftp": the names are https, http and register\n'
        )

    def test_a_socket_that_does_not_listen_is_refused(self) -> None:
        assert inherit("https:http", listening=False) == (
            "refused: LISTEN_FDS: descriptor 3 is no listening TCP socket\n"
        )

    def test_a_socket_of_another_family_is_refused(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(tmp_path / "socket"))
            sock.listen()
            with pytest.raises(ConfigError, match="is no listening TCP socket"):
                _adopt(os.dup(sock.fileno()))

    def test_a_descriptor_that_is_not_open_is_refused(self) -> None:
        assert inherit("https:http", LISTEN_FDS="9").startswith("refused: LISTEN_FDS: descriptor 5: ")

    def test_those_of_another_process_are_left_alone(self) -> None:
        assert inherited_sockets({"LISTEN_PID": "1", "LISTEN_FDS": "2"}, os.getpid()) == {}
        assert inherited_sockets({}, os.getpid()) == {}

    def test_a_count_that_is_no_number_is_refused(self) -> None:
        environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "two"}
        with pytest.raises(ConfigError, match="LISTEN_FDS is no number"):
            inherited_sockets(environ, os.getpid())


def config(*listen: Address, plain: Address | None = None) -> Config:
    return Config(
        proxy=Proxy(listen=listen),
        registration=Registration(listen=Address("127.0.0.1", 0)),
        plain_http=PlainHttp(listen=plain),
    )


class TestBinding:
    def test_every_address_gets_a_listening_socket_and_port_0_a_port(self) -> None:
        listening = open_sockets(
            config(Address("127.0.0.1", 0), Address("", 0), plain=Address("127.0.0.1", 0)), {}
        )
        try:
            assert len(listening.proxy) == 2
            for sock in (*listening.proxy, *listening.registration, *listening.plain_http):
                assert address_of(sock).port
                assert sock.proto == socket.IPPROTO_TCP
                assert not sock.getblocking()
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        finally:
            listening.close()

    def test_the_ipv6_wildcard_takes_ipv4_too(self) -> None:
        listening = open_sockets(config(Address("::", 0)), {})
        try:
            socket.create_connection(("127.0.0.1", address_of(listening.proxy[0]).port), 1).close()
        finally:
            listening.close()

    def test_inherited_sockets_take_the_place_of_addresses(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as given:
            listening = open_sockets(config(Address("192.0.2.1", 443)), {"https": [given]})
            assert listening.proxy == [given]
            listening.close()

    def test_sockets_of_the_former_generation_are_used_again_and_the_others_closed(self) -> None:
        former = open_sockets(config(Address("127.0.0.1", 0), Address("::1", 0)), {})
        ipv4, ipv6 = former.proxy
        places = [address_of(ipv4), Address("127.0.0.1", 0)]
        held = {"https": former.proxy, "register": former.registration}
        listening = open_sockets(config(*places), {}, held)
        try:
            assert listening.proxy[0] is ipv4
            assert listening.proxy[1] not in (ipv4, ipv6)
            assert listening.registration == former.registration
            assert ipv6.fileno() == -1
        finally:
            listening.close()

    def test_a_taken_port_is_one_clear_line_and_nothing_stays_open(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as given:
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError) as caught:
                open_sockets(config(Address("127.0.0.1", port)), {"http": [given]})
            assert str(caught.value) == (
                f"--listen-addr: cannot listen on 127.0.0.1:{port}: the port is taken by another process"
            )
            assert given.fileno() == -1

    @pytest.mark.parametrize(
        ("address", "why"),
        [
            (Address("192.0.2.1", 0), "this machine has no such address"),
            (Address("no.such.name.invalid", 0), "cannot resolve no.such.name.invalid:0"),
        ],
    )
    def test_what_cannot_be_bound_says_why(self, address: Address, why: str) -> None:
        with pytest.raises(ConfigError, match=why):
            open_sockets(config(address), {})
