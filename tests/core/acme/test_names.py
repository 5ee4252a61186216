"""Which names ACME may be asked for."""

from __future__ import annotations

import pytest

from portero_py.core.acme.names import (
    MAX_NAMES,
    allowed,
    certifiable,
    covered,
    has_wildcard,
    orderable,
    overlapping,
    read_group,
    read_pattern,
)
from portero_py.errors import ConfigError


@pytest.mark.parametrize(
    "name", ["a.example", "xn--bcher-kva.example", "a-b.c1.example", "1.example", "a.xn--p1ai"]
)
def test_a_host_name_can_be_certified(name: str) -> None:
    assert certifiable(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "localhost", "192.0.2.1", "2001:db8::1", "*.example.com", "a_b.example", "-a.example"),
        *(
            "a-.example",
            "a.example-",
            "a..example",
            "../etc.example",
            "a.b",
            f"{'a' * 64}.example",
            "a.example\n",
        ),
    ],
)
def test_what_no_public_ca_signs_cannot(name: str) -> None:
    assert not certifiable(name)


def test_a_group_is_normalised_and_keeps_its_order() -> None:
    assert read_group(" B.Example., a.example ,b.example") == ("b.example", "a.example")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a host name is needed"),
        (" , ", "a host name is needed"),
        ("*.example", '"*.example" is no host name'),
        ("a.*.example", "no host name"),
        ("*.*.a.example", "no host name"),
        ("a.example,*.a.example,www.a.example", '"www.a.example" is covered by "*.a.example"'),
        ("a b.example", "no host name"),
        ("a.example,192.0.2.1", '"192.0.2.1" is no host name'),
        (",".join(f"n{number}.example" for number in range(MAX_NAMES + 1)), "at most"),
    ],
)
def test_a_group_that_cannot_be_certified_says_why(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("*", r"\*")):
        read_group(text)


def test_a_wildcard_goes_onto_a_certificate_with_what_it_does_not_cover() -> None:
    group = read_group("*.A.Example, a.example, *.b.a.example, c.b.example")
    assert group == ("*.a.example", "a.example", "*.b.a.example", "c.b.example")
    assert has_wildcard(group)
    assert not has_wildcard(("a.example",))
    assert orderable("*.a.example")
    assert not orderable("*.*.example")


def test_what_a_listed_wildcard_covers_is_covered() -> None:
    listed = {"*.a.example", "b.example"}
    assert [covered(name, listed) for name in ("x.a.example", "b.example", "a.example", "y.x.a.example")] == [
        *(True, True, False, False)
    ]


def test_a_pattern_is_a_name_or_one_star_before_it() -> None:
    assert read_pattern("App.Example") == "app.example"
    assert read_pattern(" *.apps.example ") == "*.apps.example"


@pytest.mark.parametrize("text", ["", "*", "*.", "*.*.example", "a*.example", "**.example", "localhost"])
def test_another_pattern_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="is no pattern"):
        read_pattern(text)


def test_a_star_stands_for_exactly_one_label() -> None:
    patterns = ("one.example", "*.apps.example")
    assert allowed("one.example", patterns)
    assert allowed("a.apps.example", patterns)
    for name in ("apps.example", "a.b.apps.example", "two.example", "*.apps.example", "a_b.apps.example"):
        assert not allowed(name, patterns)


def test_a_name_in_two_groups_is_found() -> None:
    assert overlapping([("a.example", "b.example"), ("c.example",)]) == ""
    assert overlapping([("a.example", "b.example"), ("c.example", "b.example")]) == "b.example"
