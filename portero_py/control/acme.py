"""Certificates by themselves: looks after every name that portero was told, or that a backend brought along.

The shape: one task on the event loop looks at all certificates, decides (`core.acme_schedule`), and acts;
whatever blocks (the CA, the disk) runs in one thread of its own, so that a CA that hangs holds up nobody. The
`acme` library is loaded there when there is first something to ask a CA for.

A look happens when the next certificate is due, after `LOOK_SECONDS` at the latest (other instances and
commands change the state directory too), and at once when a backend registers a new name or on SIGHUP. Up to
`AT_ONCE` orders go on at the same time: they share the thread, but not the waiting.

Each certificate stands alone: what is wrong with one is written down, logged, counted, and tried again later;
the others go on. Nothing that happens here ends the task, and nothing ever touches a hand-made certificate.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from portero_py.control.acme_challenges import PendingChallenges
from portero_py.control.acme_files import AcmeFiles
from portero_py.control.acme_folder import CertificateFolder, Entries
from portero_py.control.acme_locks import Lock, account_in_use
from portero_py.control.acme_order import OrderRun, Surroundings
from portero_py.control.acme_pairs import held, renewal_id
from portero_py.core.acme_names import Group, allowed
from portero_py.core.acme_progress import Progress, Step
from portero_py.core.acme_schedule import (
    HTTP_01,
    TLS_ALPN_01,
    Act,
    Decision,
    decide,
    drawn,
    next_question,
    retry_time,
)
from portero_py.errors import AcmeError, Busy, CaRefused, StateUnwritable

if TYPE_CHECKING:
    from portero_py.config import Acme as AcmeConfig
    from portero_py.control.acme_client import AcmeClient
    from portero_py.core.certificates import Certificate, CertificateTable
    from portero_py.core.challenges import Challenges

LOOK_SECONDS: Final = 30.0
#: Until a certificate that somebody else is at is looked at again.
BUSY_SECONDS: Final = 2.0
AT_ONCE: Final = 4
#: Most names that backends may bring along: a CA's limits, and this machine's time, are finite.
MAX_BROUGHT: Final = 1000

#: What a look did: the `result` label of `portero_acme_attempts_total`.
ISSUED: Final = "issued"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Look:
    """One certificate at one look: what is known about it, and what to do."""

    names: Group
    progress: Progress
    kept: Certificate | None
    is_served: bool
    decision: Decision


class Acme:
    """The certificates of one configuration. `recover` before certificates are read, then `run`.

    `publish` gives challenges to every listener; `table` is what is served now; `count(result)` is called
    for each attempt, with ISSUED or the reason of its failure. `http_challenge` is for port 80.
    """

    def __init__(
        self,
        config: AcmeConfig,
        state_dir: str,
        cert_dir: str,
        *,
        publish: Callable[[Challenges], Awaitable[None]],
        table: Callable[[], CertificateTable],
        count: Callable[[str], None],
        has_plain_http: bool,
        clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        # process
        self._config = config
        self._table = table
        self._count = count
        self._clock = clock
        self._chance = chance
        self._files = AcmeFiles(state_dir, config.directory)
        self._folder = CertificateFolder(cert_dir)
        self._challenges = PendingChallenges(publish, version=int(clock() * 1000))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="acme")
        self._around = Surroundings(
            files=self._files,
            folder=self._folder,
            challenges=self._challenges,
            call=self._call,
            clock=clock,
            wanted=config.challenge,
            answerable=(TLS_ALPN_01, HTTP_01) if has_plain_http else (TLS_ALPN_01,),
        )
        self._sooner = asyncio.Event()
        # while it runs
        self._brought: dict[str, Group] = {}  # by backends
        self._said: set[str] = set()  # what was logged once
        self._unkept: dict[str, Progress] = {}  # failures that the full disk did not take
        # one look
        self._was_busy = False  # somebody else had a lock

    # What the control plane asks and tells

    def http_challenge(self, token: str) -> str | None:
        """The key authorization of an http-01 challenge that is pending, or None."""
        return self._challenges.http(token)

    def look(self) -> None:
        """Look at all certificates now."""
        self._sooner.set()

    def registered(self, service: str) -> None:
        """A backend registered this service: get a certificate if the allow-list has it and none is there."""
        if service in self._brought or not allowed(service, self._config.on_register):
            return
        if any(service in group for group in self._config.domains):
            return
        if len(self._brought) >= MAX_BROUGHT:
            self._say_once(f"no certificate for {service}: backends brought {MAX_BROUGHT} names already")
            return
        self._brought[service] = (service,)
        self.look()

    # The life cycle

    async def recover(self) -> None:
        """Complete what a crash interrupted between issuance and installation. Never raises AcmeError."""
        for name in await self._quietly(self._files.names) or []:
            progress = await self._quietly(self._files.progress, name)
            if progress is not None and progress.step is Step.ISSUED:
                await self._install_alone(name)

    async def run(self) -> None:
        """Look after the certificates until cancelled."""
        while True:
            self._sooner.clear()
            try:
                until = await self._round()
            except AcmeError as error:
                self._say_once(f"ACME: {error}")
                until = self._clock() + LOOK_SECONDS
            except Exception:
                _log.exception("a look at the certificates failed; the next one follows")
                until = self._clock() + LOOK_SECONDS
            wait = min(max(until - self._clock(), 0.0), LOOK_SECONDS)
            try:
                async with asyncio.timeout(wait):
                    await self._sooner.wait()
            except TimeoutError:
                pass  # it is time

    def close(self) -> None:
        """Take no more work; a request that is going on ends by its own limits."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    # Private: one look

    async def _round(self) -> float:
        """Look at everything and do what is due; when to look again (epoch seconds)."""
        self._was_busy = False
        looks = await self._call(self._look_at_all, self._groups())
        due = [look for look in looks if look.decision.act not in (Act.WAIT, Act.LEAVE)]
        for look in looks:
            self._explain(look)
        asking = [look for look in due if look.decision.act is not Act.INSTALL]
        for look in due:
            if look.decision.act is Act.INSTALL:
                await self._install_alone(look.names[0])
        if asking:
            await self._ask_the_ca(asking)
        if due:
            # Decide anew: what was done has changed what there is to do.
            return self._clock() + (BUSY_SECONDS if self._was_busy else 0.0)
        return min((look.decision.until for look in looks if look.decision.until), default=float("inf"))

    def _groups(self) -> list[Group]:
        covered = {name for group in self._config.domains for name in group}
        brought = [
            group for name, group in self._brought.items() if name not in covered and not self._has(name)
        ]
        return [*self._config.domains, *brought]

    def _has(self, name: str) -> bool:
        """Whether another certificate than its own covers a name that a backend brought."""
        found = self._table().find(name)
        return found is not None and found.name != name and found.not_after > self._clock()

    def _look_at_all(self, groups: list[Group]) -> list[Look]:
        entries = self._folder.entries()
        return [self._look_at(names, entries) for names in groups]

    def _look_at(self, names: Group, entries: Entries | None = None) -> Look:
        name = names[0]
        progress = self._unkept.get(name) or self._files.progress(name)
        kept = self._files.pair(name)
        served, is_ours = self._folder.served(name, entries)
        decision = decide(
            names, progress, held(kept) if kept else None, served, self._clock(), is_ours=is_ours
        )
        return Look(names, progress, kept, served is not None, decision)

    def _explain(self, look: Look) -> None:
        name = look.names[0]
        if look.decision.act is Act.LEAVE:
            self._say_once(f"{name} has a certificate that portero did not make: ACME leaves it alone")
        elif not look.is_served and look.kept is None:
            default = self._table().default
            until = f"served with the default one ({default.name})" if default else "refused"
            self._say_once(f"{name} has no certificate yet: it is {until} until ACME brings one")

    # Private: acting

    async def _ask_the_ca(self, looks: list[Look]) -> None:
        with ExitStack() as held_while_asking:
            try:
                held_while_asking.enter_context(account_in_use(self._files.account_lock))
                client = await self._call(self._client)
                held_while_asking.callback(client.close)
            except AcmeError as error:
                for look in looks:
                    await self._settle(look, error)
                return
            places = asyncio.Semaphore(AT_ONCE)

            async def placed(look: Look) -> None:
                async with places:
                    await self._act(client, look)

            async with asyncio.TaskGroup() as tasks:
                for look in looks:
                    tasks.create_task(placed(look), name=f"acme {look.names[0]}")

    async def _act(self, client: AcmeClient, look: Look) -> None:
        name = look.names[0]
        lock = Lock(self._files.lock(name))
        try:
            await self._call(lock.acquire, self._clock())
        except AcmeError as error:
            await self._settle(look, error)
            return
        try:
            # Another instance may have been here between the look and the lock.
            look = await self._call(self._look_at, look.names)
            if look.decision.act is Act.ASK:
                await self._ask_when(client, look)
            elif look.decision.act in (Act.ORDER, Act.RESUME):
                await self._obtain(client, lock, look)
        except AcmeError as error:
            await self._settle(look, error)
        except Exception as error:
            _log.exception("ACME for %s failed", name)
            await self._settle(look, AcmeError(f"a fault in portero: {type(error).__name__}"))
        finally:
            lock.release()

    async def _obtain(self, client: AcmeClient, lock: Lock, look: Look) -> None:
        name = look.names[0]
        replaces = ""
        has_renewal_info = await self._call(lambda: client.has_renewal_info)
        if look.kept is not None and not look.progress.revoked and has_renewal_info:
            replaces = renewal_id(look.kept.chain_pem)
        run = OrderRun(self._around, client, lock, look.names, look.progress)
        try:
            certificate = await run.run(replaces)
        except AcmeError as error:
            await self._failed(name, run.progress, error)
            return
        self._unkept.pop(name, None)
        self._count(ISSUED)
        days = (certificate.not_after - self._clock()) / 86400
        _log.info(
            "certificate issued by %s: %s, for %.0f days", certificate.issuer, ", ".join(look.names), days
        )

    async def _ask_when(self, client: AcmeClient, look: Look) -> None:
        """Ask the CA when it wants it renewed; a moment once drawn stays as long as its window does."""
        now, progress = self._clock(), look.progress
        assert look.kept is not None
        name, known_as = look.names[0], renewal_id(look.kept.chain_pem)
        if not known_as or not await self._call(lambda: client.has_renewal_info):
            progress = replace(progress, ask_at=next_question(now, 0.0), renew_at=0.0, window=(), why="")
        else:
            try:
                found = await self._call(client.renewal_info, known_as)
            except AcmeError as error:
                _log.warning("%s: the CA does not say when to renew it: %s", name, error)
                progress = replace(progress, ask_at=next_question(now, error.retry_after))
            else:
                window = (found.start, found.end)
                renew_at = progress.renew_at
                if window != progress.window:
                    renew_at = drawn(*window, self._chance())
                progress = replace(
                    progress,
                    ask_at=next_question(now, found.retry_after),
                    window=window,
                    renew_at=renew_at,
                    why=found.why,
                )
        await self._call(self._files.save_progress, name, progress)

    async def _install_alone(self, name: str) -> None:
        """Copy an issued pair to the certificate directory, once more."""
        lock = Lock(self._files.lock(name))
        try:
            await self._call(lock.acquire, self._clock())
        except AcmeError as error:
            self._was_busy = True
            self._say_once(f"{name}: the certificate waits to be installed: {error}")
            return
        try:
            kept = await self._call(self._files.pair, name)
            progress = await self._call(self._files.progress, name)
            _, is_ours = await self._call(self._folder.served, name)
            if kept is not None and is_ours:
                await self._call(self._folder.install, kept)
            if progress.step is Step.ISSUED:
                now = self._clock()
                done = progress.dropped() if kept is None else progress.installed(kept.fingerprint, now)
                await self._call(self._files.save_progress, name, done)
            _log.info("certificate installed: %s", name)
        except AcmeError as error:
            await self._failed(name, await self._quietly(self._files.progress, name) or Progress(), error)
        finally:
            lock.release()

    # Private: failing

    async def _settle(self, look: Look, error: AcmeError) -> None:
        """What could not even begin."""
        if isinstance(error, Busy):
            self._was_busy = True
        elif look.decision.act is Act.ASK:
            progress = replace(
                look.progress, ask_at=next_question(self._clock(), max(error.retry_after, 3600.0))
            )
            await self._quietly(self._files.save_progress, look.names[0], progress)
        else:
            await self._failed(look.names[0], look.progress, error)

    async def _failed(self, name: str, progress: Progress, error: AcmeError) -> None:
        """Write down, count and say that an attempt failed, and when the next one is."""
        now = self._clock()
        retry_at = retry_time(now, progress.failures, error.retry_after, self._chance())
        if isinstance(error, CaRefused) and error.problem == "accountDoesNotExist":
            if not progress.failures:
                retry_at = now + 1.0
            await self._quietly(self._forget_account)
        failed = progress.failed(error.reason, str(error), now, retry_at)
        self._count(error.reason)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(retry_at))
        _log.warning("no certificate for %s: %s; the next attempt is at %s UTC", name, error, when)
        try:
            await self._call(self._files.save_progress, name, failed)
        except StateUnwritable as unwritable:
            self._unkept[name] = failed
            self._say_once(f"ACME: {unwritable}")
        else:
            self._unkept.pop(name, None)

    # Private: the thread

    def _client(self) -> AcmeClient:
        """A client whose account exists. It blocks."""
        from portero_py.control.acme_account import open_client  # 78 ms and 22 MiB, the library's

        return open_client(self._config, self._files)

    def _forget_account(self) -> None:
        from portero_py.control.acme_account import forget_address

        forget_address(self._files)

    async def _call(self, function: Callable[..., Any], *arguments: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *arguments))

    async def _quietly(self, function: Callable[..., Any], *arguments: object) -> Any:
        """`_call`, with what goes wrong in the log, and None."""
        try:
            return await self._call(function, *arguments)
        except AcmeError as error:
            self._say_once(f"ACME: {error}")
            return None

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _log.warning("%s", text)
