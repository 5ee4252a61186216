"""Leases come, are renewed, move, end; each change is a new table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portero_py.core.model import API, NEVER, Backend, Halt, Lease, LeaseRequest, LeaseState, Service
from portero_py.core.policies import DEFAULTS, ServicePolicy
from portero_py.core.registry import LINGER, Registry
from portero_py.core.routes import NO_ROUTES, Route, Routes
from portero_py.errors import ConfigError, NoSuchLease, RegistryFull, UnknownService


def ask(
    host: str = "::1", port: int = 8080, *, service: str = "app.example", instance_id: str = "", ttl: int = 30
) -> LeaseRequest:
    return LeaseRequest(service, Backend(host, port), ttl, instance_id)


def addresses(registry: Registry, service: str = "app.example") -> list[str]:
    return [lease.backend.address for lease in registry.table.services[service].leases]


def test_a_registered_backend_is_in_the_next_table_until_its_ttl_is_over() -> None:
    registry = Registry()
    lease = registry.register(
        LeaseRequest(
            "app.example", Backend("::1", 8080, use_tls=True), 30, "one", weight=3, health_path="/up"
        ),
        now=100.0,
    )
    assert lease == Lease(
        *("app.example", "one", Backend("::1", 8080, use_tls=True), 130.0, 30, 3, "/up"),
        state=LeaseState.STARTING,
        since=100.0,
    )
    assert dict(registry.table.services) == {"app.example": Service("app.example", (lease,))}


def test_without_an_instance_id_the_address_is_the_instance_id() -> None:
    registry = Registry()
    assert registry.register(ask("::1", 8080), now=0.0).instance_id == "[::1]:8080"
    assert registry.register(ask("192.0.2.7", 80), now=0.0).instance_id == "192.0.2.7:80"


def test_a_renewal_by_instance_id_moves_the_expiry_and_keeps_the_place() -> None:
    registry = Registry()
    registry.register(ask(port=1, instance_id="one"), now=0.0)
    registry.register(ask(port=2, instance_id="two"), now=0.0)
    lease = registry.register(ask(port=1, instance_id="one"), now=20.0)
    assert lease.expires_at == 50.0
    assert addresses(registry) == ["[::1]:1", "[::1]:2"]
    assert [ended.instance_id for ended in registry.expire(30.0)] == ["two"]
    assert registry.lease_count == 1


def test_a_renewal_by_address_keeps_the_instance_id_that_holds_it() -> None:
    registry = Registry()
    registry.register(ask(port=1, instance_id="one"), now=0.0)
    lease = registry.register(ask(port=1), now=20.0)
    assert (lease.instance_id, lease.expires_at) == ("one", 50.0)
    assert registry.lease_count == 1


def test_a_renewal_with_another_address_takes_effect_at_once() -> None:
    registry = Registry()
    registry.register(ask(port=1, instance_id="one"), now=0.0)
    registry.register(ask(port=2, instance_id="one"), now=1.0)
    assert addresses(registry) == ["[::1]:2"]
    assert registry.find("app.example", host="::1", port=1) is None
    # The address it left is free for another instance.
    assert registry.register(ask(port=1), now=2.0).instance_id == "[::1]:1"
    assert registry.lease_count == 2


def test_an_instance_at_another_ones_address_takes_its_place() -> None:
    registry = Registry()
    registry.register(ask(port=1, instance_id="before the restart"), now=0.0)
    registry.register(ask(port=1, instance_id="after it"), now=1.0)
    assert addresses(registry) == ["[::1]:1"]
    assert registry.lease_count == 1
    assert registry.find("app.example", "before the restart") is None
    registry.register(ask(port=2, instance_id="another"), now=2.0)
    registry.register(ask(port=1, instance_id="another"), now=3.0)
    assert [lease.instance_id for lease in registry.table.services["app.example"].leases] == ["another"]


def test_the_same_address_may_serve_two_services() -> None:
    registry = Registry()
    registry.register(ask(service="a.example", instance_id="one"), now=0.0)
    registry.register(ask(service="b.example", instance_id="one"), now=0.0)
    assert registry.lease_count == 2
    registry.release("a.example", "one", now=1.0)
    assert addresses(registry, "b.example") == ["[::1]:8080"]


def test_every_change_makes_the_version_one_greater_and_leaves_old_tables_alone() -> None:
    registry = Registry()
    empty = registry.table
    registry.register(ask(port=1, ttl=10), now=0.0)
    one = registry.table
    assert registry.table is one
    registry.register(ask(port=2, ttl=99), now=0.0)
    registry.release("app.example", host="::1", port=2, now=1.0)
    registry.expire(5.0)
    registry.expire(10.0)
    registry.expire(10.0 + LINGER)
    assert [empty.version, one.version, registry.table.version] == [0, 1, 5]
    assert not empty.services
    assert len(one.services["app.example"].leases) == 1
    assert not registry.table.services


def test_a_release_ends_one_lease_by_instance_id_or_by_address() -> None:
    registry = Registry()
    for port in (1, 2, 3):
        registry.register(ask(port=port, instance_id=f"i{port}"), now=0.0)
    assert registry.release("app.example", "i2", now=1.0).backend.port == 2
    assert registry.release("app.example", host="::1", port=3, now=1.0).instance_id == "i3"
    assert addresses(registry) == ["[::1]:1"]
    assert registry.expire(1e9)[0].instance_id == "i1"


@pytest.mark.parametrize(
    ("service", "instance_id", "port"),
    [
        ("app.example", "two", 0),
        ("app.example", "", 2),
        ("app.example", "", 0),
        ("other.example", "one", 0),
        ("other.example", "", 1),
    ],
)
def test_what_was_never_registered_cannot_be_released(service: str, instance_id: str, port: int) -> None:
    registry = Registry()
    registry.register(ask(port=1, instance_id="one"), now=0.0)
    with pytest.raises(NoSuchLease):
        registry.release(service, instance_id, "::1", port, now=1.0)
    assert registry.table.version == 1


def test_a_lease_ends_exactly_when_its_ttl_is_over() -> None:
    registry = Registry()
    lease = registry.register(ask(ttl=30), now=0.0)
    assert registry.next_expiry() == 30.0
    assert registry.expire(29.999) == []
    assert registry.expire(30.0) == [lease]
    assert registry.expire(30.0) == []


@pytest.mark.parametrize("how", ["expired", "released"])
def test_a_service_without_leases_stays_known_for_a_while(how: str) -> None:
    registry = Registry()
    registry.register(ask(ttl=30), now=0.0)
    if how == "expired":
        registry.expire(30.0)
    else:
        registry.release("app.example", host="::1", port=8080, now=30.0)
    assert registry.table.services["app.example"] == Service("app.example", ())
    assert (registry.host_count, registry.service_count, registry.lease_count) == (0, 1, 0)
    assert registry.next_expiry() == 30.0 + LINGER
    registry.expire(29.9 + LINGER)
    assert "app.example" in registry.table.services
    assert registry.expire(30.0 + LINGER) == []
    assert "app.example" not in registry.table.services
    assert registry.next_expiry() is None


def test_a_service_that_is_registered_again_in_time_does_not_go() -> None:
    registry = Registry()
    registry.register(ask(ttl=10), now=0.0)
    registry.expire(10.0)
    registry.register(ask(ttl=86_400), now=20.0)
    registry.expire(20.0 + LINGER)
    assert addresses(registry) == ["[::1]:8080"]


def test_the_default_service_is_known_from_the_start_and_for_ever() -> None:
    registry = Registry("Fallback.Example.")
    assert registry.table.default_service == "fallback.example"
    assert registry.table.services["fallback.example"].leases == ()
    registry.register(ask(service="fallback.example", ttl=1), now=0.0)
    registry.expire(1.0)
    registry.expire(1e9)
    assert registry.table.services["fallback.example"].leases == ()
    assert registry.next_expiry() is None


def test_a_default_service_that_is_no_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="default_service"):
        Registry("not a name")


def test_leases_of_one_service_that_end_together_are_one_change() -> None:
    registry = Registry()
    registry.register(ask(port=1, ttl=10), now=0.0)
    registry.register(ask(port=2, ttl=10), now=0.0)
    registry.register(ask(port=3, ttl=99), now=0.0)
    assert [lease.backend.port for lease in registry.expire(10.0)] == [1, 2]
    assert registry.table.version == 4
    assert addresses(registry) == ["[::1]:3"]


def test_no_more_leases_are_granted_than_the_registry_holds() -> None:
    registry = Registry(max_leases=2)
    registry.register(ask(port=1), now=0.0)
    registry.register(ask(port=2), now=0.0)
    with pytest.raises(RegistryFull):
        registry.register(ask(port=3), now=0.0)
    registry.register(ask(port=2), now=1.0)  # a renewal always fits
    registry.register(ask(port=2, instance_id="takes over"), now=1.0)
    assert (registry.lease_count, registry.table.version) == (2, 4)


def test_no_more_leases_are_granted_than_a_service_may_have() -> None:
    registry = Registry(max_leases_per_service=1)
    registry.register(ask(port=1), now=0.0)
    with pytest.raises(RegistryFull, match=r"app\.example"):
        registry.register(ask(port=2), now=0.0)
    registry.register(ask(port=2, service="other.example"), now=0.0)


def test_lingering_services_make_way_for_new_ones_the_oldest_first() -> None:
    registry = Registry(max_services=2)
    registry.register(ask(service="a.example", ttl=1), now=0.0)
    registry.register(ask(service="b.example", ttl=2), now=0.0)
    with pytest.raises(RegistryFull):
        registry.register(ask(service="c.example"), now=0.0)
    registry.expire(1.0)
    registry.expire(2.0)
    registry.register(ask(service="c.example"), now=3.0)
    assert set(registry.table.services) == {"b.example", "c.example"}
    registry.register(ask(service="b.example"), now=3.0)
    assert registry.service_count == 2


def test_backends_say_their_address_for_people() -> None:
    assert Backend("::1", 80).address == "[::1]:80"
    assert Backend("fe80::1%eth0", 80).address == "[fe80::1%eth0]:80"
    assert Backend("192.0.2.7", 80).address == "192.0.2.7:80"


# What another registry had granted


def test_a_restored_lease_ends_when_it_would_have_ended() -> None:
    former = Registry()
    former.register(ask(service="a.example", instance_id="one", ttl=10), 100.0)
    former.register(ask(service="a.example", instance_id="two", port=8001, ttl=90), 100.0)
    registry = Registry()
    assert registry.restore(former.table.services.values(), former.table.version, 105.0) == 2
    assert registry.table.services == former.table.services
    assert registry.table.version > former.table.version
    assert [lease.instance_id for lease in registry.expire(110.0)] == ["one"]
    assert registry.next_expiry() == 190.0


def test_what_ended_meanwhile_is_not_restored_and_its_service_lingers() -> None:
    former = Registry("default.example")
    former.register(ask(service="a.example", instance_id="one", ttl=10), 100.0)
    registry = Registry("default.example")
    assert registry.restore(former.table.services.values(), 1, 110.0) == 0
    assert registry.table.services["a.example"].leases == ()
    registry.expire(110.0 + LINGER)
    assert set(registry.table.services) == {"default.example"}


def test_a_restored_lease_is_renewed_and_released_like_any_other() -> None:
    former = Registry()
    former.register(ask(service="a.example", instance_id="one", ttl=10), 100.0)
    registry = Registry()
    registry.restore(former.table.services.values(), 1, 100.0)
    registry.register(ask(service="a.example", instance_id="one", ttl=60), 105.0)
    assert (registry.lease_count, registry.next_expiry()) == (1, 165.0)
    registry.release("a.example", "one", now=106.0)
    assert registry.lease_count == 0


def test_of_two_restored_leases_at_one_address_the_first_stays() -> None:
    former = Registry()
    lease = former.register(ask(service="a.example", instance_id="one"), 100.0)
    registry = Registry()
    registry.restore([Service("a.example", (lease, replace(lease, instance_id="two")))], 1, 100.0)
    assert [each.instance_id for each in registry.table.services["a.example"].leases] == ["one"]


def test_a_table_names_what_differs_from_the_one_before() -> None:
    registry = Registry()
    first = registry.table
    registry.register(ask(service="a.example", instance_id="one"), 0.0)
    registry.register(ask(service="b.example", instance_id="one"), 0.0)
    second = registry.table
    assert (second.since, second.changed) == (first.version, frozenset({"a.example", "b.example"}))
    registry.release("a.example", "one", now=0.0)
    assert (registry.table.since, registry.table.changed) == (second.version, frozenset({"a.example"}))


def test_the_generation_tells_leases_that_begin_move_or_end_from_renewals() -> None:
    registry = Registry()
    seen = [registry.generation]

    def grew() -> bool:
        seen.append(registry.generation)
        return seen[-1] > seen[-2]

    registry.register(ask(instance_id="one"), now=0.0)
    assert grew()
    registry.register(ask(instance_id="one"), now=1.0)
    assert not grew()
    registry.register(ask(port=8081, instance_id="one"), now=2.0)  # it moved
    assert grew()
    registry.register(ask(port=8081, instance_id="two"), now=3.0)  # it took its place
    assert grew()
    registry.release("app.example", "two", now=4.0)
    assert grew()
    registry.register(ask(ttl=1), now=5.0)
    assert grew()
    registry.expire(6.0)
    assert grew()


# Several sources


def for_ever(port: int, instance_id: str = "", service: str = "app.example") -> LeaseRequest:
    return LeaseRequest(service, Backend("::1", port), None, instance_id)


def test_a_lease_for_ever_never_ends_by_itself() -> None:
    registry = Registry()
    lease = registry.register(for_ever(1), 0.0, "static")
    assert (lease.expires_at, lease.ttl_seconds) == (NEVER, None)
    assert registry.next_expiry() is None
    assert registry.expire(1e18) == []
    registry.register(ask(port=2, ttl=30), now=0.0)
    assert registry.next_expiry() == 30.0
    assert registry.lease_count == 2


def test_one_address_of_two_sources_is_one_backend_that_lasts_as_long_as_the_longer() -> None:
    registry = Registry()
    first = registry.register(ask(port=1, instance_id="one", ttl=10), now=0.0)
    second = registry.register(ask(port=1, ttl=20), 0.0, "docker")
    [entry] = registry.table.services["app.example"].leases
    assert (entry.instance_id, entry.source, entry.serves_until) == ("one", "api", 20.0)
    assert entry.grants == (first, second)
    assert registry.expire(10.0) == [first]
    assert registry.table.services["app.example"].leases == (second,)
    assert registry.expire(20.0) == [second]
    assert addresses(registry) == []


def test_what_one_source_releases_stays_by_the_other() -> None:
    registry = Registry()
    registry.register(ask(port=1), now=0.0)
    registry.register(for_ever(1), 0.0, "static")
    registry.register(ask(port=1), 0.0, "docker")
    registry.release("app.example", host="::1", port=1, now=1.0, source="static")
    with pytest.raises(NoSuchLease):
        registry.release("app.example", host="::1", port=1, now=1.0, source="static")
    assert addresses(registry) == ["[::1]:1"]
    registry.release("app.example", host="::1", port=1, now=1.0)
    assert addresses(registry) == ["[::1]:1"]
    registry.release("app.example", host="::1", port=1, now=1.0, source="docker")
    assert addresses(registry) == []


def test_the_oldest_leases_terms_hold_whoever_renews() -> None:
    registry = Registry()
    registry.register(replace(ask(port=1), weight=3), 0.0, "static")
    registry.register(replace(ask(port=1), weight=5), now=0.0)
    registry.register(replace(ask(port=1), weight=7), now=1.0)
    assert [lease.weight for lease in registry.table.services["app.example"].leases] == [3]
    registry.release("app.example", host="::1", port=1, now=1.0, source="static")
    assert [lease.weight for lease in registry.table.services["app.example"].leases] == [7]


def test_one_sources_instance_is_not_anothers_whatever_they_are_called() -> None:
    registry = Registry()
    registry.register(ask(port=1, instance_id="one"), now=0.0)
    registry.register(ask(port=2, instance_id="one"), 0.0, "docker")
    registry.register(ask(port=3, instance_id="one"), 0.0, "docker")  # that one moved
    assert addresses(registry) == ["[::1]:1", "[::1]:3"]
    ids = [lease.instance_id for lease in registry.table.services["app.example"].leases]
    assert ids == ["one", "one (docker)"]
    assert registry.find("app.example", "one", source="docker") is not None
    registry.release("app.example", "one", now=1.0)
    assert addresses(registry) == ["[::1]:3"]


def test_who_moves_to_anothers_address_joins_it_and_leaves_its_own() -> None:
    registry = Registry()
    registry.register(for_ever(1), 0.0, "static")
    registry.register(ask(port=2, instance_id="one"), now=0.0)
    registry.register(ask(port=1, instance_id="one"), now=1.0)
    assert addresses(registry) == ["[::1]:1"]
    registry.register(ask(port=2, instance_id="one"), now=2.0)
    assert addresses(registry) == ["[::1]:1", "[::1]:2"]
    assert registry.lease_count == 2


def test_the_generation_grows_for_each_source() -> None:
    registry = Registry()
    registry.register(ask(port=1), now=0.0)
    before = registry.generation
    registry.register(ask(port=1), 0.0, "docker")
    assert registry.generation == before + 1
    registry.register(ask(port=1), 1.0, "docker")
    assert registry.generation == before + 1


def test_what_a_source_does_not_ask_for_any_more_ends_and_no_others_lease() -> None:
    registry = Registry()
    registry.register(ask(port=1), now=0.0)
    for port, instance_id in ((1, ""), (2, ""), (3, "three")):
        registry.register(ask(port=port, instance_id=instance_id), 0.0, "docker")
    asked = [ask(port=2), ask(port=4, instance_id="three"), ask(port=5)]
    ended = registry.retain("docker", asked, 1.0)
    assert [lease.instance_id for lease in ended] == ["[::1]:1 (docker)"]
    assert addresses(registry) == ["[::1]:1", "[::1]:2", "[::1]:3"]


def test_a_renewal_and_a_move_keep_the_state_and_who_joins_takes_it_on() -> None:
    registry = Registry()
    lease = Lease("app.example", "one", Backend("::1", 1), 30.0, 30, state=LeaseState.DRAINING)
    registry.restore([Service("app.example", (lease,))], 1, 0.0)
    assert registry.register(ask(port=1, instance_id="one"), now=1.0).state is LeaseState.DRAINING
    assert registry.register(ask(port=1), 1.0, "docker").state is LeaseState.DRAINING
    assert registry.register(ask(port=2, instance_id="one"), now=2.0).state is LeaseState.DRAINING
    # Another instance at its address is another backend.
    assert registry.register(ask(port=2, instance_id="two"), now=3.0).state is LeaseState.READY


def probed(instance_id: str = "one", port: int = 1, health_path: str = "/up") -> LeaseRequest:
    return LeaseRequest("app.example", Backend("::1", port), 30, instance_id, health_path=health_path)


def state(registry: Registry, instance_id: str = "one") -> LeaseState:
    lease = registry.find("app.example", instance_id)
    assert lease is not None
    return lease.state


def test_a_lease_with_a_health_path_starts_and_every_step_is_one_of_the_table() -> None:
    registry = Registry()
    registry.register(probed(), now=1.0)
    for number, (step, lands) in enumerate(
        [
            (LeaseState.DOWN, LeaseState.STARTING),  # it never was ready
            (LeaseState.READY, LeaseState.READY),
            (LeaseState.READY, LeaseState.READY),
            (LeaseState.DOWN, LeaseState.DOWN),
            (LeaseState.DRAINING, LeaseState.DRAINING),
            (LeaseState.DOWN, LeaseState.DRAINING),
            (LeaseState.READY, LeaseState.READY),
        ]
    ):
        version, before = registry.table.version, state(registry)
        changed = registry.set_state("app.example", "::1", 1, step, 10.0 + number)
        assert state(registry) is lands
        assert [(former.state, lease.state) for former, lease in changed] == (
            [] if before is lands else [(before, lands)]
        )
        assert registry.table.version == version + len(changed)
    lease = registry.find("app.example", "one")
    assert lease is not None
    assert lease.since == 16.0
    assert registry.set_state("app.example", "::1", 9, LeaseState.READY, 0.0) == []
    assert registry.set_state("other.example", "::1", 1, LeaseState.READY, 0.0) == []


def test_who_moves_or_comes_back_begins_anew_and_who_renews_does_not() -> None:
    registry = Registry()
    registry.register(probed(), now=1.0)
    registry.set_state("app.example", "::1", 1, LeaseState.READY, 2.0)
    assert registry.register(probed(), now=3.0).state is LeaseState.READY
    assert registry.register(probed(), now=3.0).since == 2.0
    assert registry.register(probed(port=2), now=4.0).state is LeaseState.STARTING
    assert registry.register(probed(port=2, health_path=""), now=5.0).state is LeaseState.READY
    registry.release("app.example", "one", now=6.0)
    assert registry.register(probed(port=2), now=7.0).state is LeaseState.STARTING


def test_a_state_is_that_of_all_who_were_granted_the_address() -> None:
    registry = Registry()
    registry.register(probed(), now=1.0)
    registry.register(ask(port=1), 1.0, "docker")
    assert registry.register(ask(port=1), 2.0, "docker").state is LeaseState.STARTING
    assert len(registry.set_state("app.example", "::1", 1, LeaseState.DRAINING, 3.0)) == 2
    [entry] = registry.table.services["app.example"].leases
    assert [grant.state for grant in entry.grants] == [LeaseState.DRAINING] * 2


def test_a_halted_service_stays_known_and_a_restart_keeps_it_halted() -> None:
    registry = Registry()
    with pytest.raises(UnknownService):
        registry.halt("app.example", Halt(None))
    registry.register(ask(), now=0.0)
    version = registry.table.version
    assert registry.halt("app.example", Halt(30.0))
    assert not registry.halt("app.example", Halt(30.0))
    assert registry.table.version == version + 1
    registry.release("app.example", host="::1", port=8080, now=1.0)
    registry.expire(1.0 + 3 * LINGER)
    assert registry.table.services["app.example"] == Service("app.example", (), Halt(30.0))
    heir = Registry()
    heir.restore(registry.table.services.values(), 3, 0.0)
    assert heir.table.services["app.example"].halt == Halt(30.0)
    assert heir.halt("app.example", None)
    assert heir.table.services["app.example"].halt is None
    heir.expire(3 * LINGER)
    assert "app.example" not in heir.table.services


def test_a_halted_service_without_leases_makes_way_as_others_do() -> None:
    registry = Registry(max_services=1)
    registry.register(ask(), now=0.0)
    registry.halt("app.example", Halt(None, "back soon"))
    registry.release("app.example", host="::1", port=8080, now=1.0)
    registry.register(ask(service="other.example"), now=2.0)
    assert list(registry.table.services) == ["other.example"]
    registry.release("other.example", host="::1", port=8080, now=3.0)
    registry.register(ask(), now=4.0)
    assert registry.table.services["app.example"].halt is None


def test_restored_leases_keep_their_sources() -> None:
    former = Registry()
    former.register(ask(port=1, ttl=10), now=0.0)
    former.register(for_ever(1), 0.0, "static")
    former.register(for_ever(2), 0.0, "gone")
    registry = Registry()
    assert registry.restore(former.table.services.values(), 3, 0.0, {"api", "static"}) == 2
    assert addresses(registry) == ["[::1]:1"]
    [entry] = registry.table.services["app.example"].leases
    assert [(lease.source, lease.expires_at) for lease in entry.grants] == [("api", 10.0), ("static", NEVER)]


class Model:
    """What a registry should hold: for each source, its instances, where they are and until when."""

    def __init__(self) -> None:
        self.granted: dict[tuple[str, str, str], tuple[int, float]] = {}  # source, service, id -> port, end

    def grant(self, source: str, service: str, instance_id: str, port: int, end: float) -> None:
        at_address = [
            key for key, (held, _) in self.granted.items() if key[:2] == (source, service) and held == port
        ]
        instance_id = instance_id or (at_address[0][2] if at_address else f"[::1]:{port}")
        for key in at_address:
            del self.granted[key]
        self.granted[source, service, instance_id] = port, end

    def retain(self, source: str, requests: list[LeaseRequest]) -> None:
        kept = {(source, asked.service, asked.instance_id) for asked in requests}
        places = {(asked.service, asked.backend.port) for asked in requests if not asked.instance_id}
        self.granted = {
            key: (port, end)
            for key, (port, end) in self.granted.items()
            if key[0] != source or key in kept or (key[1], port) in places
        }

    def expire(self, now: float) -> None:
        self.granted = {key: (port, end) for key, (port, end) in self.granted.items() if now < end}

    @property
    def ends(self) -> dict[tuple[str, int], float]:
        """Service and port -> when the last source's lease there ends."""
        ends: dict[tuple[str, int], float] = {}
        for (_, service, _), (port, end) in self.granted.items():
            ends[service, port] = max(end, ends.get((service, port), 0.0))
        return ends


def check(registry: Registry, model: Model) -> None:
    entries = [lease for service in registry.table.services.values() for lease in service.leases]
    found = {(lease.service, lease.backend.port): lease.ends_at for lease in entries}
    assert len(found) == len(entries), "an address is there twice"
    assert found == model.ends, "something is lost, or lives too long"
    names = {(lease.service, lease.instance_id) for lease in entries}
    assert len(names) == len(entries), "two backends of a service have one name"
    grants = [lease for entry in entries for lease in entry.grants]
    assert len(grants) == registry.lease_count == len(model.granted)
    for lease in grants:
        assert (lease.backend.port, lease.expires_at) == model.granted[
            lease.source, lease.service, lease.instance_id.removesuffix(f" ({lease.source})")
        ]


SOURCES = st.sampled_from(["api", "static", "docker"])
SERVICES = st.sampled_from(["a.example", "b.example"])
IDS = st.sampled_from(["", "one", "two", "[::1]:1"])
PORTS = st.integers(1, 3)
TTLS = st.sampled_from([1, 3, 10, None])
REQUESTS = st.builds(LeaseRequest, SERVICES, st.builds(Backend, st.just("::1"), PORTS), TTLS, IDS)
STEPS = st.one_of(
    st.tuples(st.just("grant"), SOURCES, REQUESTS),
    st.tuples(st.just("release"), SOURCES, REQUESTS),
    st.tuples(st.just("replace"), SOURCES, st.lists(REQUESTS, max_size=3)),
    st.tuples(st.just("wait"), st.integers(1, 4), st.none()),
    st.tuples(st.just("restart"), st.none(), st.none()),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(STEPS, max_size=25))
def test_whatever_several_sources_do_no_address_is_there_twice_and_nothing_is_lost_or_lives_too_long(
    steps: list[tuple[str, object, object]],
) -> None:
    registry, model, now = Registry(), Model(), 0.0

    def grant(source: str, asked: LeaseRequest) -> None:
        lease = registry.register(asked, now, source)
        model.grant(source, asked.service, asked.instance_id, asked.backend.port, lease.expires_at)

    for step, first, second in steps:
        if step == "wait":
            assert isinstance(first, int)
            now += first
            registry.expire(now)
            model.expire(now)
        elif step == "restart":
            table = registry.table
            registry = Registry()
            registry.restore(table.services.values(), table.version, now)
        elif step == "replace":
            assert isinstance(first, str)
            assert isinstance(second, list)
            before = others(registry.table.services, first)
            registry.retain(first, second, now)
            model.retain(first, second)
            for asked in second:
                grant(first, asked)
            assert others(registry.table.services, first) == before
            if not second:
                assert registry.of_source(first) == []
        else:
            assert isinstance(first, str)
            assert isinstance(second, LeaseRequest)
            if step == "grant":
                grant(first, second)
            else:
                release(registry, model, first, second, now)
        check(registry, model)


def others(services: Mapping[str, Service], source: str) -> set[Lease]:
    """The leases of all other sources."""
    return {
        lease
        for service in services.values()
        for entry in service.leases
        for lease in entry.grants
        if lease.source != source
    }


def release(registry: Registry, model: Model, source: str, asked: LeaseRequest, now: float) -> None:
    place = "::1", asked.backend.port
    lease = registry.find(asked.service, asked.instance_id, *place, source=source)
    if lease is None:
        with pytest.raises(NoSuchLease):
            registry.release(asked.service, asked.instance_id, *place, now=now, source=source)
        return
    assert registry.release(asked.service, asked.instance_id, *place, now=now, source=source) == lease
    del model.granted[source, asked.service, lease.instance_id.removesuffix(f" ({source})")]


def test_what_somebody_knew_is_adopted_unless_it_is_known_or_ended_or_does_not_fit() -> None:
    former, registry = Registry(), Registry(max_leases=4)
    for port in range(1, 7):
        former.register(ask(port=port), now=0.0)
    former.register(ask(port=7, ttl=5), now=0.0)
    former.register(ask(port=8), now=0.0, source="docker")
    registry.register(ask(port=1, instance_id="[::1]:2"), now=1.0)
    registry.release("app.example", "[::1]:2", now=1.0)  # the service lingers
    registry.register(ask(port=9, instance_id="[::1]:1"), now=1.0)
    registry.register(ask(port=2, instance_id="other"), now=1.0)
    known, generation, version = former.of_source(API), registry.generation, registry.table.version
    known = [*former.of_source("docker"), *reversed(known)]
    ended = {("app.example", "[::1]:3"), ("app.example", "[::1]:6")}
    assert registry.adopt(known, 10.0, {API}, ended) == 2
    assert addresses(registry) == ["[::1]:9", "[::1]:2", "[::1]:5", "[::1]:4"]
    assert registry.generation == generation + 2
    assert registry.table.version > version
    assert registry.adopt(known, 10.0, {API}, set()) == 0  # it is full


def test_an_adopted_lease_ends_the_lingering_of_its_service() -> None:
    former, registry = Registry(), Registry()
    former.register(ask(port=1, ttl=1000), now=0.0)
    registry.register(ask(port=2), now=0.0)
    registry.release("app.example", host="::1", port=2, now=0.0)
    assert registry.adopt(former.of_source(API), 1.0, {API}, ()) == 1
    registry.expire(LINGER + 1.0)
    assert addresses(registry) == ["[::1]:1"]


def test_what_is_at_an_address_is_what_the_table_has_there() -> None:
    registry = Registry()
    assert registry.at("app.example", "::1", 1) is None
    registry.register(ask(port=1), now=0.0)
    registry.register(ask(port=2), now=0.0)
    registry.register(ask(port=1), now=1.0, source="docker")
    entries = registry.table.services["app.example"].leases
    assert tuple(registry.at("app.example", "::1", port) for port in (1, 2)) == entries
    registry.release("app.example", host="::1", port=1, now=2.0)
    [other] = [lease for lease in registry.table.services["app.example"].leases if lease.backend.port == 1]
    assert registry.at("app.example", "::1", 1) == other
    assert other.source == "docker"


# Policies and routes

TERMS = ServicePolicy(health_path="/up", max_in_flight=7)


def test_a_service_with_a_policy_is_known_without_leases_and_for_ever() -> None:
    registry = Registry()
    registry.configure({"app.example": DEFAULTS, "other.example": TERMS}, NO_ROUTES, 0.0)
    assert registry.table.services["app.example"] == Service("app.example", ())
    assert registry.table.services["other.example"] == Service("other.example", (), None, TERMS)
    lease = registry.register(LeaseRequest("other.example", Backend("10.0.0.1", 80), 10), 0.0)
    registry.release("other.example", lease.instance_id, now=1.0)
    registry.expire(1e9)
    assert set(registry.table.services) == {"app.example", "other.example"}


def test_a_service_whose_policy_is_taken_away_lingers_or_goes_on_without() -> None:
    registry = Registry("default.example")
    registry.configure(
        dict.fromkeys(("app.example", "busy.example", "default.example"), TERMS), NO_ROUTES, 0.0
    )
    registry.register(LeaseRequest("busy.example", Backend("10.0.0.1", 80), None), 0.0)
    registry.configure({}, NO_ROUTES, 0.0)
    assert [each.policy for each in registry.table.services.values()] == [None] * 3
    registry.expire(LINGER)
    assert set(registry.table.services) == {"busy.example", "default.example"}


def test_a_policys_terms_hold_for_leases_that_name_none() -> None:
    registry = Registry()
    registry.configure({"app.example": TERMS}, NO_ROUTES, 0.0)
    registry.register(LeaseRequest("app.example", Backend("10.0.0.1", 80), 10), 0.0)
    registry.register(LeaseRequest("app.example", Backend("10.0.0.2", 80), 10, "", 1, "/own", 1), 0.0)
    one, two = registry.table.services["app.example"].leases
    assert (one.health_path, one.max_in_flight, one.state) == ("/up", 7, LeaseState.STARTING)
    assert (two.health_path, two.max_in_flight) == ("/own", 1)
    assert registry.at("app.example", "10.0.0.1", 80) == one
    assert [(each.health_path, each.max_in_flight) for each in one.grants] == [("", 0)]
    assert two.grants == (two,)
    registry.configure({}, NO_ROUTES, 1.0)
    assert [each.max_in_flight for each in registry.table.services["app.example"].leases] == [0, 1]


def test_the_same_policies_and_routes_again_change_nothing() -> None:
    registry = Registry()
    routes = Routes([Route("www.example", service="app.example")])
    registry.configure({"app.example": TERMS}, routes, 0.0)
    table = registry.table
    assert table.routes == routes
    registry.configure({"app.example": TERMS}, Routes(routes.routes), 1.0)
    assert registry.table is table
    registry.configure({"app.example": TERMS}, NO_ROUTES, 2.0)
    assert registry.table.version > table.version


def test_a_table_under_one_policys_terms_is_taken_over_under_those_of_another() -> None:
    former = Registry()
    former.configure({"app.example": TERMS}, NO_ROUTES, 0.0)
    former.register(LeaseRequest("app.example", Backend("10.0.0.1", 80), 10), 0.0)
    former.register(LeaseRequest("app.example", Backend("10.0.0.1", 80), 10), 0.0, source="docker")
    assert former.set_state("app.example", "10.0.0.1", 80, LeaseState.READY, 1.0)
    registry = Registry()
    registry.restore(former.table.services.values(), former.table.version, 2.0)
    [lease] = registry.table.services["app.example"].leases
    assert (lease.health_path, lease.max_in_flight, lease.state) == ("", 0, LeaseState.READY)
    other = ServicePolicy(health_path="/other")
    registry.configure({"app.example": other}, NO_ROUTES, 3.0)
    [lease] = registry.table.services["app.example"].leases
    assert (lease.health_path, lease.max_in_flight, lease.state) == ("/other", 0, LeaseState.READY)
    assert [(each.health_path, each.max_in_flight, each.granted) for each in lease.grants] == [
        ("", 0, None)
    ] * 2


def test_terms_that_hold_already_hold_no_more_and_others_take_their_place() -> None:
    lease = Lease("app.example", "one", Backend("10.0.0.1", 80), 10.0, 10)
    under = lease.under(TERMS)
    assert under.under(TERMS) is under
    other = under.under(ServicePolicy(health_path="/other"))
    assert (other.health_path, other.max_in_flight, other.granted) == ("/other", 0, ("", 0))
    assert other.grants == (lease,)
    assert under.under(DEFAULTS) == lease


def test_another_default_service_is_known_at_once_and_the_former_lingers() -> None:
    registry = Registry("old.example")
    registry.configure({}, NO_ROUTES, 0.0, "new.example")
    table = registry.table
    assert table.default_service == "new.example"
    assert set(table.services) == {"old.example", "new.example"}
    registry.expire(LINGER)
    assert set(registry.table.services) == {"new.example"}
    registry.configure({}, NO_ROUTES, LINGER, "")
    assert registry.table.default_service == ""
    registry.configure({}, NO_ROUTES, LINGER)
    registry.expire(3 * LINGER)
    assert registry.table.services == {}


def test_a_default_service_that_others_have_too_stays() -> None:
    registry = Registry("app.example")
    registry.configure({"app.example": TERMS}, NO_ROUTES, 0.0, "")
    registry.expire(10 * LINGER)
    assert set(registry.table.services) == {"app.example"}


def test_who_waits_for_a_probe_that_nobody_asks_for_any_more_is_ready() -> None:
    registry = Registry()
    registry.configure({"app.example": TERMS}, NO_ROUTES, 0.0)
    registry.register(LeaseRequest("app.example", Backend("10.0.0.1", 80), None), 0.0)
    registry.register(LeaseRequest("app.example", Backend("10.0.0.2", 80), None, "", 1, "/own"), 0.0)
    registry.register(LeaseRequest("app.example", Backend("10.0.0.3", 80), None), 0.0)
    registry.set_state("app.example", "10.0.0.3", 80, LeaseState.DRAINING, 0.0)
    generation = registry.generation
    registry.configure({"app.example": ServicePolicy(health_path="/other")}, NO_ROUTES, 1.0)
    assert registry.generation == generation
    registry.configure({"app.example": ServicePolicy(max_in_flight=1)}, NO_ROUTES, 2.0)
    assert [(each.state, each.since) for each in registry.table.services["app.example"].leases] == [
        (LeaseState.READY, 2.0),
        (LeaseState.STARTING, 0.0),
        (LeaseState.DRAINING, 0.0),
    ]
    assert registry.generation > generation


def test_what_is_granted_for_ever_and_as_it_is_need_not_be_granted_again() -> None:
    registry = Registry()
    asked = LeaseRequest("app.example", Backend("10.0.0.1", 80), None, weight=2)
    assert not registry.has(asked, "static")
    registry.register(asked, 0.0, "static")
    assert registry.has(asked, "static")
    assert not registry.has(asked, "api")
    for other in (
        replace(asked, weight=3),
        replace(asked, health_path="/up"),
        replace(asked, max_in_flight=1),
        replace(asked, ttl_seconds=30),
        replace(asked, backend=Backend("10.0.0.1", 80, use_tls=True)),
        replace(asked, backend=Backend("10.0.0.1", 81)),
    ):
        assert not registry.has(other, "static")
    registry.register(replace(asked, ttl_seconds=30), 0.0, "api")
    assert not registry.has(replace(asked, ttl_seconds=30), "api")  # a renewal is another end


def test_many_changes_of_a_service_are_seen_in_the_next_table() -> None:
    registry = Registry(max_services=2)
    for port in range(1, 6):
        registry.register(LeaseRequest("app.example", Backend("10.0.0.1", port), 10), 0.0)
    assert registry.service_count == 1
    registry.release("app.example", host="10.0.0.1", port=3, now=0.0)
    assert [lease.backend.port for lease in registry.table.services["app.example"].leases] == [1, 2, 4, 5]
    for port in (1, 2, 4, 5):
        registry.release("app.example", host="10.0.0.1", port=port, now=0.0)
    for name in ("b.example", "c.example"):
        registry.register(LeaseRequest(name, Backend("10.0.0.1", 1), 10), 0.0)  # the lingering one makes way
    assert set(registry.table.services) == {"b.example", "c.example"}
