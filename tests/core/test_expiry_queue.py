"""Keys that expire, and are told later that they do not."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from portero_py.core.expiry_queue import ExpiryQueue


def test_keys_come_out_when_they_are_due_the_earliest_first() -> None:
    queue = ExpiryQueue[str]()
    queue.set("late", 30.0)
    queue.set("early", 10.0)
    queue.set("middle", 20.0)
    assert queue.next() == 10.0
    assert queue.first() == "early"
    assert queue.pop_due(9.9) == []
    assert queue.pop_due(20.0) == ["early", "middle"]
    assert queue.pop_due(20.0) == []
    assert len(queue) == 1


def test_an_empty_queue_has_nothing_next() -> None:
    queue = ExpiryQueue[str]()
    queue.discard("never there")
    assert queue.next() is None
    assert queue.first() is None
    assert queue.pop_due(1e9) == []


def test_a_key_moved_to_a_later_time_does_not_come_out_at_the_old_one() -> None:
    queue = ExpiryQueue[str]()
    queue.set("a", 10.0)
    queue.set("a", 50.0)
    assert queue.pop_due(49.0) == []
    assert queue.next() == 50.0
    assert queue.pop_due(50.0) == ["a"]


def test_a_key_moved_to_an_earlier_time_comes_out_once_at_that_time() -> None:
    queue = ExpiryQueue[str]()
    queue.set("a", 50.0)
    queue.set("a", 10.0)
    assert queue.next() == 10.0
    assert queue.pop_due(60.0) == ["a"]


def test_a_discarded_key_never_comes_out_unless_it_is_set_again() -> None:
    queue = ExpiryQueue[str]()
    queue.set("a", 10.0)
    queue.discard("a")
    assert queue.next() is None
    queue.set("a", 10.0)
    assert queue.pop_due(10.0) == ["a"]


def test_entries_that_nobody_needs_do_not_pile_up() -> None:
    queue = ExpiryQueue[str]()
    for second in range(86_400, 0, -10):
        queue.set("shorter and shorter", float(second))
        queue.set("comes and goes", float(second))
        queue.discard("comes and goes")
    assert len(queue._heap) <= 70
    assert queue.next() == 10.0


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["set", "discard", "pop"]),
        st.integers(0, 4),
        st.integers(0, 50),
    )
)


@settings(deadline=None)
@given(STEPS)
def test_it_does_what_a_plain_dictionary_would(steps: list[tuple[str, int, int]]) -> None:
    queue, model = ExpiryQueue[int](), dict[int, float]()
    for verb, key, time in steps:
        if verb == "set":
            queue.set(key, time)
            model[key] = time
        elif verb == "discard":
            queue.discard(key)
            model.pop(key, None)
        else:
            due = sorted(key for key, at in model.items() if at <= time)
            assert sorted(queue.pop_due(time)) == due
            for gone in due:
                del model[gone]
        assert queue.next() == min(model.values(), default=None)
        assert len(queue) == len(model)
