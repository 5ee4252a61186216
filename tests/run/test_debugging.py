"""State machines under watch: what is declared is what happens."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

import portero_py
from portero_py.core import model
from portero_py.core.acme import progress
from portero_py.run.debugging import WATCHED, IllegalTransition, Machine, watch

ROOT = Path(portero_py.__file__).parent

#: Files whose machine raises by itself, watched or not.
CHECK_THEMSELVES = {progress.__name__, model.__name__}


class Light(Enum):
    RED = 0
    GREEN = 1
    BROKEN = 2


LIGHTS: Mapping[Light, Collection[Light]] = {
    Light.RED: {Light.GREEN, Light.BROKEN},
    Light.GREEN: {Light.GREEN, Light.RED},
    Light.BROKEN: (),
}


class Slotted:
    __slots__ = ("light",)
    light: Light


class WithDefault:
    light = Light.RED


class Plain:
    light: Light


@pytest.fixture(params=[Slotted, WithDefault, Plain])
def lamp(request: pytest.FixtureRequest) -> Any:
    kind: Any = type(request.param.__name__, (request.param,), {"__slots__": ()})
    return kind()


def watched(lamp: Any) -> list[IllegalTransition]:
    told: list[IllegalTransition] = []
    for _ in range(2):
        watch(told.append, [Machine(type(lamp), "light", LIGHTS)])
    return told


def declaring_files() -> set[str]:
    """The modules that declare how their states follow each other."""
    found: set[str] = set()
    for path in ROOT.rglob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            target = statement.target if isinstance(statement, ast.AnnAssign) else None
            if isinstance(target, ast.Name) and target.id.endswith("TRANSITIONS"):
                found.add(".".join(("portero_py", *path.relative_to(ROOT).with_suffix("").parts)))
    return found


def test_steps_of_the_table_are_taken_and_others_raise(lamp: Any) -> None:
    told = watched(lamp)
    lamp.light = Light.GREEN
    lamp.light = Light.GREEN
    with pytest.raises(IllegalTransition, match=r"\.light: Light.GREEN is followed by Light.BROKEN"):
        lamp.light = Light.BROKEN
    assert len(told) == 1
    assert lamp.light is Light.GREEN
    lamp.light = Light.RED
    lamp.light = Light.BROKEN
    assert lamp.light is Light.BROKEN


def test_objects_that_exist_are_watched_too(lamp: Any) -> None:
    lamp.light = Light.BROKEN
    watched(lamp)
    with pytest.raises(IllegalTransition):
        lamp.light = Light.RED
    assert lamp.light is Light.BROKEN


def test_what_is_no_state_at_all_is_never_one(lamp: Any) -> None:
    watched(lamp)
    with pytest.raises(IllegalTransition):
        lamp.light = "pink"


def test_an_attribute_that_is_not_set_is_missing_as_before() -> None:
    for kind in (Slotted, Plain):
        lamp: Any = type(kind.__name__, (kind,), {"__slots__": ()})()
        watched(lamp)
        with pytest.raises(AttributeError):
            _ = lamp.light
        lamp.light = Light.GREEN
        assert lamp.light is Light.GREEN


def test_each_file_that_declares_transitions_has_its_class_watched() -> None:
    assert {machine.owner.__module__ for machine in WATCHED} | CHECK_THEMSELVES == declaring_files()
    for machine in WATCHED:
        declared = vars(sys.modules[machine.owner.__module__])
        assert any(machine.transitions is each for each in declared.values()), machine


@pytest.mark.parametrize("machine", WATCHED, ids=lambda machine: machine.owner.__name__)
def test_the_table_of_each_watched_class_is_whole_and_every_other_step_raises(
    machine: Machine, illegal_steps: list[IllegalTransition]
) -> None:
    states = set(machine.transitions)
    for before, followers in machine.transitions.items():
        assert set(followers) <= states
        if isinstance(before, Enum):
            assert states == set(type(before))
        for after in states:
            instance = _in_state(machine, before)
            if after in followers:
                setattr(instance, machine.attribute, after)
                assert getattr(instance, machine.attribute) == after
            else:
                with pytest.raises(IllegalTransition):
                    setattr(instance, machine.attribute, after)
                assert getattr(instance, machine.attribute) == before
                assert illegal_steps.pop()


def test_without_a_debug_run_nothing_is_replaced() -> None:
    looks = (
        "import inspect, sys\n"
        "from portero_py.run import debugging, supervisor\n"
        "def looks():\n"
        "    found = [inspect.getattr_static(m.owner, m.attribute, 0) for m in debugging.WATCHED]\n"
        "    return {type(each).__name__ for each in found}\n"
        "assert '_Checked' not in looks()\n"
        "debugging.watch()\n"
        "assert looks() == {'_Checked'}\n"
    )
    subprocess.run([sys.executable, "-c", looks], check=True)


def test_what_is_compiled_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Any = type("Compiled", (Slotted,), {"__slots__": ()})
    monkeypatch.setattr(sys.modules[__name__], "__file__", "/somewhere/test_debugging.cpython-311.so")
    watch(None, [Machine(kind, "light", LIGHTS)])
    assert "light" not in vars(kind)


# Private


def _in_state(machine: Machine, state: Any) -> Any:
    """An object of the class that is in `state`, however one comes there."""
    owner: Any = machine.owner
    instance = owner.__new__(owner)
    if getattr(machine.owner, machine.attribute, None) in machine.transitions:  # it has a default
        vars(instance)[machine.attribute] = state
    else:
        setattr(instance, machine.attribute, state)
    return instance
