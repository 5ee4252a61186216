"""Containers of a real dockerd that come, move, go and die under load: what could be saved is not lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.asking import Asking
from tests.e2e.discover_process import DiscoverProcess
from tests.e2e.proxy_process import ProxyProcess
from tests.e2e.waiting import eventually
from tests.slow.dockerd import APART, IMAGE, Dockerd, dockerd

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SERVICE = "app.e2e.test"


@pytest.fixture
def docker() -> Iterator[Dockerd]:
    with dockerd() as found:
        yield found


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[ProxyProcess]:
    found = ProxyProcess(tmp_path / "proxy", environment={"PORTERO_ACCESS_LOG": "off"})
    found.start()
    yield found
    found.stop()


def run(docker: Dockerd, name: str, *flags: str, program: str = "patient") -> None:
    """Start a container that answers with its name."""
    docker(
        *("run", "--detach", "--name", name, "--hostname", name, "--network", "shop_front"),
        *("--label", f"portero.service={SERVICE}", "--stop-timeout", "3", *flags, IMAGE, program),
    )


def hosts(proxy: ProxyProcess) -> list[str]:
    """Where the backends are."""
    listing = proxy.call("GET", "/backends").json
    return [each["host"] for service in listing["services"] for each in service["backends"]]


def count(proxy: ProxyProcess) -> int:
    """How many backends there are."""
    return len(hosts(proxy))


def well(docker: Dockerd, name: str, *, is_well: bool) -> None:
    """Make its health check say so."""
    docker("exec", name, *(("touch", "/well") if is_well else ("rm", "-f", "/well")))


HEALTH = ("--health-cmd", "test -e /well", "--health-interval", "0.5s", "--health-retries", "1")


def test_containers_come_move_and_go_under_load_and_no_request_is_lost(
    tmp_path: Path, docker: Dockerd, proxy: ProxyProcess
) -> None:
    run(docker, "one")
    run(docker, "two", program="brisk")
    with DiscoverProcess(tmp_path, proxy, docker.host) as discover:
        eventually(lambda: count(proxy) == 2, "two replicas")
        with (
            Asking(proxy, SERVICE, "/cgi-bin/who", 0.05) as asking,
            Asking(proxy, SERVICE, "/cgi-bin/slow", 0.05) as slow,
        ):
            # They come.
            run(docker, "three", program="brisk")
            run(docker, "four", *HEALTH)
            asking.goes_to(b"one", b"two", b"three")
            assert not asking.by[b"four"]
            well(docker, "four", is_well=True)
            asking.goes_to(b"four")
            # They go: one that serves on until it is killed, one that stops to listen at once.
            docker("stop", "one")
            docker("stop", "two")
            asking.goes_to(b"three", b"four")
            # They come back.
            docker("start", "two")
            docker("restart", "three")
            asking.goes_to(b"two", b"three", b"four")
            # They are ill, and frozen, for a while.
            well(docker, "four", is_well=False)
            eventually(lambda: count(proxy) == 2, "the ill one is out")
            well(docker, "four", is_well=True)
            asking.goes_to(b"two", b"three", b"four")
            docker("pause", "two")
            eventually(lambda: count(proxy) == 2, "the frozen one is out")
            docker("unpause", "two")
            asking.goes_to(b"two", b"three", b"four")
            # One moves to another address. (Whatever is on its way to the former one then is cut by Docker.)
            docker("network", "connect", "shop_back", "three")
            eventually(lambda: any(host.startswith("10.213.78.") for host in hosts(proxy)), "it has moved")
            slow.goes_on()
            docker("network", "disconnect", "shop_front", "three")
            asking.goes_to(b"three")
            # The next day's version replaces the others.
            for former, name in (("two", "five"), ("four", "six")):
                run(docker, name, program="brisk")
                asking.goes_to(name.encode())
                docker("stop", former)
            asking.goes_to(b"three", b"five", b"six")
            # Docker itself is replaced; its containers go on.
            docker.stop()
            asking.goes_to(b"three", b"five", b"six")
            docker.start()
            run(docker, "seven")
            asking.goes_to(b"seven")
            slow.goes_on(10)
        log = discover.log()
    assert asking.lost + slow.lost == []
    assert "is deregistered: it is about to end" in log
    assert "is deregistered: it is unhealthy" in log
    assert "is deregistered: it is paused" in log


def test_a_container_that_is_killed_costs_what_was_with_it_at_most(
    tmp_path: Path, docker: Dockerd, proxy: ProxyProcess
) -> None:
    names = ["one", "two", "three"]
    for name in names:
        run(docker, name)
    with DiscoverProcess(tmp_path, proxy, docker.host):
        eventually(lambda: count(proxy) == 3, "three replicas")
        with (
            Asking(proxy, SERVICE, "/cgi-bin/who", 0.05) as asking,
            Asking(proxy, SERVICE, "/cgi-bin/slow", 0.05) as slow,
        ):
            for turn in range(5):
                name = names[turn % 3]
                docker("kill", name)
                eventually(lambda: count(proxy) == 2, "the dead one is out")
                asking.goes_on()
                docker("start", name)
                asking.goes_to(name.encode())
    # Six clients, five deaths: what was half answered cannot be had from another.
    assert len(asking.lost + slow.lost) <= 30
    # It is not even that, as a rule: a GET that has no answer yet is asked for again.
    assert [each for each in asking.lost + slow.lost if " 404 " in each or " 503 " in each] == []


def test_the_tasks_of_a_swarm_are_registered_at_their_addresses_in_its_overlay(
    tmp_path: Path, proxy: ProxyProcess
) -> None:
    with dockerd(APART, swarm=True) as docker:
        docker("swarm", "init", "--advertise-addr", "10.213.76.1", "--listen-addr", "10.213.76.1:2377")
        try:
            docker("network", "create", "--driver", "overlay", "--subnet", "10.213.79.0/24", "shop_over")
            with DiscoverProcess(tmp_path, proxy, docker.host) as discover:
                labels = {
                    "portero.service": SERVICE,
                    "portero.network": "over",
                    "com.docker.stack.namespace": "shop",  # as `docker stack deploy` has it
                }
                docker(
                    *("service", "create", "--detach", "--name", "shop_web", "--replicas", "2"),
                    # Published: each task is in the network `ingress`, too.
                    *("--network", "shop_over", "--publish", "9000:8080", "--stop-grace-period", "1s"),
                    *(f"--container-label={name}={value}" for name, value in labels.items()),
                    *("--no-resolve-image", IMAGE, "patient"),
                )
                for replicas in (2, 4, 1, 0):
                    docker("service", "scale", "--detach", f"shop_web={replicas}")
                    eventually(lambda wanted=replicas: count(proxy) == wanted, f"{replicas} tasks")  # type: ignore[misc]
                    assert all(host.startswith("10.213.79.") for host in hosts(proxy))
                assert "WARNING" not in discover.log(), discover.log()
            docker("service", "rm", "shop_web")
        finally:
            docker("swarm", "leave", "--force")
