"""Whose client it is, by its cookie; and what of the cookie each side sees."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py.core.balancing.balancers import Balancers
from portero_py.core.health import Failure, Health
from portero_py.core.model import Backend, Lease, LeaseState, Service
from portero_py.core.policies import Sticky
from portero_py.core.stickiness import MEMO_SIZE, Stickiness, sticky_key
from portero_py.wire.message import Fields, RequestHead, ResponseHead
from tests.core.balancing.fleet import Busy

KEY = sticky_key("a secret")
STARTING, READY, DOWN, DRAINING = LeaseState


def lease(name: str, service: str = "app.example", state: LeaseState = READY) -> Lease:
    return Lease(service, name, Backend("192.0.2.9", 80), 100.0, 30, state=state)


def service(*names: str) -> Service:
    return Service("app.example", tuple(lease(name) for name in names))


def insert(key: bytes = KEY) -> Stickiness:
    return Stickiness(Sticky("srv"), key)


def prefix(key: bytes = KEY) -> Stickiness:
    return Stickiness(Sticky("SID", "prefix"), key)


def asked(*cookies: bytes) -> RequestHead:
    fields: Fields = [(b"Cookie", each) for each in cookies]
    return RequestHead(b"GET", b"/", b"app.example", b"1.1", fields)


def answered(*fields: tuple[bytes, bytes]) -> ResponseHead:
    return ResponseHead(200, b"OK", list(fields), 2)


def set_cookies(head: ResponseHead) -> list[bytes]:
    return [value for name, value in head.fields if name.lower() == b"set-cookie"]


# Tokens


def test_a_token_names_its_backend_in_every_worker_and_nobody_elses() -> None:
    two = service("A", "B")
    a, b = two.leases
    token = insert().token(a)
    assert re.fullmatch(rb"[0-9A-Za-z_-]{32}", token)
    assert insert().home(asked(b"srv=" + token), two) is a
    assert insert().token(b) != token
    assert insert().token(lease("A", "other.example")) != token
    assert insert(sticky_key("another")).home(asked(b"srv=" + token), two) is None


def test_a_token_says_nothing_of_its_backend() -> None:
    token = insert().token(lease("192.0.2.9:80"))
    assert b"192" not in token
    assert sticky_key("a secret") != b"a secret"


@pytest.mark.parametrize(
    "cookie", [b"", b"srv", b"srv=", b"srv=A", b"srv=" + b"x" * 32, b"other=%b", b"srv=%b="]
)
def test_what_is_no_token_names_nobody(cookie: bytes) -> None:
    two = service("A", "B")
    token = insert().token(two.leases[0])
    assert insert().home(asked(cookie.replace(b"%b", token)), two) is None


def test_a_token_of_which_only_the_handle_is_known_is_not_believed() -> None:
    two = service("A", "B")
    sticky = insert()
    token = sticky.token(two.leases[0])
    forged = token[:16] + b"A" * 16
    assert sticky.home(asked(b"srv=" + forged), two) is None
    assert sticky.home(asked(b"srv=" + forged, b"srv=" + token), two) is two.leases[0]


def test_a_home_is_found_after_each_change_of_its_service() -> None:
    sticky = insert()
    token = sticky.token(lease("B"))
    head = asked(b"srv=" + token)
    for names in ("AB", "A", "ABC"):
        of = service(*names)
        found = sticky.home(head, of)
        assert (found is of.leases[1]) if "B" in names else found is None


def test_who_is_at_one_address_for_several_sources_is_found_by_each_name() -> None:
    joined = replace(lease("A"), also=(replace(lease("static"), source="static"),))
    of = Service("app.example", (joined,))
    assert insert().home(asked(b"srv=" + insert().token(lease("static"))), of) is joined


@given(st.binary(max_size=200))
def test_no_cookie_field_breaks_it(value: bytes) -> None:
    two = service("A", "B")
    for sticky in (insert(), prefix()):
        assert sticky.home(asked(value), two) is None
        sticky.request_head(asked(value))


def test_a_huge_cookie_field_is_looked_at_up_to_its_eighth_value() -> None:
    two = service("A", "B")
    sticky = insert()
    token = sticky.token(two.leases[0])
    for wrong, home in ((7, two.leases[0]), (8, None), (3000, None)):
        assert sticky.home(asked(b"srv=x; " * wrong + b"srv=" + token), two) is home


# insert


def test_our_own_cookie_is_set_for_who_is_not_at_home() -> None:
    a = lease("A")
    head = answered((b"Content-Type", b"text/plain"))
    sent = insert().response_head(head, a, is_at_home=False, is_secure=True)
    token = insert().token(a)
    assert set_cookies(sent) == [b"srv=%b; Path=/; HttpOnly; SameSite=Lax; Secure" % token]
    assert (b"Cache-Control", b"private") in sent.fields
    assert (sent.status, sent.phrase, sent.body_length) == (200, b"OK", 2)
    assert head.fields == [(b"Content-Type", b"text/plain")]
    plain = insert().response_head(head, a, is_at_home=False, is_secure=False)
    assert set_cookies(plain) == [b"srv=%b; Path=/; HttpOnly; SameSite=Lax" % token]
    assert insert().response_head(head, a, is_at_home=True, is_secure=True) is head


def test_a_switch_of_protocols_carries_it_too() -> None:
    head = ResponseHead(101, b"Switching Protocols", [], upgrade=b"websocket")
    sent = insert().response_head(head, lease("A"), is_at_home=False, is_secure=True)
    assert (sent.status, sent.upgrade, len(set_cookies(sent))) == (101, b"websocket", 1)


def test_what_an_application_sets_under_our_name_is_dropped() -> None:
    head = answered((b"set-cookie", b"srv=theirs"), (b"Set-Cookie", b"own=1"), (b"X", b"srv=1"))
    sent = insert().response_head(head, lease("A"), is_at_home=True, is_secure=True)
    assert sent.fields == [(b"Set-Cookie", b"own=1"), (b"X", b"srv=1")]


def test_the_backend_does_not_see_our_cookie() -> None:
    head = asked(b"a=1; srv=x; b=2")
    head.upgrade = b"websocket"
    head.keep_alive = False
    sent = insert().request_head(head)
    assert sent.fields == [(b"Cookie", b"a=1; b=2")]
    assert (sent.upgrade, sent.keep_alive, sent.target) == (b"websocket", False, b"/")
    assert head.fields == [(b"Cookie", b"a=1; srv=x; b=2")]
    untouched = asked(b"a=1")
    assert insert().request_head(untouched) is untouched


# prefix


def test_the_applications_cookie_is_marked_on_the_way_out_and_bare_on_the_way_in() -> None:
    two = service("A", "B")
    b = two.leases[1]
    head = answered((b"Set-Cookie", b"SID=42; Path=/app; HttpOnly"), (b"Set-Cookie", b"x=1"))
    sent = prefix().response_head(head, b, is_at_home=False, is_secure=True)
    token = prefix().token(b)
    assert set_cookies(sent) == [b"SID=%b~42; Path=/app; HttpOnly" % token, b"x=1"]
    assert head.fields[0][1] == b"SID=42; Path=/app; HttpOnly"
    came = asked(b"x=1; SID=%b~42" % token)
    assert prefix().home(came, two) is b
    assert prefix().request_head(came).fields == [(b"Cookie", b"x=1; SID=42")]


def test_who_sets_no_cookie_is_not_sticky() -> None:
    head = answered((b"Set-Cookie", b"other=1"))
    assert prefix().response_head(head, lease("A"), is_at_home=False, is_secure=True) is head
    assert prefix().home(asked(b"SID=42"), service("A")) is None


def test_all_that_set_it_are_marked() -> None:
    head = answered((b"Set-Cookie", b"SID=1; Path=/a"), (b"set-cookie", b"SID=2; Path=/b"))
    sent = prefix().response_head(head, lease("A"), is_at_home=True, is_secure=True)
    assert all(b"~" in value for value in set_cookies(sent))


def test_the_mark_of_a_backend_that_is_gone_is_taken_off_too() -> None:
    token = prefix(sticky_key("yesterday's")).token(lease("gone"))
    came = asked(b"SID=%b~42" % token)
    assert prefix().home(came, service("A")) is None
    assert prefix().request_head(came).fields == [(b"Cookie", b"SID=42")]


# Who may stay


def stays(of: Service, name: str, excluded: str = "", *, now: float = 10.0) -> bool:
    [home] = [each for each in of.leases if each.instance_id == name]
    return Balancers(Busy(), Health()).may_stay(of, home, now, set(excluded), False)


def test_a_client_stays_while_nobody_goes_before_its_backend() -> None:
    def of(**states: LeaseState) -> Service:
        return Service("app.example", tuple(lease(name, state=state) for name, state in states.items()))

    assert stays(of(A=READY, B=READY), "A")
    assert not stays(of(A=READY, B=READY), "A", "A")
    assert not stays(of(A=READY, B=READY), "A", now=100.0)
    assert not stays(of(A=DRAINING, B=READY), "A")
    assert not stays(of(A=DOWN, B=STARTING), "A")
    assert not stays(of(A=STARTING, B=READY), "A")
    assert stays(of(A=DOWN, B=DOWN, C=DRAINING), "A")
    assert stays(of(A=STARTING, B=DOWN), "A")


def test_a_client_leaves_who_is_ejected_and_may_be_its_trial() -> None:
    health = Health()
    health.configure(1, 2.0, ())
    balancers = Balancers(Busy(), health)
    of = service("A", "B")
    a, b = of.leases
    health.failed(a, of, Failure.PROMPT, "refused", began=10.0, now=10.0)
    assert not balancers.may_stay(of, a, 10.5, (), False)
    assert balancers.may_stay(of, b, 10.5, (), False)
    assert balancers.may_stay(of, a, 11.0, (), False)
    assert not balancers.may_stay(of, a, 11.0, (), True)


def test_what_was_at_another_address_keeps_nobody_from_his_home() -> None:
    health = Health()
    health.configure(1, 2.0, ())
    balancers = Balancers(Busy(), health)
    former = service("A", "B")
    health.failed(former.leases[0], former, Failure.PROMPT, "refused", began=10.0, now=10.0)
    there = replace(former.leases[0], backend=Backend("A", 81))
    moved = replace(former, leases=(there, former.leases[1]))
    assert balancers.may_stay(moved, moved.leases[0], 10.1, (), False)


# What is remembered


def test_fields_that_are_shared_are_looked_at_once_and_so_many_are_remembered() -> None:
    of = service("A", "B")
    for sticky, name in ((insert(), b"srv"), (prefix(), b"SID")):
        tokens = [sticky.token(each) for each in of.leases]
        shared = [asked(b"a=1; %b=%b~42" % (name, token)) for token in tokens]
        if name == b"srv":
            shared = [asked(b"a=1; %b=%b" % (name, token)) for token in tokens]
        for head in shared:
            head.lines = b""
        for _ in range(2):
            assert [sticky.home(head, of) for head in shared] == list(of.leases)
            sent = [sticky.request_head(head).fields for head in shared]
            assert sent[0] == sent[1]
        assert sticky.request_head(shared[0]).fields is sent[0]
        for number in range(MEMO_SIZE + 5):
            head = RequestHead(b"GET", b"/", b"", b"2", [(b"cookie", b"x=%d" % number)])
            assert sticky.home(head, of) is None
        assert len(sticky._known) <= MEMO_SIZE
        sticky.home(asked(b"own=1"), of)
        assert sticky.home(shared[1], of) is of.leases[1]
