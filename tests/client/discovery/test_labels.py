"""What labels say, and what is said of those that say nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py.client.discovery import labels
from portero_py.client.discovery.labels import FIELDS, Reading, Wish, is_labelled, read
from portero_py.control.api import body
from portero_py.core.names import normalise_service_name
from portero_py.errors import BadField


@pytest.mark.parametrize(
    ("said", "wishes"),
    [
        ({}, []),
        ({"com.example": "x", "porterox.service": "a"}, []),
        ({"portero.service": "app.example"}, [Wish("app.example")]),
        ({"portero.service": " App.Example. "}, [Wish("app.example")]),
        ({"portero.service": "*.example.com"}, [Wish("*.example.com")]),
        ({"portero.service": "a.example, b.example"}, [Wish("a.example"), Wish("b.example")]),
        ({"portero.service": "a.example,A.example"}, [Wish("a.example")]),
        (
            {
                "portero.service": "a",
                "portero.port": "8080",
                "portero.network": "front",
                "portero.weight": "3",
                "portero.tls": "True",
                "portero.health_path": "/up?deep=1",
                "portero.protocol": "h2",
                "portero.max_in_flight": "50",
            },
            [Wish("a", 8080, "front", 3, True, "/up?deep=1", "h2", 50)],
        ),
        ({"portero.service": "a", "portero.tls": "no"}, [Wish("a")]),
        (
            {
                "portero.web.service": "www.example",
                "portero.web.port": "80",
                "portero.api.service": "api.example",
                "portero.api.port": "8080",
            },
            [Wish("api.example", 8080), Wish("www.example", 80)],
        ),
        (
            {
                "portero.network": "front",
                "portero.port": "80",
                "portero.web.service": "www.example",
                "portero.api.service": "api.example",
                "portero.api.port": "8080",
            },
            [Wish("api.example", 8080, "front"), Wish("www.example", 80, "front")],
        ),
        (
            {"portero.service": "a", "portero.weight": "2", "portero.more.service": "b"},
            [Wish("a", weight=2), Wish("b", weight=2)],
        ),
        ({"portero.port.service": "a", "portero.port.port": "1"}, [Wish("a", 1)]),
        ({"pingoo.service": "a", "pingoo.port": "9000"}, [Wish("a", 9000)]),
        ({"pingoo.service": "a", "pingoo.port": "9000", "portero.service": "b"}, [Wish("b")]),
    ],
)
def test_what_labels_say(said: dict[str, str], wishes: list[Wish]) -> None:
    assert read(said) == Reading(tuple(wishes))
    assert is_labelled(said) == bool(wishes)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"portero.service": ""}, 'portero.service: "" is no host name, address or *.example.com'),
        (
            {"portero.service": "a.example/path"},
            'portero.service: "a.example/path" is no host name, address or *.example.com',
        ),
        ({"portero.service": "a.example,"}, 'portero.service: "" is no host name, address or *.example.com'),
        (
            {"portero.service": "a", "portero.port": "http"},
            'portero.port: "http" is no whole number from 1 to 65535',
        ),
        (
            {"portero.service": "a", "portero.port": "65536"},
            'portero.port: "65536" is no whole number from 1 to 65535',
        ),
        (
            {"portero.service": "a", "portero.weight": "0"},
            'portero.weight: "0" is no whole number from 1 to 1000',
        ),
        (
            {"portero.service": "a", "portero.max_in_flight": "-1"},
            'portero.max_in_flight: "-1" is no whole number from 1 to 1000000',
        ),
        ({"portero.service": "a", "portero.tls": "maybe"}, 'portero.tls: "maybe" is neither true nor false'),
        (
            {"portero.service": "a", "portero.protocol": "http3"},
            'portero.protocol: "http3" is none of http1, h2, h2c',
        ),
        (
            {"portero.service": "a", "portero.health_path": "up"},
            'portero.health_path: "up" is no path: it begins with / and has no spaces',
        ),
        ({"portero.port": "80"}, "there is no portero.service"),
        ({"portero.web.port": "80"}, "there is no portero.web.service"),
        ({"pingoo.port": "80"}, "there is no portero.service"),
    ],
)
def test_a_value_that_cannot_be_used_takes_its_service_away(said: dict[str, str], complaint: str) -> None:
    assert read(said) == Reading((), (complaint,))


def test_the_other_services_of_the_container_stay() -> None:
    said = {
        "portero.a.service": "a.example",
        "portero.a.port": "x",
        "portero.b.service": "b.example",
    }
    complaint = 'portero.a.port: "x" is no whole number from 1 to 65535'
    assert read(said) == Reading((Wish("b.example"),), (complaint,))


def test_one_bad_value_for_all_is_one_complaint() -> None:
    said = {"portero.weight": "x", "portero.a.service": "a.example", "portero.b.service": "b.example"}
    assert read(said) == Reading((), ('portero.weight: "x" is no whole number from 1 to 1000',))


@pytest.mark.parametrize("label", ["portero.weigth", "portero.a.b.port", "portero.", "portero.ä.port"])
def test_a_label_that_means_nothing_takes_nothing_away(label: str) -> None:
    complaint = f'"{label}" is no label of portero\'s, and ignored'
    assert read({"portero.service": "a", label: "3"}) == Reading((Wish("a"),), (complaint,))


def test_what_is_shown_of_a_value_has_a_limit() -> None:
    found = read({"portero.service": "a", "portero.port": "9" * 10_000})
    assert len(found.complaints[0]) < 200


def test_the_limits_are_those_of_the_registration_api() -> None:
    assert (labels.MAX_WEIGHT, labels.MAX_IN_FLIGHT) == (body.MAX_WEIGHT, body.MAX_IN_FLIGHT)
    assert set(labels.FIELDS) == {
        *("service", "port", "network", "weight", "tls", "health_path", "protocol", "max_in_flight")
    }


_VALUES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["a.example", "a,b", "80", "8080", "true", "no", "/up", "http1", "*.x", "0", "1"]),
)
_LABELS = st.dictionaries(
    st.one_of(
        st.text(max_size=20),
        st.builds("portero.{}".format, st.text(max_size=10)),
        st.builds("portero.{}".format, st.sampled_from(FIELDS)),
        st.builds("portero.{}.{}".format, st.sampled_from("ab"), st.sampled_from(FIELDS)),
        st.sampled_from(["pingoo.service", "pingoo.port"]),
    ),
    _VALUES,
    max_size=12,
)


@given(_LABELS)
def test_whatever_is_said_what_is_wished_is_what_the_api_takes(said: dict[str, str]) -> None:
    found = read(said)
    for wish in found.wishes:
        assert normalise_service_name(wish.service) == wish.service
        asked = {
            "service_name": wish.service,
            "host": "10.0.0.1",
            "port": wish.port or 80,
            "ttl_seconds": 60,
            "use_tls": wish.use_tls,
            "weight": wish.weight,
            "health_path": wish.health_path or None,
            "max_in_flight": wish.max_in_flight or None,
        }
        try:
            body.lease_request(asked)
        except BadField as error:
            raise AssertionError(f"{wish}: {error}") from error


@given(_LABELS)
def test_a_container_that_speaks_of_us_is_heard_or_complained_of(said: dict[str, str]) -> None:
    found = read(said)
    assert is_labelled(said) == bool(found.wishes or found.complaints)


def test_a_label_as_long_as_a_book_makes_neither_thousands_of_leases_nor_a_line_as_long() -> None:
    found = read({"portero.service": ",".join(f"{number}.example" for number in range(50_000))})
    assert len(found.wishes) == labels.MAX_SERVICES
    assert found.complaints == ("these are 50000 services: all but the first 1000 are left out",)
    assert labels.few(["a", "a", "b"]) == ("a", "b")
    many = labels.few(map(str, range(5000)))
    assert (len(many), many[-1]) == (labels.MAX_COMPLAINTS + 1, "and 4990 more")
