"""What a CA answers is a stranger's: a plain value comes of it, or a typed error, and nothing else."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from portero_py.control.acme import replies
from portero_py.errors import AcmeError, BadCaReply, CaRateLimited, CaRefused, CaUnreachable, ValidationFailed

URL = "https://ca.example/1"
PREFIX = "urn:ietf:params:acme:error:"


def reply(document: object, status: int = 200, **fields: str) -> requests.Response:
    made = requests.Response()
    made.status_code = status
    made._content = document if isinstance(document, bytes) else json.dumps(document).encode()
    made.headers.update({name.replace("_", "-"): value for name, value in fields.items()})
    return made


ORDER: dict[str, Any] = {
    "status": "invalid",
    "authorizations": ["https://ca.example/2"],
    "finalize": "https://ca.example/3",
    "error": {"type": f"{PREFIX}compound", "subproblems": [{"type": f"{PREFIX}dns", "detail": "NXDOMAIN"}]},
}
AUTHORIZATION: dict[str, Any] = {
    "status": "pending",
    "identifier": {"type": "dns", "value": "A.example"},
    "challenges": [{"type": "http-01", "url": URL, "token": "t", "status": "pending"}],
}
WINDOW: dict[str, Any] = {"start": "2025-01-02T04:00:00Z", "end": "2025-01-03T04:00:00.5Z"}


def test_an_order_is_read_with_the_first_of_its_problems() -> None:
    order = replies.order(URL, reply(ORDER, Retry_After="7"))
    assert (order.status, order.authorizations, order.finalize) == (
        *("invalid", ("https://ca.example/2",)),
        "https://ca.example/3",
    )
    assert order.retry_after == 7.0
    assert isinstance(order.error, ValidationFailed)
    assert "NXDOMAIN" in str(order.error)


def test_an_authorization_is_read() -> None:
    found = replies.authorization(URL, reply(AUTHORIZATION))
    assert (found.name, found.status, found.challenges[0].token) == ("a.example", "pending", "t")


def test_a_wildcard_s_authorization_has_the_name_that_was_ordered() -> None:
    """RFC 8555, 7.1.4: the identifier has no star, and `wildcard` is true."""
    found = replies.authorization(URL, reply({**AUTHORIZATION, "wildcard": True}))
    assert found.name == "*.a.example"
    assert replies.authorization(URL, reply({**AUTHORIZATION, "wildcard": "yes"})).name == "a.example"


def test_a_window_is_read() -> None:
    found = replies.renewal_info(
        reply({"suggestedWindow": WINDOW, "explanationURL": "https://ca.example/why"})
    )
    assert (found.start, found.end, found.why) == (1735790400.0, 1735876800.5, "https://ca.example/why")


@pytest.mark.parametrize(
    "window",
    [
        None,
        {},
        {**WINDOW, "end": WINDOW["start"]},
        {**WINDOW, "start": "2025-01-02T04:00:00"},
        {**WINDOW, "start": "soon"},
        {**WINDOW, "start": 5},
    ],
    ids=str,
)
def test_a_window_that_is_none_is_refused(window: object) -> None:
    with pytest.raises(BadCaReply):
        replies.renewal_info(reply({"suggestedWindow": window}))


def test_a_date_in_retry_after_is_a_number_of_seconds() -> None:
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 98 <= replies.order(URL, reply(ORDER, Retry_After=later)).retry_after <= 100
    for nonsense in ("soon", "-5", "1e9", "Fri, 99 Foo 2025 00:00:00 GMT", "٣"):
        assert replies.order(URL, reply(ORDER, Retry_After=nonsense)).retry_after == 0.0


@pytest.mark.parametrize(
    ("status", "document", "error"),
    [
        (429, {"type": f"{PREFIX}rateLimited", "detail": "slowly"}, CaRateLimited),
        (429, b"", CaUnreachable),
        (503, b"<html>", CaUnreachable),
        (500, [], CaUnreachable),
        (404, {"detail": 5}, CaRefused),
        (403, {"type": ["x"]}, CaRefused),
        (400, {"type": f"{PREFIX}malformed", "detail": ["x"]}, CaRefused),
        (302, {}, CaRefused),
        (199, {}, CaRefused),
    ],
)
def test_every_status_is_the_reply_or_an_error(status: int, document: object, error: type[AcmeError]) -> None:
    with pytest.raises(error) as caught:
        replies.checked(reply(document, status, Retry_After="60"))
    assert caught.value.retry_after == 60.0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from([ORDER, AUTHORIZATION, {"suggestedWindow": WINDOW}]), st.data(), JSON)
def test_any_field_may_hold_anything(document: dict[str, Any], data: st.DataObject, value: object) -> None:
    changed = json.loads(json.dumps(document))
    at = changed
    while True:
        key = data.draw(st.sampled_from(sorted(at)))
        if isinstance(at[key], dict) and data.draw(st.booleans()):
            at = at[key]
            continue
        at[key] = value
        break
    for read in (
        lambda made: replies.order(URL, made),
        lambda made: replies.authorization(URL, made),
        replies.renewal_info,
        replies.location,
        lambda made: replies.checked(reply(changed, 400)),
    ):
        try:
            read(reply(changed))
        except AcmeError:
            pass


@given(st.binary(max_size=200))
def test_bytes_that_are_no_json_are_refused(content: bytes) -> None:
    try:
        replies.document_of(reply(content))
    except BadCaReply:
        pass
