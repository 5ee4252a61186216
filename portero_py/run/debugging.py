"""State machines under watch: a step that its file does not allow raises where it happens.

A file whose head lists states declares `TRANSITIONS` beside them: state -> the states that may follow. Here
`WATCHED` names the attribute of each class that holds such a state, and `watch` puts a data descriptor in its
place, which looks at every assignment. Tests run so, all of them, and so does a proxy with `--log debug`.

The rules
- The first state of an object may be any of the table. To stay is a step as any other.
- Otherwise nothing is replaced, hence nothing is paid for: the slot is the slot.
- What is compiled is left alone: its code reaches the attribute without asking the class.
- Whoever raises into an event loop may not be heard: `told` hears of every illegal step too.
- Not here: a machine that checks itself in production (`core/acme/progress`), because its object is replaced
  at each step and there is nothing to watch.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, NamedTuple

from portero_py.core import health
from portero_py.proxy import exchange
from portero_py.proxy.downstream import http1 as downstream_http1
from portero_py.proxy.downstream import tls
from portero_py.proxy.upstream import http1 as upstream_http1
from portero_py.run import main_process
from portero_py.wire import websocket
from portero_py.wire.http2 import connection, stream


class IllegalTransition(AssertionError):
    """A state was followed by one that must not follow it: a fault of portero's own."""


class Machine(NamedTuple):
    """A class, the attribute that holds its state, and the table of its file."""

    owner: type
    attribute: str
    transitions: Mapping[Any, Collection[Any]]


#: Every class whose file declares TRANSITIONS.
WATCHED: Final = (
    Machine(tls.TlsTransport, "_state", tls.TRANSITIONS),
    Machine(downstream_http1.Http1Downstream, "_state", downstream_http1.TRANSITIONS),
    Machine(health.Mark, "condition", health.TRANSITIONS),
    Machine(exchange.Exchange, "_phase", exchange.TRANSITIONS),
    Machine(upstream_http1.UpstreamHttp1, "_state", upstream_http1.TRANSITIONS),
    Machine(connection.Connection, "phase", connection.TRANSITIONS),
    Machine(stream.Stream, "sending", stream.TRANSITIONS),
    Machine(websocket.Goodbye, "_state", websocket.TRANSITIONS),
    Machine(main_process.MainProcess, "_stage", main_process.TRANSITIONS),
)


def watch(
    told: Callable[[IllegalTransition], object] | None = None, machines: Collection[Machine] = WATCHED
) -> None:
    """Check every step from now on, also those of objects that exist. Twice is once."""
    for machine in machines:
        file = sys.modules[machine.owner.__module__].__file__ or ""
        former = inspect.getattr_static(machine.owner, machine.attribute, _NOTHING)
        if file.endswith(".py") and not isinstance(former, _Checked):
            setattr(machine.owner, machine.attribute, _Checked(machine, former, told))


# Private

_NOTHING: Final = object()


class _Checked:
    """Stands for a slot, or for an entry of the object's dictionary whose default the class may have."""

    def __init__(
        self, machine: Machine, former: Any, told: Callable[[IllegalTransition], object] | None
    ) -> None:
        self._machine = machine
        self._former = former
        self._is_slot = inspect.ismemberdescriptor(former)
        self._told = told

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if self._is_slot:
            return self._former.__get__(instance, owner)
        entries = {} if instance is None else vars(instance)
        found = entries.get(self._machine.attribute, self._former)
        if found is _NOTHING:
            raise AttributeError(self._machine.attribute)
        return found

    def __set__(self, instance: Any, state: Any) -> None:
        try:
            before = self.__get__(instance)
        except AttributeError:
            before = _NOTHING
        transitions = self._machine.transitions
        if state not in (transitions if before is _NOTHING else transitions[before]):
            illegal = IllegalTransition(
                f"{type(instance).__name__}.{self._machine.attribute}: {before} is followed by {state}"
            )
            if self._told is not None:
                self._told(illegal)
            raise illegal
        if self._is_slot:
            self._former.__set__(instance, state)
        else:
            vars(instance)[self._machine.attribute] = state
