"""What a team does to its services all day: deploys, drains, pauses. None of it may cost a client anything.

- A *deploy* starts a new instance on a port of its own, registers it, gives the old one's lease back with
  `wait_seconds` and ends the old one at the answer: at once, with every connection that it has. Only when
  nobody can say that nothing is in flight there (control was killed meanwhile) it waits for as long as the
  slowest answer takes.
- A *drain* takes an instance out and, a moment later, in again. Between the answer that nothing is in flight
  there and `ready` it must not be asked anything.
- A *pause* holds a service's requests for a moment.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final

import orjson

from tests.slow.chaos_backends import Agents, ApiAnswer, Backend, RegistrationClient
from tests.slow.chaos_journal import Breakage, Journal, now

#: Seconds that a drain may take: longer than the slowest answer, shorter than the API's clients wait.
WAIT: Final = 20.0
#: Seconds in which the slowest answer is out.
SLOWEST: Final = 8.0


class Deploys:
    """Rolls out `services` again and again, an instance at a time. `make` makes a backend that lives."""

    TTL: Final = 20
    RENEW_AFTER: Final = 5.0
    INSTANCES: Final = 2

    def __init__(
        self,
        journal: Journal,
        agents: Agents,
        services: tuple[str, ...],
        make: Callable[[str], Awaitable[Backend]],
        source: random.Random,
    ) -> None:
        self._journal = journal
        self._agents = agents
        self._services = services
        self._make = make
        self._source = source
        self._number = 0
        self._living: dict[str, list[tuple[Backend, asyncio.Task[None]]]] = {name: [] for name in services}

    async def begin(self) -> None:
        """Deploy everything for the first time."""
        for service in self._services:
            for _ in range(self.INSTANCES):
                assert await self._start(service)

    async def run(self, until: float) -> None:
        """One after the other."""
        while now() < until:
            await asyncio.sleep(self._source.uniform(0.5, 3.0))
            service = self._source.choice(self._services)
            self._journal.fault("deploy", service)
            if await self._start(service):
                await self._end(service)

    async def close(self) -> None:
        """End the agents. The backends are the run's."""
        tasks = [task for living in self._living.values() for _, task in living]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Private

    async def _start(self, service: str) -> bool:
        """A new instance; whether it is registered."""
        self._number += 1
        backend = await self._make(f"{service.split('.')[0]}-{self._number}")
        while not await self._agents.register(service, backend.instance, backend.port, self.TTL):
            await asyncio.sleep(0.3)
        keep = self._agents.keep(service, backend, self.TTL, self.RENEW_AFTER)
        task = asyncio.create_task(keep, name=f"agent of {backend.instance}")
        self._living[service].append((backend, task))
        return True

    async def _end(self, service: str) -> None:
        """The oldest instance leaves, as the agent does it."""
        backend, agent = self._living[service].pop(0)
        agent.cancel()
        await asyncio.gather(agent, return_exceptions=True)
        answered = await self._agents.release(service, backend.instance, WAIT)
        said = self._agents.last_answer
        if not answered or said.status != 200 or orjson.loads(said.body).get("in_flight") != 0:
            self._journal.note(f"{backend.instance} waits: {said.status} {said.body[:80]!r}")
            while not answered:
                await asyncio.sleep(0.5)
                answered = await self._agents.release(service, backend.instance)
            await asyncio.sleep(SLOWEST)
        await backend.die()
        self._journal.note(f"{backend.instance} is gone")


class Drains:
    """Drains one of `members` and lets it be ready again; pauses one of `services` and resumes it."""

    def __init__(
        self,
        journal: Journal,
        api: RegistrationClient,
        members: list[tuple[str, Backend]],
        services: tuple[str, ...],
        source: random.Random,
    ) -> None:
        self._journal = journal
        self._api = api
        self._members = members
        self._services = services
        self._source = source

    async def run(self, until: float) -> None:
        """One at a time."""
        while now() < until:
            await asyncio.sleep(self._source.uniform(1.0, 4.0))
            if self._source.random() < 0.5:
                await self._drain(*self._source.choice(self._members))
            else:
                await self._pause(self._source.choice(self._services))

    # Private

    async def _drain(self, service: str, backend: Backend) -> None:
        self._journal.fault("drain", backend.instance)
        which: dict[str, object] = {"service_name": service, "instance_id": backend.instance}
        begun = now()
        answer = await self._ask("/backends/drain", {**which, "wait_seconds": WAIT})
        is_empty = answer.status == 200 and orjson.loads(answer.body)["in_flight"] == 0
        drained = now()
        await asyncio.sleep(self._source.uniform(0.1, 2.0))
        # A worker that hangs, or is new and has not heard yet, is not what is to be proved here.
        away = self._journal.troubled(begun, now(), "control", "worker", "supervisor")
        if is_empty and backend.asked_at > drained and away is None:
            late = backend.asked_at - drained
            detail = f"{backend.instance} of {service} was asked {late:.3f} s after it was drained"
            self._journal.broke(Breakage("drained", "drains", begun, now(), detail, service))
        await self._until_answered("/backends/ready", which)
        self._journal.note(f"{backend.instance} is ready again")

    async def _pause(self, service: str) -> None:
        self._journal.fault("pause", service)
        await self._ask("/services/pause", {"service_name": service, "seconds": 30})
        await asyncio.sleep(self._source.uniform(0.1, 1.5))
        await self._until_answered("/services/resume", {"service_name": service})
        self._journal.note(f"{service} goes on")

    async def _ask(self, path: str, content: dict[str, object]) -> ApiAnswer:
        begun = now()
        answer = await self._api.ask("POST", path, content)
        if answer.status != 200:
            kind = "api broken" if answer.status == 0 else "api refused"
            detail = f"{path} {content}: {answer.status} {answer.body[:200]!r}"
            self._journal.broke(Breakage(kind, "drains", begun, now(), detail, status=answer.status))
        return answer

    async def _until_answered(self, path: str, content: dict[str, object]) -> None:
        """Whatever happens to control: nothing may stay drained or paused."""
        while (await self._ask(path, content)).status != 200:
            await asyncio.sleep(0.3)
