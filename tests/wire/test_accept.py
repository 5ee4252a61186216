"""Which of several answers a client likes best."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py.wire.accept import MAX_RANGES, preferred

TEXT, HTML, JSON = range(3)
OFFERS = ((b"text/plain",), (b"text/html",), (b"application/json", b"application/problem+json"))


@pytest.mark.parametrize(
    ("accept", "liked"),
    [
        ((), TEXT),
        ((b"",), TEXT),
        ((b"*/*",), TEXT),
        ((b"text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8",), HTML),
        ((b"application/json, text/plain, */*",), JSON),
        ((b"application/json;q=0.2, text/html;q=0.4",), HTML),
        ((b"text/html;q=0.4", b"application/problem+json"), JSON),
        ((b"TEXT/HTML",), HTML),
        ((b"text/*;q=0.5, application/*",), JSON),
        ((b"text/*, text/plain;q=0.1",), HTML),
        ((b"text/html;level=1;q=0, */*;q=0.1",), TEXT),
        ((b"text/plain;q=0, */*;q=0.1",), HTML),
        ((b"image/png",), TEXT),
        ((b"text/html;q=0",), TEXT),
        ((b"text/html;q=high, application/json;q=0.1",), JSON),
        ((b"text/html;q=7",), TEXT),
        ((b"text/html;q=nan",), TEXT),
        ((b" , ;q=1, text/html ; q=0.3",), HTML),
        ((b"application/json;q=1.0, text/html;q=1",), JSON),
    ],
)
def test_the_most_liked_kind_is_found(accept: tuple[bytes, ...], liked: int) -> None:
    assert preferred(accept, OFFERS) == liked


def test_nobody_has_us_look_at_thousands_of_ranges() -> None:
    assert preferred([b"a/b," * (MAX_RANGES - 1) + b"text/html"], OFFERS) == HTML
    assert preferred([b"a/b," * MAX_RANGES + b"text/html"], OFFERS) == TEXT


@given(st.lists(st.binary(max_size=60), max_size=3))
def test_whatever_a_client_sends_one_of_the_offers_is_its_answer(accept: list[bytes]) -> None:
    assert preferred(accept, OFFERS) in range(3)
