"""Certificates by themselves: looks after every name that portero was told, or that a backend brought along.

The shape: one task on the event loop looks at all certificates and decides (`core.acme.schedule`); for each
that there is something to do about it starts a task, which acts. Whatever blocks runs in threads: the disk in
one, the CA in `CA_THREADS`, so that neither waits for the other, and the exit for none of them. The `acme`
library is loaded there when there is first something to ask a CA for.

A look happens when the next certificate is due, after `LOOK_SECONDS` at the latest (other instances and
commands change the state directory too), and at once when a task has ended, when a backend registers a new
name, or on SIGHUP. Who may act at the same time, and who goes first, is `core.acme.schedule.admitted`.

What the disk does not take is remembered, and counts before what is on disk, until the disk has taken it
(`_keep`, the only way there). A disk that does not answer a look at all is a fault, and shows in /readyz.

Each certificate stands alone: what is wrong with one is written down, logged, counted, and tried again later;
the others do not even wait. Nothing that happens here ends the task, and nothing ever touches a hand-made
certificate.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from portero_py.control.acme.challenges import PendingChallenges
from portero_py.control.acme.clients import SharedClient
from portero_py.control.acme.daemon_threads import DaemonThreads
from portero_py.control.acme.dns01.records import START_SECONDS, DnsRecords
from portero_py.control.acme.files import AcmeFiles
from portero_py.control.acme.folder import CertificateFolder
from portero_py.control.acme.locks import Lock
from portero_py.control.acme.looks import Look, Looks
from portero_py.control.acme.order import OrderRun, Surroundings
from portero_py.control.acme.pairs import renewal_id
from portero_py.control.acme.repeats import Repeats
from portero_py.control.acme.wanted import MAX_BROUGHT, WantedNames
from portero_py.core.acme.names import Group
from portero_py.core.acme.progress import Progress, Step
from portero_py.core.acme.schedule import (
    HTTP_01,
    TLS_ALPN_01,
    Act,
    Turn,
    admitted,
    challenges_for,
    drawn,
    next_question,
    reach_time,
    retry_time,
)
from portero_py.errors import AcmeError, Busy, CaOutOfReach, CaRefused, StateUnwritable

if TYPE_CHECKING:
    from portero_py.config.model import Acme as AcmeConfig
    from portero_py.control.acme.client import AcmeClient
    from portero_py.core.certificates import CertificateTable
    from portero_py.core.challenges import Challenges

LOOK_SECONDS: Final = 30.0
#: Until a certificate that somebody else is at is looked at again.
BUSY_SECONDS: Final = 2.0
#: Until something is tried again whose failure could not be written down.
PAUSE_SECONDS: Final = 300.0
#: For the disk to answer a look; longer, and it is said to be stuck.
DISK_SECONDS: Final = 60.0
#: Requests to the CA at a time: a CA takes up to a second for one.
CA_THREADS: Final = 4
#: Texts that are remembered as said.
MAX_SAID: Final = 4096

#: The name of its faults.
FAULT: Final = "acme"

#: What a look did: the `result` label of `portero_acme_attempts_total`.
ISSUED: Final = "issued"

_log = logging.getLogger(__name__)


class Acme:
    """The certificates of one configuration. `recover` before certificates are read, then `run`.

    `publish` gives challenges to every listener; `table` is what is served now; `count(result)` is called
    for each attempt, with ISSUED or the reason of its failure. `has_service` says whether a service has a
    backend. `http_challenge` is for port 80; `at_usual_port` are the types that a CA certainly comes to.
    `count_fault` is called when the disk does not answer.
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
        has_service: Callable[[str], bool],
        has_plain_http: bool,
        at_usual_port: Collection[str] = (TLS_ALPN_01, HTTP_01),
        count_fault: Callable[[str], None],
        clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        # process
        self._config = config
        self._table = table
        self._count = count
        self._count_fault = count_fault
        self._clock = clock
        self._chance = chance
        self._files = AcmeFiles(state_dir, config.directory)
        self._folder = CertificateFolder(cert_dir, config.directory)
        self._challenges = PendingChallenges(publish, version=int(clock() * 1000))
        self._disk = DaemonThreads(1, "acme-disk")
        self._ca = DaemonThreads(CA_THREADS, "acme-ca")
        self._dns = DnsRecords(config, self._files, self._disk.call, clock)
        self._client = SharedClient(lambda: self._ca.call(self._open_client), self._files.account_lock)
        self._around = Surroundings(
            files=self._files,
            folder=self._folder,
            challenges=self._challenges,
            dns=self._dns,
            ask=self._ca.call,
            on_disk=self._disk.call,
            clock=clock,
            wanted=config.challenge,
            answerable=partial(
                challenges_for,
                answered=(TLS_ALPN_01, HTTP_01) if has_plain_http else (TLS_ALPN_01,),
                at_usual_port=at_usual_port,
                has_dns=config.has_dns,
            ),
        )
        self._sooner = asyncio.Event()
        # while it runs
        self._acting: dict[str, tuple[asyncio.Task[None], Turn]] = {}
        self._not_before: dict[
            str, float
        ] = {}  # where the disk does not say it: a lock is taken, a disk full
        self._is_stuck = False  # the disk did not answer the last look
        self._account_is_gone = False  # the CA does not know it any more
        self._said: set[str] = set()  # what was logged once
        self._unkept: dict[str, Progress] = {}  # what the full disk did not take
        self._repeats = Repeats()
        self._wanted = WantedNames(config, table=table, has_service=has_service, clock=clock)
        self._looks = Looks(self._files, self._folder, self._unkept, clock)

    # What the control plane asks and tells

    def http_challenge(self, token: str) -> str | None:
        """The key authorization of an http-01 challenge that is pending, or None."""
        return self._challenges.http(token)

    @property
    def faults(self) -> list[str]:
        """What /readyz names: ACME itself, while the disk does not answer."""
        return [FAULT] if self._is_stuck else []

    def look(self) -> None:
        """Look at all certificates now."""
        self._sooner.set()

    def registered(self, service: str) -> None:
        """A backend registered this service: get a certificate if the allow-list has it and none is there."""
        if not self._wanted.is_news(service):
            return
        if self._wanted.is_full:
            self._say_once(f"no certificate for {service}: backends brought {MAX_BROUGHT} names already")
            return
        self._wanted.bring(service)
        self.look()

    # The life cycle

    async def recover(self) -> None:
        """Complete what a crash interrupted between issuance and installation. It never raises."""
        try:
            async with asyncio.timeout(DISK_SECONDS):
                names = await self._quietly(self._files.names) or []
                for name in names:
                    await self._recover(name)
        except TimeoutError:
            self._count_fault(FAULT)
            _log.error("ACME: the disk does not answer; what was interrupted is completed later")
        except Exception:  # a bug: no reason not to start; `run` finds the same work
            self._count_fault(FAULT)
            _log.exception("ACME: what was interrupted is completed later")

    async def run(self) -> None:
        """Look after the certificates until cancelled."""
        cleaning = asyncio.create_task(self._dns.run(), name="acme records")
        try:
            await self._look_for_ever()
        finally:
            cleaning.cancel()
            await asyncio.wait([cleaning])
            await self._end_all()

    def close(self) -> None:
        """Take no more work; a request that is going on ends by its own limits, or with the process."""
        self._disk.close()
        self._ca.close()
        self._dns.close()

    # Private: looking

    async def _recover(self, name: str) -> None:
        try:
            progress = await self._quietly(self._files.progress, name)
            if progress is not None and progress.step is Step.ISSUED:
                await self._install_alone(name)
            if await self._quietly(self._files.dns_records, name):
                self._dns.left_behind(name, START_SECONDS)
        except Exception:  # AcmeError, or a bug: the other certificates are recovered all the same
            self._count(AcmeError.reason)
            _log.exception("%s: what was interrupted is completed later", name)

    async def _look_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._sooner.clear()
            began = loop.time()
            try:
                until = await self._look_round()
            except AcmeError as error:
                self._say_once(f"ACME: {error}")
                until = self._clock() + LOOK_SECONDS
            except Exception:  # a bug: nobody else renews certificates
                _log.exception("a look at the certificates failed; the next one follows")
                until = self._clock() + LOOK_SECONDS
            # When many come to an end one after the other, a fifth of the time goes into looking at most.
            await asyncio.sleep(min(4 * (loop.time() - began), BUSY_SECONDS))
            wait = min(max(until - self._clock(), 0.0), LOOK_SECONDS)
            try:
                async with asyncio.timeout(wait):
                    await self._sooner.wait()
            except TimeoutError:
                pass  # it is time

    async def _look_round(self) -> float:
        """Look at everything and begin what is due; when to look again (epoch seconds)."""
        groups = [group for group in self._groups() if group[0] not in self._acting]
        try:
            async with asyncio.timeout(DISK_SECONDS):
                looks, complaints = await self._disk.call(self._looks.at_all, groups)
        except TimeoutError:
            self._is_stuck = True
            self._count_fault(FAULT)
            raise StateUnwritable(f"the disk did not answer within {DISK_SECONDS:.0f} s") from None
        self._is_stuck = False
        for complaint in complaints:
            self._say_once(f"ACME: {complaint}")
        now = self._clock()
        self._not_before = {  # none that a clock has made which was ahead
            name: until for name, until in self._not_before.items() if now < until <= now + PAUSE_SECONDS
        }
        due = []
        for look in looks:
            self._explain(look)
            is_due = look.decision.act not in (Act.WAIT, Act.LEAVE)
            if not is_due:
                self._repeats.forget(look.names[0])
            elif self._may_begin(look, now):
                due.append(look)
        going_on = [each for _, each in self._acting.values()]
        for place in admitted([look.turn for look in due], going_on):
            self._begin(due[place])
        # The end of each task makes for another look.
        waits = [look.decision.until for look in looks if look.decision.until]
        return min([*waits, *self._not_before.values()], default=float("inf"))

    def _may_begin(self, look: Look, now: float) -> bool:
        """Whether nothing keeps what is due from being done now."""
        name = look.names[0]
        until = self._repeats.earliest(look)
        if now < until <= now + PAUSE_SECONDS:
            self._not_before.setdefault(name, until)
        return name not in self._not_before

    def _begin(self, look: Look) -> None:
        name = look.names[0]
        self._repeats.begin(look, self._clock())
        task = asyncio.create_task(self._act(look), name=f"acme {name}")
        self._acting[name] = (task, look.turn)
        task.add_done_callback(lambda _: self._ended(name))

    def _ended(self, name: str) -> None:
        task, _ = self._acting.pop(name)
        if not task.cancelled() and task.exception() is not None:
            _log.error("ACME for %s failed", name, exc_info=task.exception())
            self._not_before[name] = self._clock() + PAUSE_SECONDS
        self._sooner.set()

    async def _end_all(self) -> None:
        tasks = [task for task, _ in self._acting.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _groups(self) -> list[Group]:
        for name in self._wanted.forget(self._acting):
            self._unkept.pop(name, None)
            self._not_before.pop(name, None)
            self._repeats.forget(name)
        return self._wanted.groups()

    def _explain(self, look: Look) -> None:
        name = look.names[0]
        if look.decision.act is Act.LEAVE:
            self._say_once(f"{name} has a certificate that portero did not make: ACME leaves it alone")
        elif not look.is_served and look.kept is None:
            default = self._table().default
            until = f"served with the default one ({default.name})" if default else "refused"
            self._say_once(f"{name} has no certificate yet: it is {until} until ACME brings one")

    # Private: acting

    async def _act(self, look: Look) -> None:
        """Do what there is to do about one certificate, alone. Whatever goes wrong ends here."""
        name = look.names[0]
        lock = Lock(self._files.lock(name))
        try:
            await self._disk.call(lock.acquire, self._clock())
            # Another instance may have been here between the look and the lock.
            look = await self._disk.call(self._looks.at, look.names)
            act = look.decision.act
            if act is Act.INSTALL:
                await self._install(name, look.progress)
            elif act is Act.ADOPT:
                await self._adopt(look)
            elif act in (Act.ASK, Act.ORDER, Act.RESUME):
                async with self._client.use() as client:
                    if act is Act.ASK:
                        await self._ask_when(client, look)
                    else:
                        await self._obtain(client, lock, look)
        except AcmeError as error:
            await self._settle(look, error)
        except Exception as error:  # a bug: a failed attempt as any other, with its pause
            _log.exception("ACME for %s failed", name)
            await self._settle(look, AcmeError(f"a fault in portero: {type(error).__name__}"))
        finally:
            lock.release()

    async def _obtain(self, client: AcmeClient, lock: Lock, look: Look) -> None:
        name = look.names[0]
        replaces = ""
        has_renewal_info = await self._ca.call(lambda: client.has_renewal_info)
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
        if not known_as or not await self._ca.call(lambda: client.has_renewal_info):
            progress = replace(progress, ask_at=next_question(now, 0.0), renew_at=0.0, window=(), why="")
        else:
            try:
                found = await self._ca.call(client.renewal_info, known_as)
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
        await self._keep(name, progress)

    async def _adopt(self, look: Look) -> None:
        """Go on with the pair in the certificate directory, as if it had been issued just now."""
        name = look.names[0]
        found = await self._disk.call(self._folder.own_pair, name)
        if found is None:
            return  # it has changed since the look: the next one sees what is there now
        await self._disk.call(self._files.save_pair, name, found.chain_pem, found.key_pem)
        # Not to be asked about at once: whoever loses its state directory at every start would make as many
        # accounts.
        progress = look.progress.adopted(
            look.names, found.fingerprint, found.not_before, next_question(self._clock(), 0.0)
        )
        await self._keep(name, progress)
        _log.info("certificate taken over from the certificate directory, nothing is ordered: %s", name)

    async def _install_alone(self, name: str) -> None:
        """Copy an issued pair to the certificate directory, at the start."""
        lock = Lock(self._files.lock(name))
        try:
            await self._disk.call(lock.acquire, self._clock())
            await self._install(name, await self._disk.call(self._files.progress, name))
        except AcmeError as error:
            self._say_once(f"{name}: the certificate waits to be installed: {error}")
        finally:
            lock.release()

    async def _install(self, name: str, progress: Progress) -> None:
        """Copy an issued pair to the certificate directory, once more; the lock is held."""
        kept = await self._disk.call(self._files.pair, name)
        _, is_ours = await self._disk.call(self._folder.served, name)
        if kept is not None and is_ours:
            await self._disk.call(self._folder.install, kept)
        if progress.step is Step.ISSUED:
            now = self._clock()
            done = progress.dropped() if kept is None else progress.installed(kept.fingerprint, now)
            await self._keep(name, done)
        _log.info("certificate installed: %s", name)

    # Private: failing

    async def _settle(self, look: Look, error: AcmeError) -> None:
        """What could not even begin."""
        if isinstance(error, Busy):
            self._repeats.forget(look.names[0])  # nothing was tried
            self._not_before[look.names[0]] = self._clock() + BUSY_SECONDS
        elif look.decision.act is Act.ASK:
            self._not_before[look.names[0]] = self._clock() + PAUSE_SECONDS
            progress = replace(
                look.progress, ask_at=next_question(self._clock(), max(error.retry_after, 3600.0))
            )
            await self._keep_quietly(look.names[0], progress)
        else:
            await self._failed(look.names[0], look.progress, error)

    async def _failed(self, name: str, progress: Progress, error: AcmeError) -> None:
        """Write down, count and say that an attempt failed, and when the next one is."""
        now = self._clock()
        was_heard = not isinstance(error, CaOutOfReach)
        if was_heard:
            retry_at = retry_time(now, progress.failures, error.retry_after, self._chance())
        else:
            retry_at = reach_time(now, progress.unheard, self._chance())
        if isinstance(error, CaRefused) and error.problem == "accountDoesNotExist":
            if not progress.failures:
                retry_at = now + 1.0
            self._account_is_gone = True
            self._client.open_anew()
        failed = progress.failed(error.reason, str(error), now, retry_at, was_heard=was_heard)
        self._count(error.reason)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(retry_at))
        # A network that comes up late is said once, not at every try in the first minutes.
        level = logging.WARNING if was_heard or not progress.unheard else logging.DEBUG
        _log.log(level, "no certificate for %s: %s; the next attempt is at %s UTC", name, error, when)
        await self._keep_quietly(name, failed)

    # Private: the disk

    async def _keep(self, name: str, progress: Progress) -> None:
        """Write down how far it is. Raises StateUnwritable: it is remembered, and counts all the same."""
        self._unkept[name] = progress
        await self._disk.call(self._files.save_progress, name, progress)
        self._unkept.pop(name, None)

    async def _keep_quietly(self, name: str, progress: Progress) -> None:
        try:
            await self._keep(name, progress)
        except StateUnwritable as unwritable:
            self._say_once(f"ACME: {unwritable}")

    # Private: the threads

    def _open_client(self) -> AcmeClient:
        """A client whose account exists. It blocks."""
        from portero_py.control.acme.account import forget_address, open_client  # 78 ms, 22 MiB: the library

        if self._account_is_gone:
            forget_address(self._files)
            self._account_is_gone = False
        return open_client(self._config, self._files)

    async def _quietly(self, function: Callable[..., Any], *arguments: object) -> Any:
        """On the disk, with what goes wrong in the log, and None."""
        try:
            return await self._disk.call(function, *arguments)
        except AcmeError as error:
            self._say_once(f"ACME: {error}")
            return None

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            if len(self._said) >= MAX_SAID:
                self._said.clear()
            self._said.add(text)
            _log.warning("%s", text)
