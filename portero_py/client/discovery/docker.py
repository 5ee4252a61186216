"""`portero-py discover docker`: containers are registered while they serve, and only then.

It runs beside Docker and is a client of the registration API: who is exposed to the world never sees Docker's
socket.

The rules
- Events are subscribed to first, then all that run are listed: nothing is missed in between. A stream that
  broke is begun anew in the same way, after a pause that grows. Meanwhile every lease is kept: that Docker
  cannot be asked says nothing about the containers.
- All are listed again every RELIST seconds: a stream that died without a word costs no more than that.
- Leases are left as they are at the end, so that another start costs no request. What ran then and does not
  run now, the first listing cannot tell: it is found by its instance id in the API's own list.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import time
from typing import Final

from portero_py.client.discovery.containers import (
    Container,
    Options,
    engine_name,
    parse,
    prefix_of,
)
from portero_py.client.discovery.engine import Address, Engine
from portero_py.client.discovery.events import Event
from portero_py.client.discovery.keepers import Keepers
from portero_py.client.discovery.watch import Watch
from portero_py.client.registrar import Api, worth_waiting
from portero_py.errors import DockerUnreachable, PorteroError, RegistrationRefused

#: Seconds between two listings of a Docker that has nothing to say.
RELIST: Final = 60.0

#: How many containers are looked at at a time, and the seconds after a look that failed.
LOOKS: Final = 8
AFTER_LOOK: Final = 1.0

#: Seconds before the first attempt to reach Docker again, and the most between two.
FIRST_RETRY: Final = 0.25
LAST_RETRY: Final = 15.0

_log = logging.getLogger(__name__)


async def discover(api: Api, address: Address, options: Options) -> None:
    """Keep the containers of one Docker registered until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    async with Engine(address) as engine, Keepers(api) as keepers:
        running = asyncio.create_task(Discovery(engine, options, keepers).run(), name="discovery")
        stopping = asyncio.create_task(stopped.wait(), name="signals")
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (running, stopping):
            task.cancel()
        await asyncio.wait({running, stopping})
        if not running.cancelled():
            running.result()  # why it ended by itself
        _log.info("%d leases are left: they end in %d s at most", len(keepers.names), options.ttl_seconds)


class Discovery:
    """What Docker tells becomes what is wanted of the keepers. `run` has to run."""

    def __init__(
        self, engine: Engine, options: Options, keepers: Keepers, *, relist_seconds: float = RELIST
    ) -> None:
        self._engine = engine
        self._options = options
        self._keepers = keepers
        self._relist_seconds = relist_seconds
        self._watch: Watch
        self._name = ""
        self._named = asyncio.Event()
        self._work = asyncio.Event()
        self._looking = 0
        self._is_listening = False
        self._unseen: set[str] = set()  # whose looks failed, and that this was said
        self._settled = asyncio.Event()  # for the first time

    async def run(self) -> None:
        """Watch until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(), name="docker events")
            for number in range(LOOKS):
                group.create_task(self._look_after_look(), name=f"docker look {number}")
            group.create_task(self._tidy_up(), name="docker leases of before")

    # Private

    async def _follow(self) -> None:
        """Listen to Docker, again and again."""
        wait, said = 0.0, ""
        while True:
            began = time.monotonic()
            try:
                await self._listen()
            except DockerUnreachable as error:
                if str(error) != said:
                    _log.warning("%s; it is tried again, leases are kept", error)
                said = str(error)
            except Exception:
                # Whatever it is: nobody else would notice that a container ended.
                _log.exception("Docker's events could not be seen to; it is tried again")
            finally:
                self._is_listening = False
            if time.monotonic() - began > LAST_RETRY:  # it listened
                wait, said = 0.0, ""
            wait = min(max(2 * wait, FIRST_RETRY), LAST_RETRY)
            await asyncio.sleep(wait * (0.5 + 0.5 * random.random()))  # noqa: S311 - spreads load

    async def _listen(self) -> None:
        release = await self._engine.connect()
        if not self._named.is_set():
            self._name = engine_name(await self._engine.info())
            self._watch = Watch(self._options, self._name)
            self._named.set()
        async with self._engine.events() as stream:
            count = await self._list()
            self._is_listening = True
            _log.info("%s: %s, %d containers with our labels", self._engine.address, release, count)
            loop = asyncio.get_running_loop()
            list_at = loop.time() + self._relist_seconds
            while True:
                events: list[Event] = []
                try:
                    async with asyncio.timeout_at(list_at):
                        events = await stream.next()
                except TimeoutError:
                    await self._list()
                    list_at = loop.time() + self._relist_seconds
                for event in events:
                    self._heard(event)

    async def _list(self) -> int:
        """All that run; how many of them speak of us."""
        began = self._watch.begin()
        for container_id in self._watch.listed(await self._engine.containers(), began):
            self._unseen.discard(container_id)
            self._keepers.want(container_id, "", (), "it has ended")
        self._work.set()
        self._settle()
        return self._watch.count

    def _heard(self, event: Event) -> None:
        why_not = self._watch.heard(event, time.monotonic())
        if why_not:
            self._unseen.discard(event.container_id)
            self._keepers.want(event.container_id, "", (), why_not)
        self._work.set()

    async def _look_after_look(self) -> None:
        await self._named.wait()
        while True:
            container_id = self._watch.next_look()
            if container_id is None:
                self._work.clear()
                await self._work.wait()
                continue
            self._looking += 1
            try:
                await self._look(container_id)
            except DockerUnreachable as error:
                # Once, and not where all of Docker is away: `_follow` says that.
                if self._is_listening and container_id not in self._unseen:
                    self._unseen.add(container_id)
                    _log.warning(
                        "%s: it cannot be looked at: %s; it is tried again", container_id[:12], error
                    )
                await asyncio.sleep(AFTER_LOOK)
                self._watch.look_again(container_id)
            except Exception:
                # The others are not to suffer for one. The next listing names it again.
                _log.exception("%s could not be seen to", container_id[:12])
            finally:
                self._looking -= 1
            self._settle()

    async def _look(self, container_id: str) -> None:
        began = self._watch.begin()
        container = await self._inspect(container_id)
        around = await self._inspect(container.inside) if container is not None and container.inside else None
        seen = self._watch.seen(container_id, container, around, began, time.monotonic())
        self._unseen.discard(container_id)
        self._work.set()
        if seen is None:
            return
        title = f"{seen.name} ({container_id[:12]})"
        if seen.complaint:
            _log.warning("%s: %s", title, seen.complaint)
        if seen.why_not and seen.is_news:
            _log.info("%s: it takes no requests: %s", title, seen.why_not)
        self._keepers.want(container_id, title, seen.registrations, seen.why_not)

    async def _inspect(self, container_id: str) -> Container | None:
        inspection = await self._engine.inspect(container_id)
        return None if inspection is None else parse(inspection)

    def _settle(self) -> None:
        if not self._looking and self._watch.is_settled:
            self._settled.set()

    async def _tidy_up(self) -> None:
        """Give back what an earlier run left and nobody wants. It ends by itself in a lease's length."""
        ends_at = time.monotonic() + self._options.ttl_seconds
        await self._settled.wait()
        wait = FIRST_RETRY
        while self._name and time.monotonic() < ends_at:
            try:
                released = await self._keepers.release_others(prefix_of(self._name))
            except RegistrationRefused as error:
                if not worth_waiting(error.answered):
                    _log.warning("leases of an earlier run end by themselves: %s", error)
                    return
                wait = max(wait, error.retry_after)
            except PorteroError:
                pass  # the keepers say so, as soon as there is anything to keep
            except Exception:
                # Whatever it is: those that serve must not suffer for those that do not.
                _log.exception("leases of an earlier run end by themselves")
                return
            else:
                for service, instance_id in released:
                    _log.info("%s: %s of an earlier run is deregistered: it has ended", service, instance_id)
                return
            await asyncio.sleep(wait)
            wait = min(2 * wait, LAST_RETRY)
