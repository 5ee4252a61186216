"""What is wanted of containers, by what happened to them: rules first, then against a model of Docker."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from portero_py.client.discovery.containers import Options, parse
from portero_py.client.discovery.events import Event, Happened
from portero_py.client.discovery.watch import STOP_PATIENCE, Seen, Watch
from tests.client.discovery.inspections import id_of, inspection

WEB = id_of("web")


def event(happened: Happened, name: str = "web", signal: int = 0, at: float = 0.0) -> Event:
    return Event(happened, id_of(name), signal, at)


def started(number: int) -> float:
    """When an inspection says that it was started so."""
    found = parse(inspection("web", started=number))
    assert found is not None
    return found.started_at


def summary(name: str, **labels: str) -> dict[str, Any]:
    return {"Id": id_of(name), "Labels": labels or {"portero.service": "app.example"}, "State": "running"}


def look(watch: Watch, said: dict[str, Any] | None, name: str = "web", now: float = 0.0) -> Seen:
    found = watch.seen(id_of(name), parse(said), None, watch.begin(), now)
    assert found is not None
    return found


def watching(**more: Any) -> Watch:
    """It has seen `web`, which serves."""
    watch = Watch(Options())
    assert watch.heard(event(Happened.STARTED), 0.0) == ""
    assert watch.next_look() == WEB
    assert look(watch, inspection("web", **more)).registrations
    return watch


def test_one_whose_start_was_missed_is_looked_at_again_when_a_look_is_overtaken() -> None:
    watch = watching()
    watch.heard(event(Happened.ENDED), 0.0)
    # The stream breaks off, it starts, all are listed.
    watch.listed([summary("web")], watch.begin())
    assert watch.next_look() == WEB
    began = watch.begin()
    watch.heard(event(Happened.SIGNALLED, signal=1), 0.0)
    assert watch.seen(WEB, parse(inspection("web")), None, began, 0.0) is None
    assert watch.next_look() == WEB


class TestLooks:
    def test_a_container_that_starts_is_looked_at_once(self) -> None:
        watch = Watch(Options())
        for _ in range(3):
            watch.heard(event(Happened.STARTED), 0.0)
        assert watch.next_look() == WEB
        assert watch.next_look() is None
        assert watch.is_settled

    def test_one_that_says_nothing_of_us_is_forgotten(self) -> None:
        watch = Watch(Options())
        watch.heard(event(Happened.STARTED), 0.0)
        found = look(watch, inspection("web", {"com.example": "x"}))
        assert (found.registrations, found.is_news) == ((), False)
        assert watch.count == 0

    def test_what_was_seen_before_the_last_event_is_no_news(self) -> None:
        watch = watching()
        began = watch.begin()
        assert watch.heard(event(Happened.PAUSED), 0.0) == "it is paused"
        watch.next_look()
        assert watch.seen(WEB, parse(inspection("web")), None, began, 0.0) is None
        assert watch.next_look() == WEB
        assert look(watch, inspection("web", Paused=True)).why_not == "it is paused"

    def test_one_that_ended_during_a_look_is_not_looked_at_again(self) -> None:
        watch = watching()
        began = watch.begin()
        assert watch.heard(event(Happened.ENDED), 0.0) == "it has ended"
        assert watch.seen(WEB, parse(inspection("web")), None, began, 0.0) is None
        assert watch.is_settled

    def test_one_that_was_removed_during_a_look_is_forgotten(self) -> None:
        watch = watching()
        began = watch.begin()
        watch.heard(event(Happened.DESTROYED), 0.0)
        assert watch.seen(WEB, parse(inspection("web")), None, began, 0.0) is None
        assert watch.count == 0
        watch.look_again(WEB)
        assert watch.is_settled

    def test_a_look_that_failed_is_done_again(self) -> None:
        watch = watching()
        watch.look_again(WEB)
        assert watch.next_look() == WEB

    def test_a_stop_that_is_told_after_the_next_start_ends_nothing(self) -> None:
        watch = watching()
        for happened in (Happened.ENDED, Happened.STARTED, Happened.CHANGED):
            why_not = watch.heard(event(happened), 0.0)
        assert why_not == ""
        assert watch.next_look() == WEB

    def test_whoever_uses_the_network_of_one_that_starts_anew_is_looked_at(self) -> None:
        watch = Watch(Options())
        watch.heard(event(Happened.STARTED, "app"), 0.0)
        assert watch.next_look() == id_of("app")
        app = parse(inspection("app", networks={}, mode=f"container:{id_of('vpn')}"))
        vpn = parse(inspection("vpn", {}))
        assert watch.seen(id_of("app"), app, vpn, watch.begin(), 0.0)
        watch.heard(event(Happened.STARTED, "vpn"), 0.0)
        assert {watch.next_look(), watch.next_look()} == {id_of("app"), id_of("vpn")}


class TestSignals:
    def test_one_that_is_told_to_end_takes_nothing_new_though_it_still_runs(self) -> None:
        watch = watching(health="healthy")
        assert watch.heard(event(Happened.SIGNALLED, signal=15), 0.0) == "it is about to end"
        watch.heard(event(Happened.CHANGED), 1.0)
        assert look(watch, inspection("web", health="healthy"), now=1.0).why_not == "it is about to end"

    def test_a_hangup_ends_nothing(self) -> None:
        watch = watching()
        assert watch.heard(event(Happened.SIGNALLED, signal=1), 0.0) == ""
        assert watch.heard(event(Happened.SIGNALLED, signal=0), 0.0) == ""
        assert look(watch, inspection("web")).registrations

    def test_a_container_s_own_stop_signal_ends_it(self) -> None:
        watch = watching(stop_signal="SIGQUIT")
        assert watch.heard(event(Happened.SIGNALLED, signal=3), 0.0) == "it is about to end"
        assert watching().heard(event(Happened.SIGNALLED, signal=3), 0.0) == ""

    def test_one_that_was_started_anew_is_taken_back(self) -> None:
        watch = watching()
        for happened in (Happened.SIGNALLED, Happened.ENDED, Happened.STARTED):
            watch.heard(event(happened, signal=15), 0.0)
        assert look(watch, inspection("web", started=2)).registrations

    def test_so_is_one_whose_start_nobody_told(self) -> None:
        watch = watching()
        watch.heard(event(Happened.SIGNALLED, signal=15, at=started(1) + 0.1), 0.0)
        assert not look(watch, inspection("web", started=1)).registrations
        assert look(watch, inspection("web", started=2)).registrations

    def test_so_is_one_that_nobody_saw_before_its_signal(self) -> None:
        watch = Watch(Options())
        watch.heard(event(Happened.SIGNALLED, signal=15, at=started(1) + 0.1), 0.0)
        watch.listed([summary("web")], watch.begin())
        assert look(watch, inspection("web", started=2)).registrations

    def test_one_that_goes_on_is_taken_back_in_the_end(self) -> None:
        watch = watching()
        watch.heard(event(Happened.SIGNALLED, signal=15), 0.0)
        watch.heard(event(Happened.SIGNALLED, signal=15), 9.0)
        assert not look(watch, inspection("web"), now=STOP_PATIENCE - 1).registrations
        assert look(watch, inspection("web"), now=STOP_PATIENCE).registrations


class TestListings:
    def test_all_that_speak_of_us_are_looked_at(self) -> None:
        watch = Watch(Options())
        listing = [summary("web"), summary("db", other="x"), None, {"Id": "x"}, summary("pingoo.service")]
        assert watch.listed(listing, watch.begin()) == []
        assert [watch.next_look(), watch.next_look(), watch.next_look()] == [
            WEB,
            id_of("pingoo.service"),
            None,
        ]

    def test_who_is_not_listed_is_gone(self) -> None:
        watch = watching()
        assert watch.listed([], watch.begin()) == [WEB]
        assert watch.listed([], watch.begin()) == []

    def test_who_started_while_it_was_listed_is_not_gone(self) -> None:
        watch = Watch(Options())
        began = watch.begin()
        watch.heard(event(Happened.STARTED), 0.0)
        assert watch.listed([], began) == []
        assert watch.next_look() == WEB

    def test_a_known_one_is_looked_at_again(self) -> None:
        watch = watching()
        watch.listed([summary("web")], watch.begin())
        assert watch.next_look() == WEB


BAD = {"portero.service": "app.example", "portero.port": "x"}


class TestNews:
    def test_what_is_wrong_is_said_once(self) -> None:
        watch = Watch(Options())
        watch.heard(event(Happened.STARTED), 0.0)
        first, second = (look(watch, inspection("web", BAD)) for _ in range(2))
        assert first.complaint == 'portero.port: "x" is no whole number from 1 to 65535'
        assert second.complaint == ""

    def test_not_again_after_a_restart_nor_after_a_listing_without_it(self) -> None:
        watch = Watch(Options())
        watch.heard(event(Happened.STARTED), 0.0)
        assert look(watch, inspection("web", BAD)).complaint
        for happened in (Happened.ENDED, Happened.STARTED):
            watch.heard(event(happened), 0.0)
        assert not look(watch, inspection("web", BAD, started=2)).complaint
        watch.listed([], watch.begin())
        watch.heard(event(Happened.STARTED), 0.0)
        assert not look(watch, inspection("web", BAD, started=3)).complaint

    def test_again_when_it_is_something_else_and_when_it_comes_back(self) -> None:
        watch = Watch(Options())
        watch.heard(event(Happened.STARTED), 0.0)
        two = {"a": "10.0.0.1", "b": "10.0.0.2"}
        said = [look(watch, inspection("web", networks=networks)).complaint for networks in (two, None, two)]
        assert [bool(each) for each in said] == [True, False, True]

    def test_nothing_is_said_of_one_that_does_not_run(self) -> None:
        watch = Watch(Options())
        watch.heard(event(Happened.STARTED), 0.0)
        assert look(watch, inspection("web", networks={}, Running=False)).complaint == ""

    def test_why_one_does_not_serve_is_news_when_it_is_another_reason(self) -> None:
        watch = Watch(Options())
        watch.heard(event(Happened.STARTED), 0.0)
        seen = [
            look(watch, inspection("web", health=health)) for health in ("starting", "starting", "unhealthy")
        ]
        assert [each.is_news for each in seen] == [True, False, True]
        watch.heard(event(Happened.PAUSED), 0.0)
        assert not look(watch, inspection("web", health="unhealthy", Paused=True)).is_news

    def test_what_is_remembered_has_a_limit(self, monkeypatch: Any) -> None:
        monkeypatch.setattr("portero_py.client.discovery.watch.REMEMBERED", 1)
        watch = Watch(Options())
        for name in ("one", "two"):
            watch.heard(event(Happened.STARTED, name), 0.0)
            assert look(watch, inspection(name, BAD), name).complaint
        assert not look(watch, inspection("two", BAD), "two").complaint
        assert look(watch, inspection("one", BAD), "one").complaint


NAMES = ("one", "two", "three")


class DockerModel(RuleBasedStateMachine):
    """A Docker whose events come late and get lost with their stream, and who watches it.

    When all events have come, and all looks are done, what is wanted is what serves; and nothing goes to a
    container that ended, from its event on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watch = Watch(Options())
        self.now = 0.0
        self.containers: dict[str, dict[str, Any]] = {}
        self.stopping: set[str] = set()
        self.heard_to_stop: set[str] = set()
        self.starts = 0
        self.under_way: list[Event] = []
        self.looks: list[tuple[str, Any, int]] = []
        self.wanted: set[str] = set()
        self.is_connected = True

    def tell(self, happened: Happened, name: str, signal: int = 0) -> None:
        if self.is_connected:
            self.under_way.append(event(happened, name, signal, started(self.starts) + 0.1))

    # Docker

    @rule(name=st.sampled_from(NAMES), labelled=st.booleans())
    def start(self, name: str, labelled: bool) -> None:
        if name not in self.containers:
            self.starts = min(self.starts + 1, 59)
            labels = None if labelled else {"com.example": "x"}
            self.containers[name] = inspection(name, labels, started=self.starts)
            self.tell(Happened.STARTED, name)

    @rule(name=st.sampled_from(NAMES))
    def end(self, name: str) -> None:
        if self.containers.pop(name, None) is not None:
            self.stopping.discard(name)
            self.heard_to_stop.discard(name)
            self.tell(Happened.ENDED, name)

    @rule(name=st.sampled_from(NAMES))
    def signal(self, name: str) -> None:
        if name in self.containers and self.is_connected:
            self.stopping.add(name)
            self.tell(Happened.SIGNALLED, name, 15)

    @rule(name=st.sampled_from(NAMES), paused=st.booleans())
    def pause(self, name: str, paused: bool) -> None:
        if name in self.containers and self.containers[name]["State"]["Paused"] != paused:
            self.containers[name]["State"]["Paused"] = paused
            self.tell(Happened.PAUSED if paused else Happened.CHANGED, name)

    @rule(name=st.sampled_from(NAMES), health=st.sampled_from(["healthy", "unhealthy"]))
    def probe(self, name: str, health: str) -> None:
        if name in self.containers:
            self.containers[name]["State"]["Health"] = {"Status": health}
            self.tell(Happened.UNHEALTHY if health == "unhealthy" else Happened.CHANGED, name)

    # The connection

    @precondition(lambda self: self.under_way)
    @rule()
    def an_event_comes(self) -> None:
        came = self.under_way.pop(0)
        if self.watch.heard(came, self.now):
            self.wanted.discard(came.container_id)
        if came.happened is Happened.SIGNALLED:
            self.heard_to_stop |= {name for name in self.stopping if id_of(name) == came.container_id}

    @rule()
    def the_stream_breaks(self) -> None:
        self.is_connected = False
        self.under_way.clear()
        # A signal that nobody heard of, or of a container that nobody has seen, says nothing.
        self.stopping &= self.heard_to_stop

    @rule()
    def all_are_listed(self) -> None:
        self.is_connected = True
        began = self.watch.begin()
        listing = [
            {"Id": said["Id"], "Labels": said["Config"]["Labels"]} for said in self.containers.values()
        ]
        for gone in self.watch.listed(listing, began):
            self.wanted.discard(gone)

    @rule()
    def a_look_begins(self) -> None:
        container_id = self.watch.next_look()
        if container_id is not None:
            found = [said for said in self.containers.values() if said["Id"] == container_id]
            self.looks.append((container_id, parse(found[0] if found else None), self.watch.begin()))

    @precondition(lambda self: self.looks)
    @rule(data=st.data())
    def a_look_ends(self, data: st.DataObject) -> None:
        container_id, container, began = self.looks.pop(data.draw(st.integers(0, len(self.looks) - 1)))
        seen = self.watch.seen(container_id, container, None, began, self.now)
        if seen is not None:
            (self.wanted.add if seen.registrations else self.wanted.discard)(container_id)

    @rule()
    def in_the_end_what_is_wanted_is_what_serves(self) -> None:
        if not self.is_connected:
            self.all_are_listed()
        while self.under_way:
            self.an_event_comes()
        while self.looks:
            container_id, container, began = self.looks.pop(0)
            seen = self.watch.seen(container_id, container, None, began, self.now)
            if seen is not None:
                (self.wanted.add if seen.registrations else self.wanted.discard)(container_id)
        while not self.watch.is_settled:
            self.a_look_begins()
            while self.looks:
                container_id, container, began = self.looks.pop(0)
                seen = self.watch.seen(container_id, container, None, began, self.now)
                if seen is not None:
                    (self.wanted.add if seen.registrations else self.wanted.discard)(container_id)
        serving = {
            said["Id"]
            for name, said in self.containers.items()
            if "portero.service" in said["Config"]["Labels"]
            and not said["State"]["Paused"]
            and said["State"].get("Health", {}).get("Status") != "unhealthy"
        }
        stopping = {id_of(name) for name in self.stopping}
        assert self.wanted - stopping == serving - stopping
        if self.is_connected:
            assert not self.wanted & stopping

    @invariant()
    def what_is_remembered_is_bounded(self) -> None:
        assert self.watch.count <= len(NAMES)


DockerModel.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestAgainstAModel = DockerModel.TestCase
