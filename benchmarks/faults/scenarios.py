"""What happens to the proxies while they are loaded. Each scenario is a function that reads as what it does.

It begins when the load runs and all is well, and the load ends when it returns. What it restores it restores
in time, so that whatever recovers is seen to.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random

from benchmarks.faults.peer import Peer
from benchmarks.faults.stage import Backend, Stage
from benchmarks.stage import BenchError

#: Seconds before the first fault and after the last.
CALM = 2.0

#: Seconds that a leaving backend gives a proxy that waits for what is in flight.
LEAVE_SECONDS = 15.0


@dataclass
class Run:
    """A proxy under load, its two backends, and how much time there is."""

    stage: Stage
    peer: Peer
    backends: list[Backend]
    seconds: float
    source: Random
    times: int = 10  # how often what is done repeatedly is done
    notes: list[str] = field(default_factory=list)  # what went wrong, for the row

    def calm(self) -> None:
        time.sleep(CALM)


@dataclass(frozen=True)
class Scenario:
    """`title` is what the table says. `clients`: so many instead of the steady load."""

    key: str
    title: str
    act: Callable[[Run], None]
    seconds: float = 20.0
    kept_socket: bool = False
    descriptors: int = 0
    clients: int = 0


# Whoever operates


def deploy(run: Run) -> None:
    """All backends are replaced by new ones, again and again.

    New ones are there before old ones go. A proxy that can say that nothing is in flight any more is
    believed, and the backend ends at once; otherwise it finishes by itself, until nothing came for a second.
    """
    run.calm()
    for _ in range(run.times):
        _deploy_once(run)
    run.calm()


def reload(run: Run) -> None:
    """Another certificate, another configuration, once a second."""
    ends_at, turn = time.monotonic() + run.seconds, 0
    while time.monotonic() < ends_at:
        turn += 1
        run.stage.install_pair(turn)
        run.peer.reload()
        time.sleep(1)


def restart(run: Run) -> None:
    """Three restarts, each by the best way that the proxy has."""
    _three_times(run, run.peer.restart)


def stop_and_start(run: Run) -> None:
    """Three plain ones: stop it, wait, start it."""

    def once() -> None:
        run.peer.stop()
        run.peer.start()

    _three_times(run, once)


def upgrade(run: Run) -> None:
    """In place, again and again."""
    run.calm()
    for _ in range(run.times):
        run.peer.upgrade()
        time.sleep(2)
    run.calm()


# Whoever fails


def killed(run: Run) -> None:
    """SIGKILL to the one, then to the other, each with its exchanges; each comes back after a while."""
    run.calm()
    for number in (0, 1):
        _kill(run, number)
        time.sleep(run.seconds / 4)
        run.backends[number] = run.stage.start_backend(run.backends[number].port)
        time.sleep(run.seconds / 4)
    run.calm()


def frozen(run: Run) -> None:
    """SIGSTOP: connections are there and new ones are made, but nothing is answered."""
    run.calm()
    run.backends[0].send(signal.SIGSTOP)
    time.sleep(run.seconds)
    run.backends[0].send(signal.SIGCONT)
    run.calm()


def told(command: str) -> Callable[[Run], None]:
    """One of the two backends does what it is told, for the whole time but a calm before and after."""

    def act(run: Run) -> None:
        run.calm()
        run.backends[0].tell(command)
        time.sleep(run.seconds)
        run.backends[0].tell("accept")
        run.calm()

    return act


def crowd(run: Run) -> None:
    """Nothing happens: there are more clients than descriptors."""
    time.sleep(run.seconds)


# Everything


def mix(run: Run) -> None:
    """One fault after the other, drawn by lot, always with a backend that is well.

    A proxy that does not do as it is told is started again when it is gone, as a service manager would.
    """
    faults: list[Callable[[Run], None]] = [
        _deploy_once,
        lambda run: _for_a_while(run, "refuse"),
        lambda run: _for_a_while(run, "status 500"),
        lambda run: _for_a_while(run, "status 503"),
        lambda run: _for_a_while(run, "blackhole"),
        lambda run: _for_a_while(run, "reset"),
        _freeze_for_a_while,
        _kill_for_a_while,
        lambda run: reload(Run(run.stage, run.peer, run.backends, 4.0, run.source)),
        lambda run: run.peer.upgrade(),
    ]
    ends_at = time.monotonic() + run.seconds
    while True:
        run.source.shuffle(faults)
        for fault in faults:
            if time.monotonic() > ends_at:
                return
            try:
                fault(run)
            except BenchError as error:
                run.notes.append(str(error).splitlines()[0])
                if not run.peer.is_alive():
                    run.peer.start()
            run.calm()


SCENARIOS = (
    Scenario("deploy", "ten rolling deploys", deploy),
    Scenario("reload", "configuration and certificates change every second", reload),
    Scenario("refused", "one of two backends refuses connections", told("refuse")),
    Scenario("killed", "SIGKILL to a backend, twice", killed),
    Scenario("500", "one of two backends answers 500", told("status 500")),
    Scenario("503", "one of two backends answers 503", told("status 503")),
    Scenario("reset", "one of two backends resets instead of answering", told("reset")),
    Scenario("frozen", "one of two backends is frozen (SIGSTOP)", frozen),
    Scenario("blackhole", "one of two backends is a black hole (no answer to SYN)", told("blackhole")),
    Scenario("restart", "three restarts without a gap", restart, kept_socket=True),
    Scenario("stop-start", "three times stop, then start", stop_and_start),
    Scenario("upgrade", "ten upgrades in place", upgrade),
    Scenario("descriptors", "256 descriptors, 400 clients", crowd, descriptors=256, clients=400),
    Scenario("mix", "all of it, drawn by lot", mix, seconds=180.0),
)


# Private


def _three_times(run: Run, act: Callable[[], None]) -> None:
    run.calm()
    for _ in range(3):
        act()
        time.sleep(run.seconds / 5)
    run.calm()


def _deploy_once(run: Run) -> None:
    old, new = run.backends, [run.stage.start_backend() for _ in run.backends]
    for backend in new:
        run.peer.add(backend.address)
    run.backends = new
    with ThreadPoolExecutor(len(old)) as pool:  # two that leave at the same time, as they do in a deploy
        list(pool.map(lambda backend: _retire(run, backend), old))


def _retire(run: Run, backend: Backend) -> None:
    vouched = run.peer.remove(backend.address, LEAVE_SECONDS)
    backend.tell("exit" if vouched else "leave")
    backend.wait()


def _for_a_while(run: Run, command: str) -> None:
    backend = run.source.choice(run.backends)
    backend.tell(command)
    time.sleep(run.source.uniform(2, 6))
    backend.tell("accept")


def _freeze_for_a_while(run: Run) -> None:
    backend = run.source.choice(run.backends)
    backend.send(signal.SIGSTOP)
    time.sleep(run.source.uniform(2, 6))
    backend.send(signal.SIGCONT)


def _kill(run: Run, number: int) -> None:
    run.backends[number].send(signal.SIGKILL)
    run.backends[number].wait()


def _kill_for_a_while(run: Run) -> None:
    number = run.source.randrange(len(run.backends))
    _kill(run, number)
    time.sleep(run.source.uniform(2, 6))
    run.backends[number] = run.stage.start_backend(run.backends[number].port)
