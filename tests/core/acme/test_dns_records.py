"""The records that answer dns-01."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py.core.acme.dns_records import (
    MAX_ALIASES,
    MAX_LINE,
    TxtRecord,
    end_of_aliases,
    from_json,
    line,
    record_name,
    record_value,
    to_json,
)
from portero_py.errors import DnsFailed


def test_a_name_and_its_wildcard_are_validated_at_one_record_name() -> None:
    assert record_name("a.example") == record_name("*.a.example") == "_acme-challenge.a.example"


def test_the_value_is_the_digest_of_the_key_authorization() -> None:
    # By openssl dgst -sha256 -binary | basenc --base64url.
    assert (
        record_value("evaGxfADs6pSRb2LAv9IZf17Dt3juxGJ-PCt92wr-oA.thumb")
        == "C4PQosoVQWW-AbdVFmwbU8B33Z62w2vU3bIO36pceJc"
    )
    assert len(record_value("")) == 43


def test_aliases_are_followed_to_the_end() -> None:
    aliases = {"a": "b", "b": "c"}
    assert end_of_aliases("a", lambda name: aliases.get(name, "")) == ["a", "b", "c"]
    assert end_of_aliases("c", lambda name: aliases.get(name, "")) == ["c"]


@pytest.mark.parametrize("aliases", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "b"}])
def test_a_circle_of_aliases_is_an_error(aliases: dict[str, str]) -> None:
    with pytest.raises(DnsFailed, match="a is an alias that leads back to"):
        end_of_aliases("a", lambda name: aliases.get(name, ""))


def test_too_many_aliases_are_an_error() -> None:
    def alias(name: str, last: int) -> str:
        return str(int(name) + 1) if int(name) < last else ""

    assert len(end_of_aliases("0", lambda name: alias(name, MAX_ALIASES))) == MAX_ALIASES + 1
    with pytest.raises(DnsFailed, match="more than 8"):
        end_of_aliases("0", lambda name: alias(name, MAX_ALIASES + 1))


@given(st.text())
def test_a_line_is_short_printable_and_has_no_outer_white_space(text: str) -> None:
    found = line(text)
    assert len(found) <= MAX_LINE
    assert found.isprintable()
    assert found == found.strip()


def test_what_is_kept_is_read_again() -> None:
    records = [TxtRecord("_acme-challenge.a.example", "x-_9"), TxtRecord("b", "y")]
    assert from_json(json.loads(json.dumps(to_json(records)))) == records


@pytest.mark.parametrize(
    "document",
    [
        {},
        [1],
        [{}],
        [{"name": "a"}],
        [{"name": 1, "value": "x"}],
        [{"name": "a", "value": None}],
        [{"name": "", "value": "x"}],
        [{"name": "a", "value": ""}],
        [{"name": "-a", "value": "x"}],
        [{"name": "a b", "value": "x"}],
        [{"name": "a", "value": "x\n"}],
        [{"name": "\u00e9", "value": "x"}],
        [{"name": "a" * 256, "value": "x"}],
    ],
)
def test_what_cannot_be_a_record_of_ours_is_refused(document: object) -> None:
    with pytest.raises(ValueError, match="it "):
        from_json(document)
