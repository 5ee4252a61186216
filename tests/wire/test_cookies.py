"""Cookies that are found, taken out and marked, while every other byte stays as it was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py.wire.cookies import Cookie, is_set, mark_of, marked, private
from portero_py.wire.message import Fields

P = Cookie(b"p")
MARK = b"abcdefghijklmnopqrstuvwxyz-_0123"


def cookies(*values: bytes) -> Fields:
    return [(b"Accept", b"*/*"), *((b"Cookie", value) for value in values), (b"X-Last", b"p")]


def left(*values: bytes) -> list[bytes]:
    """What of Cookie fields is left without the cookie p."""
    return [value for name, value in P.taken_out(cookies(*values)) if name == b"Cookie"]


def unmarked(*values: bytes) -> list[bytes]:
    return [value for name, value in P.unmarked(cookies(*values)) if name == b"Cookie"]


def test_a_value_is_found_by_its_name_as_it_is() -> None:
    assert P.value(cookies(b"a=1; p=2; b=3")) == b"2"
    assert P.value(cookies(b"p=2")) == b"2"
    assert P.value([(b"cookie", b"xp=1;px=2;p=3;p=4")]) == b"3"
    assert P.value(cookies(b" a=1 ;\tp = 2 ")) == b"2"
    assert P.value(cookies(b"p=a=b")) == b"a=b"
    assert P.value(cookies(b'p="a"')) == b'"a"'
    assert P.value(cookies(b"a=1", b"p=2")) == b"2"


@pytest.mark.parametrize("value", [b"P=1", b"p", b"", b";", b"=p", b"pp=1", b"a=p", b"a=1,p"])
def test_what_is_no_such_cookie_is_not_found_and_passes(value: bytes) -> None:
    assert P.value(cookies(value)) == b""
    fields = cookies(value)
    assert P.taken_out(fields) is fields
    assert P.unmarked(fields) is fields


def test_so_many_values_are_found_and_no_more() -> None:
    assert P.values(cookies(b"p=1; p=2", b"p=3"), 8) == [b"1", b"2", b"3"]
    assert P.values(cookies(b"p=1; p=2", b"p=3"), 2) == [b"1", b"2"]


def test_a_cookie_is_taken_out_wherever_it_stands() -> None:
    assert left(b"p=1; a=2; b=3") == [b"a=2; b=3"]
    assert left(b"a=2; p=1; b=3") == [b"a=2; b=3"]
    assert left(b"a=2; b=3; p=1") == [b"a=2; b=3"]
    assert left(b"p=1; a=2; p=3") == [b"a=2"]
    assert left(b"p=1") == []
    assert left(b"a=2", b"p=1", b"b=3; p=2") == [b"a=2", b"b=3"]
    assert left(b"p=1", b"b=3") == [b"b=3"]
    assert left(b"a;;b= ;p=1;  c") == [b"a;;b= ;  c"]


def test_the_fields_that_came_stay_as_they_are() -> None:
    fields = cookies(b"p=1; a=2")
    same = list(fields)
    assert P.taken_out(fields) == cookies(b"a=2")
    assert fields == same


def test_a_mark_is_taken_off_and_the_value_stays() -> None:
    assert unmarked(b"a=1; p=%b~v; b=2" % MARK) == [b"a=1; p=v; b=2"]
    assert unmarked(b'p="%b~v"' % MARK) == [b'p="v"']
    assert unmarked(b"p=%b~%b~v; p=%b~w" % (MARK, MARK, MARK)) == [b"p=%b~v; p=w" % MARK]
    assert unmarked(b"p=%b~" % MARK) == [b"p="]
    assert unmarked(b"p= %b~v" % MARK) == [b"p= v"]


@pytest.mark.parametrize("value", [b"v", b"~v", MARK, MARK[1:] + b"~v", b"=" + MARK + b"~v", b"v~" + MARK])
def test_what_is_no_mark_stays(value: bytes) -> None:
    fields = cookies(b"p=" + value)
    assert P.unmarked(fields) is fields
    assert mark_of(value) == b""


def test_a_mark_is_found() -> None:
    assert mark_of(MARK + b"~v") == MARK
    assert mark_of(b'"' + MARK + b'~v"') == MARK


def test_what_sets_a_cookie_is_marked_before_its_value() -> None:
    assert is_set(b"p=v; Path=/", b"p")
    assert is_set(b" p = v", b"p")
    assert not any(is_set(value, b"p") for value in (b"q=v; p=1", b"P=v", b"p", b"", b"pp=1"))
    assert marked(b"p=v; Path=/", MARK) == b"p=%b~v; Path=/" % MARK
    assert marked(b'p="v"; Path=/', MARK) == b'p="%b~v"; Path=/' % MARK
    assert marked(b"p = v", MARK) == b"p = %b~v" % MARK


@pytest.mark.parametrize("value", [b"p=", b"p=; Max-Age=0", b'p=""; Path=/', b"p= ;x"])
def test_a_cookie_that_is_deleted_is_not_marked(value: bytes) -> None:
    assert marked(value, MARK) == value


@given(st.binary().map(lambda value: value.replace(b";", b"").strip(b' \t"\r\n\v\f')))
def test_what_was_marked_comes_back_as_it_was(value: bytes) -> None:
    sent = marked(b"p=" + value, MARK)
    assert P.unmarked([(b"cookie", sent)]) == [(b"cookie", b"p=" + value)]


CRUMBS = st.sampled_from(
    [b"p=1", b" p =2", b"\tp=", b"", b" ", b"a=1", b" pp=3", b" p", b"P=1", b"=p", b"x p=1"]
)


@given(st.lists(st.one_of(CRUMBS, st.binary(max_size=6).map(lambda crumb: crumb.replace(b";", b"")))))
def test_others_are_never_touched(crumbs: list[bytes]) -> None:
    others = [crumb for crumb in crumbs if crumb.partition(b"=")[0].strip() != b"p" or b"=" not in crumb]
    fields = [(b"cookie", b";".join(crumbs))]
    if others == crumbs:
        assert P.taken_out(fields) is fields
    else:
        left = b";".join(others).lstrip(b"; \t")
        assert P.taken_out(fields) == ([(b"cookie", left)] if left else [])


def said(*values: bytes) -> list[bytes]:
    """Cache-Control of a response that is one client's."""
    fields = [(b"Date", b"d"), *((b"cache-control", value) for value in values)]
    found = private(fields)
    assert found[0] == (b"Date", b"d")
    return [value for name, value in found if name.lower() == b"cache-control"]


def test_no_shared_cache_keeps_what_is_one_clients() -> None:
    assert said() == [b"private"]
    assert said(b"max-age=60") == [b"max-age=60", b"private"]
    assert said(b"public, max-age=60, S-MaxAge=9") == [b"max-age=60", b"private"]
    assert said(b"Public", b's-maxage="9"') == [b"private"]
    assert said(b"max-age=0", b"No-Store") == [b"max-age=0", b"No-Store"]
    assert said(b"private,max-age=1") == [b"private,max-age=1"]
    assert said(b'private="set-cookie"') == [b'private="set-cookie"', b"private"]


def test_what_is_said_to_one_kind_of_cache_goes_too() -> None:
    """They would go by that alone (RFC 9213, 2.1)."""
    for own in (b"CDN-Cache-Control", b"cloudflare-cdn-cache-control", b"Surrogate-Control"):
        for general in (b"no-store", b"private", b"max-age=60"):
            found = private([(own, b"max-age=600"), (b"Cache-Control", general)])
            assert [name for name, _ in found if name == own] == []
            assert (b"Cache-Control", general) in found


@pytest.mark.parametrize("value", [b"srv=1;", b"srv=1; ", b" ; srv=1;;\t", b"srv=1; srv=2 ;"])
def test_of_a_field_with_nothing_else_in_it_nothing_is_left(value: bytes) -> None:
    assert Cookie(b"srv").taken_out([(b"Cookie", value), (b"A", b"b")]) == [(b"A", b"b")]
