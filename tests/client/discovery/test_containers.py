"""From an inspection to registrations: address, port, health, and names of leases."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portero_py.client.discovery.containers import (
    Container,
    Options,
    Wanted,
    engine_name,
    parse,
    prefix_of,
    wanted,
)
from portero_py.client.registrar import Registration
from tests.client.discovery.inspections import id_of, inspection

OPTIONS = Options()
COMPOSE = {"portero.service": "app.example", "com.docker.compose.project": "shop"}
SWARM = {"portero.service": "app.example", "com.docker.stack.namespace": "shop"}


def parsed(said: object) -> Container:
    found = parse(said)
    assert found is not None
    return found


def places(said: dict[str, Any], options: Options = OPTIONS, **around: dict[str, Any]) -> list[str]:
    """host:port of what is registered, then the complaints."""
    other = parsed(around["around"]) if around else None
    found = wanted(parsed(said), options, "", other)
    return [f"{each.host}:{each.port}" for each in found.registrations] + list(found.complaints)


def test_everything_that_the_labels_say_is_in_the_registration() -> None:
    said = inspection(
        "web",
        {
            "portero.service": "app.example",
            "portero.port": "8443",
            "portero.weight": "5",
            "portero.tls": "true",
            "portero.health_path": "/up",
            "portero.max_in_flight": "9",
        },
    )
    assert wanted(parsed(said), Options(ttl_seconds=30), "0a1b2c3d") == Wanted(
        (
            Registration(
                "app.example",
                "172.17.0.2",
                8443,
                ttl_seconds=30,
                use_tls=True,
                instance_id=f"docker-0a1b2c3d-{id_of('web')[:12]}-8443",
                weight=5,
                health_path="/up",
                max_in_flight=9,
            ),
        )
    )


@pytest.mark.parametrize(
    ("state", "why_not"),
    [
        ({}, ""),
        ({"health": "healthy"}, ""),
        ({"health": "none"}, ""),
        ({"health": "starting"}, "it is not healthy yet"),
        ({"health": "unhealthy"}, "it is unhealthy"),
        ({"Paused": True}, "it is paused"),
        ({"Running": False}, "it does not run"),
        ({"Running": None}, "it does not run"),
        ({"Restarting": True}, "it does not run"),
        ({"Dead": True}, "it does not run"),
        ({"Running": False, "health": "healthy"}, "it does not run"),
    ],
)
def test_a_container_serves_while_it_runs_and_is_well(state: dict[str, Any], why_not: str) -> None:
    assert parsed(inspection("web", **state)).why_not == why_not


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("2026-11-21T23:46:11.407852914Z", 1795304771.407852),
        ("2026-11-22T00:46:11+01:00", 1795304771.0),
        ("0001-01-01T00:00:00Z", 0.0),
        ("yesterday", 0.0),
        ("", 0.0),
    ],
)
def test_when_it_was_started_is_a_number_of_seconds(said: str, seconds: float) -> None:
    assert parsed(inspection("web", StartedAt=said)).started_at == seconds


@pytest.mark.parametrize(
    ("ports", "found"),
    [
        (("8080/tcp",), ["172.17.0.2:8080"]),
        (("8080/tcp", "53/udp"), ["172.17.0.2:8080"]),
        ((), ["it exposes no port: say which by portero.port"]),
        (("53/udp",), ["it exposes no port: say which by portero.port"]),
        (("443/tcp", "80/tcp"), ["it exposes the ports 80, 443: say which by portero.port"]),
        (("0/tcp", "x/tcp"), ["it exposes no port: say which by portero.port"]),
    ],
)
def test_the_port_is_the_only_one_that_it_exposes(ports: tuple[str, ...], found: list[str]) -> None:
    assert places(inspection("web", ports=ports)) == found


def test_a_published_port_counts_as_an_exposed_one() -> None:
    said = inspection("web", ports=())
    said["NetworkSettings"]["Ports"] = {"9000/tcp": [{"HostIp": "0.0.0.0", "HostPort": "32768"}]}
    assert places(said) == ["172.17.0.2:9000"]


TWO = {"shop_front": "10.1.0.2", "shop_back": "10.2.0.2"}


@pytest.mark.parametrize(
    ("labels", "networks", "network", "found"),
    [
        ({**COMPOSE, "portero.network": "shop_front"}, TWO, "", ["10.1.0.2:8080"]),
        ({**COMPOSE, "portero.network": "front"}, TWO, "shop_back", ["10.1.0.2:8080"]),
        ({**SWARM, "portero.network": "front"}, TWO, "", ["10.1.0.2:8080"]),
        (COMPOSE, TWO, "shop_front", ["10.1.0.2:8080"]),
        (COMPOSE, TWO, "front", ["10.1.0.2:8080"]),
        (
            COMPOSE,
            TWO,
            "",
            [
                "10.2.0.2:8080",
                (
                    "it is in the networks shop_back, shop_front, its address in shop_back is taken: "
                    "say which by portero.network or --network"
                ),
            ],
        ),
        (
            COMPOSE,
            {"other": "10.3.0.2"},
            "front",
            ["10.3.0.2:8080", 'it has no address in network "front", the one in "other" is taken'],
        ),
        (
            {**COMPOSE, "portero.network": "nowhere"},
            TWO,
            "",
            ['it has no address in network "nowhere", only in: shop_back, shop_front'],
        ),
        (SWARM, {"ingress": "10.0.0.5", "shop_front": "10.1.0.2"}, "", ["10.1.0.2:8080"]),
        (SWARM, {"ingress": "10.0.0.5"}, "", ["10.0.0.5:8080"]),
        (COMPOSE, {"front": ""}, "", ["it has no address in any network"]),
        (COMPOSE, {}, "", ["it has no address in any network"]),
        (COMPOSE, {"six": "fd00::5"}, "", ["fd00::5:8080"]),
        (COMPOSE, {"down": "", "up": "10.4.0.2"}, "", ["10.4.0.2:8080"]),
    ],
)
def test_the_address_is_that_of_the_network_that_was_named(
    labels: dict[str, str], networks: dict[str, str], network: str, found: list[str]
) -> None:
    said = inspection("web", labels, networks=networks)
    assert places(said, Options(network=network)) == found


@pytest.mark.parametrize("network", ["", "host"])
def test_on_the_host_s_network_it_is_where_the_operator_says_the_host_is(network: str) -> None:
    labels = {"portero.service": "app.example", **({"portero.network": network} if network else {})}
    said = inspection("web", labels, networks={"host": ""}, mode="host")
    assert places(said) == ["127.0.0.1:8080"]
    assert places(said, Options(network="front", host_address="10.0.0.1")) == ["10.0.0.1:8080"]


def test_in_another_container_s_network_it_is_where_that_one_is() -> None:
    said = inspection("app", networks={}, mode=f"container:{id_of('vpn')}")
    assert parsed(said).inside == id_of("vpn")
    around = inspection("vpn", {}, networks={"front": "10.5.0.2"})
    assert places(said, around=around) == ["10.5.0.2:8080"]
    assert places(said, around=inspection("vpn", {}, networks={"host": ""}, mode="host")) == [
        "127.0.0.1:8080"
    ]
    missing = f"the container whose network it uses, {id_of('vpn')[:12]}, is not there"
    assert places(said) == [missing]
    chain = inspection("vpn", {}, networks={}, mode=f"container:{id_of('x')}")
    assert places(said, around=chain) == ["the container whose network it uses, vpn, has none of its own"]


def test_two_containers_never_share_a_lease_s_name() -> None:
    labels = {
        "portero.a.service": "app.example",
        "portero.a.port": "80",
        "portero.b.service": "app.example",
        "portero.b.port": "81",
    }
    found = [
        each.instance_id
        for name in ("one", "two")
        for engine in ("e1", "e2")
        for each in wanted(parsed(inspection(name, labels)), Options(), engine).registrations
    ]
    assert len(set(found)) == len(found) == 8


def test_one_service_twice_at_one_port_is_one_registration() -> None:
    labels = {"portero.a.service": "app.example", "portero.b.service": "app.example", "portero.b.weight": "2"}
    assert places(inspection("web", labels)) == [
        "172.17.0.2:8080",
        "app.example at port 8080 is wanted twice: the first is taken",
    ]


def test_machines_that_were_cloned_have_different_names() -> None:
    names = {
        engine_name({"ID": "A:B", "Name": "one"}),
        engine_name({"ID": "A:B", "Name": "two"}),
        engine_name({"ID": "C:D", "Name": "one"}),
        engine_name({}),
    }
    assert len(names) == 4
    assert engine_name({}) == ""
    assert prefix_of("") == "docker-"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
_KEYS = ("State", "Config", "HostConfig", "NetworkSettings", "Name", "Id")


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(_KEYS), _JSON))
def test_whatever_docker_says_of_a_container_it_is_read(said: dict[str, Any]) -> None:
    found = parse({"Id": id_of("web"), **said})
    if "Id" not in said:
        assert found is not None
        assert wanted(found, Options()).registrations == ()


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_part_that_is_garbage_makes_no_wrong_registration(data: st.DataObject) -> None:
    said = inspection("web")
    part = data.draw(st.sampled_from(sorted(said)))
    if isinstance(said[part], dict):
        said[part][data.draw(st.sampled_from(sorted(said[part])))] = data.draw(_JSON)
    found = parse(said)
    assert found is not None
    for each in wanted(found, Options()).registrations:
        assert (each.service_name, each.host, each.port) == ("app.example", "172.17.0.2", 8080)


@pytest.mark.parametrize("said", [None, [], "x", {}, {"Id": ""}, {"Id": "../../x" * 4}, {"Id": 12}])
def test_what_names_no_container_is_none(said: object) -> None:
    assert parse(said) is None


def test_what_is_said_of_thousands_of_labels_and_ports_is_a_line_that_can_be_read() -> None:
    said = {f"portero.{number}": "x" for number in range(5000)}
    ports = tuple(f"{port}/tcp" for port in range(1, 5000))
    found = wanted(parsed(inspection("web", {"portero.service": "a.example", **said}, ports=ports)), OPTIONS)
    assert sum(map(len, found.complaints)) < 5000
    alone = wanted(parsed(inspection("web", ports=ports)), OPTIONS)
    assert alone.complaints == (
        "it exposes the ports 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...: say which by portero.port",
    )
