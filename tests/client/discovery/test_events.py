"""Docker's events, read: lines that a real one wrote, and some that none would."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portero_py.client.discovery.events import Event, Happened, read_event, signal_number

ID = "41d23c2bcf39c82192421bdc57f86815d6a8f0cacff61672b6fa6f2c0b24bdd8"


def line(action: object, kind: str = "container", **attributes: str) -> bytes:
    actor = {"ID": ID, "Attributes": {"image": "box", "name": "web", **attributes}}
    said = {"status": action, "id": ID, "Type": kind, "Action": action, "Actor": actor, "scope": "local"}
    return json.dumps(said).encode()


@pytest.mark.parametrize(
    ("action", "happened"),
    [
        ("start", Happened.STARTED),
        ("die", Happened.ENDED),
        ("destroy", Happened.DESTROYED),
        ("stop", Happened.CHANGED),
        ("pause", Happened.PAUSED),
        ("unpause", Happened.CHANGED),
        ("rename", Happened.CHANGED),
        ("health_status: healthy", Happened.CHANGED),
        ("health_status: unhealthy", Happened.UNHEALTHY),
        ("kill", Happened.SIGNALLED),
    ],
)
def test_what_happened_to_a_container(action: str, happened: Happened) -> None:
    assert read_event(line(action)) == Event(happened, ID)


def test_a_kill_tells_its_signal() -> None:
    assert read_event(line("kill", signal="15")) == Event(Happened.SIGNALLED, ID, 15)
    assert read_event(line("kill", signal="SIGQUIT")) == Event(Happened.SIGNALLED, ID, 3)


def test_an_event_tells_its_time() -> None:
    said = {**json.loads(line("start")), "timeNano": 1795304770_500000000}
    assert read_event(json.dumps(said).encode()) == Event(Happened.STARTED, ID, at=1795304770.5)


@pytest.mark.parametrize("action", ["connect", "disconnect"])
def test_a_container_that_joins_or_leaves_a_network_has_changed(action: str) -> None:
    other = "0" * 64
    assert read_event(line(action, "network", container=other)) == Event(Happened.CHANGED, other)
    assert read_event(line(action, "network")) is None


@pytest.mark.parametrize(
    "said",
    [
        line("exec_start: sh"),
        line("start", "network"),
        line("create", "network", container=ID),
        line(7),
        line(["start"]),
        b"null",
        b"[]",
        b'{"Action":"start"}',
        b'{"Action":"start","Actor":{"ID":"../../etc"}}',
        b'{"Action":"start","Actor":{"ID":null}}',
    ],
)
def test_what_does_not_matter_is_none(said: bytes) -> None:
    assert read_event(said) is None


@pytest.mark.parametrize("said", [b"{", b"\xff", b"start"])
def test_what_is_no_json_is_an_error(said: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_event(said)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("15", 15),
        ("SIGTERM", 15),
        ("term", 15),
        (" QUIT ", 3),
        ("SIGRTMIN+3", int(signal.SIGRTMIN) + 3),
        ("", 0),
        ("SIGNONE", 0),
        ("RTMIN+x", 0),
        ("-1", 0),
        ("²", 0),
    ],
)
def test_a_signal_is_a_number_however_it_is_written(name: str, number: int) -> None:
    assert signal_number(name) == number


_JSON = st.recursive(
    st.none() | st.booleans() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(["Type", "Action", "Actor"]), _JSON), _JSON)
def test_any_json_is_read(said: dict[str, Any], actor: Any) -> None:
    assert read_event(json.dumps(said).encode()) is None
    said = {"Type": "container", "Action": "start", "Actor": {"ID": actor, "Attributes": actor}}
    assert read_event(json.dumps(said).encode()) is None
