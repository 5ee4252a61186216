"""What docs/reliability.md promises, counted under load: scenarios of `make faults`, with portero-py alone.

`make faults` compares figures and asserts nothing; here a lost request fails the test. What may be lost is
what no proxy could save: what was with a process when that was killed.
"""

from __future__ import annotations

import pytest

from benchmarks.faults.asks import Kind
from benchmarks.faults.portero import Portero, PorteroTwoWorkers
from benchmarks.faults.runs import Effort, measure
from benchmarks.faults.scenarios import SCENARIOS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

EFFORT = Effort(rate=100.0, seconds=10.0, times=3)

#: Scenario -> class -> the ways in which some may be lost.
LOST_WITH_A_PROCESS = {"cut", "stream reset (2)"}
ALLOWED: dict[str, dict[str, set[str]]] = {
    "deploy": {},
    "reload": {},
    "refused": {},
    "killed": {
        Kind.POST: {"502"},
        Kind.DOWNLOAD: {"502", *LOST_WITH_A_PROCESS},
        Kind.WEBSOCKET: {"502", *LOST_WITH_A_PROCESS},
    },
}


@pytest.mark.parametrize("kind", [Portero, PorteroTwoWorkers], ids=["one-process", "two-workers"])
@pytest.mark.parametrize("key", ALLOWED)
def test_nothing_is_lost_that_could_be_saved(key: str, kind: type[Portero]) -> None:
    scenario = next(each for each in SCENARIOS if each.key == key)
    row = measure(scenario, "portero", kind, EFFORT, commit="")
    allowed = ALLOWED[key]
    unexpected = {
        name: ways for name, ways in row.tally.lost.items() if not set(ways) <= allowed.get(name, set())
    }
    assert unexpected == {}, row.tally.examples
    assert row.notes == []
    assert row.repeated == 0
    assert row.tally.total_answered > 1_000
