"""The control plane put together: leases, what provides them, what keeps them, certificates, the open ports.

It runs on the event loop of the only process, or in a process of its own beside several workers: it knows
the workers as subscribers of the feed, wherever they are.

The order of a start: `load` reads certificates and leases and publishes both, so that whoever serves has them
before the first client, and begins to sweep and to run the providers; `serve` opens the ports of the
registration API and of plain HTTP.

A successor (another process, after an upgrade) prepares while this one runs, then this one closes with
`hand_over`, then the successor takes over. The sockets stay open meanwhile: who comes waits in their queues.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from portero_py.config.files import Seen
from portero_py.config.model import Config, Reloads
from portero_py.control.api.application import RegistrationApi
from portero_py.control.api.metrics import Metrics
from portero_py.control.api.state import State
from portero_py.control.certificates.store import CertificateStore, Former
from portero_py.control.file_watch import FileWatch
from portero_py.control.kept_leases import KeptLeases
from portero_py.control.leases import Leases
from portero_py.control.open_server import Door, OpenSite
from portero_py.control.plain_http import PlainHttp, no_challenges
from portero_py.control.probe_connection import Asker
from portero_py.control.probes import Probes
from portero_py.control.providers.provider import Provider
from portero_py.control.providers.static import StaticBackends, policies_of
from portero_py.control.snapshot import Snapshot
from portero_py.control.tasks import Tasks
from portero_py.core.certificates import CertificateTable
from portero_py.core.model import API
from portero_py.core.registry import Registry
from portero_py.core.routes import Routes
from portero_py.core.routing_table import RoutingTable
from portero_py.errors import BadSnapshot, ConfigError
from portero_py.feed.feed import Feed
from portero_py.proxy.downstream.sni import Trial
from portero_py.proxy.upstream.tls import UpstreamTls
from portero_py.run.sockets import Listening
from portero_py.run.tuning import Shares

if TYPE_CHECKING:
    from portero_py.control.acme.renewals import Acme
#: Seconds that requests of the API have for their end when a successor waits; then for being cut off.
HAND_OVER_SECONDS: Final = 2.0
#: Seconds that a connection then has for its first request: whoever was let in is not turned away.
SILENCE_SECONDS: Final = 0.5
LOOK_SECONDS: Final = 0.01
CUT_OFF_SECONDS: Final = 0.1

_log = logging.getLogger(__name__)


def load_features(config: Config) -> None:
    """Import what only those need who use it: whoever forks calls it before."""
    if config.acme.enabled:
        importlib.import_module("portero_py.control.acme.renewals")


class ControlPlane:
    """Everything but the traffic. The caller closes the sockets of `listening`.

    `https_port` is where plain HTTP redirects to, `shares` how many connections it may have. `providers`
    grant leases beside the API and the configuration, `kept` is where they outlive this process. `refresh`,
    `restarts` and `reloads` are for the metrics. `ask` is called when something of `seen`, the files that
    `config` was read from, is another by now: it has somebody read it again, and call `reconfigure`.
    Raises ConfigError for what it cannot work with.
    """

    def __init__(
        self,
        config: Config,
        listening: Listening,
        https_port: int,
        feed: Feed,
        shares: Shares,
        *,
        providers: Sequence[Provider] = (),
        kept: KeptLeases | None = None,
        refresh: Callable[[], Awaitable[None]] | None = None,
        restarts: Callable[[], Mapping[str, int]] | None = None,
        reloads: Callable[[], Reloads] | None = None,
        ask: Callable[[], None] | None = None,
        seen: Seen | None = None,
    ) -> None:
        self._config = config
        self._listening = listening
        self._https_port = https_port
        self._feed = feed
        self._shares = shares
        self._runners: list[tuple[web.BaseRunner, Door]] = []
        self._watch: FileWatch | None = None
        if ask is not None and seen is not None:
            self._watch = FileWatch(ask, seen)
        self._kept = kept
        self._is_prepared = False
        registry = Registry(config.proxy.default_service)
        # Before the first table: whoever takes another's place serves by the policies at once.
        registry.configure(
            policies_of(config.services),
            Routes(config.routes),
            time.monotonic(),
            config.proxy.default_service,
        )
        self._static = StaticBackends(config.services)
        self._metrics = Metrics(
            registry,
            feed.counters,
            refresh=refresh,
            restarts=restarts,
            subscribers=lambda: feed.subscribers,
            reloads=reloads,
        )
        self._leases = Leases(registry, feed, clock=time.monotonic, count_fault=self._metrics.fault)
        self._probes = Probes(
            self._leases,
            config.health,
            Asker(lambda: UpstreamTls(config.proxy), "https" if config.tls.enabled else "http"),
            clock=time.monotonic,
            count=self._metrics.probe,
            count_fault=self._metrics.fault,
            most=shares.probes,
        )
        feed.on_evidence = self._probes.suspect
        self._tasks = Tasks(self._metrics.fault)
        self._providers: list[Provider] = [self._static, *providers]
        feed.count_fault = self._metrics.fault
        self._store: CertificateStore | None = None
        self._acme: Acme | None = None
        if config.tls.enabled:
            store = self._store = CertificateStore(
                config.tls.cert_dir,
                self._publish_certificates,
                trial=Trial(config.tls),
                count=self._metrics.certificate_reload,
            )
            if config.acme.enabled:
                from portero_py.control.acme.challenges import at_usual_port
                from portero_py.control.acme.renewals import Acme  # for those who use it

                acme = self._acme = Acme(
                    config.acme,
                    config.state_dir,
                    config.tls.cert_dir,
                    publish=feed.publish_challenges,
                    table=lambda: store.table,
                    count=self._metrics.acme_attempt,
                    has_service=self._leases.has_backend,
                    has_plain_http=bool(listening.plain_http),
                    at_usual_port=at_usual_port(config),
                    count_fault=self._metrics.fault,
                )
                self._leases.subscribe(
                    lambda change: None if change.is_end else acme.registered(change.lease.service)
                )
        self._api = RegistrationApi(
            config.registration,
            self._leases,
            self._metrics,
            clock=time.monotonic,
            wall_clock=time.time,
            faults=self._faults,
            max_connections=shares.registration,
            error_at=self._probes.error_at,
        )
        self._has_leases = False  # those of the last run, if there are any
        self._snapshot: Snapshot | None = None
        if config.state_dir:
            self._snapshot = Snapshot(config.state_dir, clock=time.monotonic, wall_clock=time.time)

    @property
    def state(self) -> State:
        """What /readyz says."""
        return self._api.state

    @state.setter
    def state(self, state: State) -> None:
        self._api.state = state

    async def prepare(self) -> None:
        """Before `load` or `take_over`, while another one still runs: find out whether they will work.

        Raises ConfigError. Nothing outside of this process is changed.
        """
        if self._store is not None:
            await self._store.load()
        self._is_prepared = True

    async def load(self, certificates: Former | None = None) -> None:
        """Publish the certificates, and the leases that outlived the last run. Raises ConfigError.

        `certificates` gives what the workers present already, when another process was here before. Then
        nothing is raised: they go on presenting that.
        """
        await self._load_certificates(certificates)
        if self._snapshot is not None:
            await self._snapshot.claim(self._name)
            try:
                services = await asyncio.to_thread(self._snapshot.load)
            except BadSnapshot as error:
                _log.error("starting without the leases of the last run: %s", error)
            else:
                restored = self._leases.restore(services, 0, self._sources)
                if restored:
                    _log.info("restored %d leases of the last run", restored)
        await self._begin()

    async def take_over(self, table: RoutingTable, certificates: Former | None) -> None:
        """In place of `load`: go on where a control process stopped whose last table was `table`.

        `certificates` gives what the workers present, if they are the same as before.
        """
        await self._load_certificates(certificates)
        restored = self._leases.restore(table.services.values(), table.version, self._sources)
        _log.info("took over %d leases", restored)
        if self._snapshot is not None:
            await self._snapshot.claim(self._name)
        await self._begin()

    async def adopt(self, table: RoutingTable) -> None:
        """A worker has reported late, and this is what it knew: take over what is missing here."""
        adopted = await self._leases.adopt(table, self._sources)
        if adopted:
            _log.warning("took over %d leases from a worker that reported late", adopted)
            self._probes.look()

    async def serve(self) -> None:
        """Open the ports, and begin to follow certificates and to save leases."""
        if self._store is not None:
            self.own(self._store.run, "certificates")
        if self._snapshot is not None:
            snapshot = self._snapshot
            self.own(lambda: snapshot.run(lambda: self._leases.table), "snapshot")
        if self._kept is not None:
            kept = self._kept
            self.own(lambda: kept.run(lambda: (self._leases.table, self._feed.departed)), "kept leases")
        await self._open(self._api.runner(), self._listening.registration, self._api.door)
        if self._listening.plain_http:
            challenges = self._acme.http_challenge if self._acme else no_challenges
            plain_http = PlainHttp(
                self._https_port,
                self._config.plain_http.acme_upstream,
                challenges,
                max_connections=self._shares.plain_http,
            )
            await self._open(plain_http.runner(), self._listening.plain_http, plain_http.door)
        if self._acme is not None:
            self.own(self._acme.run, "acme")
        if self._watch is not None:
            self.own(self._watch.run, "configuration")

    async def reconfigure(self, config: Config, seen: Seen | None = None) -> None:
        """Go by what is live in `config` from now on: in force when this returns.

        `seen` are the files of that reading, or of one that failed and left `config` as it was.
        """
        former, self._config = self._config, config
        if self._watch is not None and seen is not None:
            self._watch.follow(seen)
        if former.health != config.health:
            self._probes.reconfigure(config.health)
        default_service = config.proxy.default_service
        if (former.services, former.routes, former.proxy.default_service) != (
            config.services,
            config.routes,
            default_service,
        ):
            await self._static.configure(
                config.services, self._leases, Routes(config.routes), default_service
            )
            self._probes.look()

    async def rescan(self) -> None:
        """Look at the certificates now."""
        if self._acme is not None:
            self._acme.look()
        if self._store is not None:
            await self._store.rescan()

    def own(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        """Keep something running until `close`; /readyz says when it does not."""
        self._tasks.own(work, name)

    def count_fault(self, where: str) -> None:
        """A fault of portero's own that it survived."""
        self._metrics.fault(where)

    async def lend(self) -> None:
        """Save the leases: another portero may take this one's place before it has ended."""
        if self._snapshot is not None and self._has_leases:
            await self._save(self._snapshot.lend)

    async def close(self, *, hand_over: bool = False) -> None:
        """Close the ports, end what runs, save the leases.

        With `hand_over` they are left for a successor, within seconds: what a client of the API still waits
        for then is cut off.
        """
        for runner, door in reversed(self._runners):
            await (_end_soon(runner, door) if hand_over else runner.cleanup())
        self._runners.clear()
        if not hand_over:
            self._listening.close_control()  # nobody else accepts there
        await self._tasks.close()
        await self._leases.close()
        if self._acme is not None:
            self._acme.close()
        if not self._has_leases:
            return
        if self._kept is not None and hand_over:
            self._kept.save(self._leases.table, self._feed.departed)
            self._kept.release()
        if self._snapshot is not None:
            await self._save(self._snapshot.close)

    # Private

    def _faults(self) -> set[str]:
        """What /readyz names."""
        return {
            *self._leases.faults,
            *self._tasks.faults,
            *(() if self._acme is None else self._acme.faults),
        }

    @property
    def _name(self) -> str:
        """What tells this instance from others with the same state directory, also after a restart."""
        host = socket.gethostname().encode("ascii", "backslashreplace").decode()
        return f"{self._config.registration.listen} {host}"

    @property
    def _sources(self) -> set[str]:
        """Whose leases somebody keeps true."""
        return {API, *(provider.source for provider in self._providers)}

    async def _load_certificates(self, former: Former | None) -> None:
        """Raises ConfigError when nobody has any `former` ones to go on with."""
        if self._acme is not None:
            await self._acme.recover()
        if self._store is not None and self._is_prepared:
            await self._store.rescan(former)
        elif self._store is not None:
            try:
                await self._store.load(former)
            except ConfigError as error:
                if former is None:
                    raise
                _log.error("%s", error)

    async def _begin(self) -> None:
        """From now on the leases here are what counts: also what is on disk."""
        self._has_leases = True
        self._static.begin(self._leases)
        await self._static.grant(self._leases)
        if self._snapshot is not None:
            self._feed.on_table.append(partial(self._tell_snapshot, self._snapshot))
        if self._kept is not None:
            self._feed.on_table.append(partial(self._tell_kept, self._kept))
        await self._leases.start()
        self.own(self._probes.run, "probes")
        for provider in self._providers:
            self.own(partial(provider.run, self._leases), provider.source)

    def _tell_snapshot(self, snapshot: Snapshot) -> None:
        snapshot.changed(self._leases.generation)

    def _tell_kept(self, kept: KeptLeases) -> None:
        kept.changed(self._leases.table, self._leases.generation)

    async def _save(self, save: Callable[[RoutingTable], None]) -> None:
        try:
            await asyncio.to_thread(save, self._leases.table)
        except BadSnapshot as error:
            _log.error("leases will not survive a restart: %s", error)

    async def _open(self, runner: web.BaseRunner, sockets: list[socket.socket], door: Door) -> None:
        await runner.setup()
        self._runners.append((runner, door))
        for sock in sockets:
            await OpenSite(runner, sock.dup(), door).start()  # who closes the site leaves the queue open

    async def _publish_certificates(self, certificates: CertificateTable) -> None:
        await self._feed.publish_certificates(certificates)
        self._metrics.certificates({each.name: each.not_after for each in certificates.certificates})


# Private


async def _end_soon(runner: web.BaseRunner, door: Door) -> None:
    """Close, and let requests finish for as long as a successor may have to wait for that."""
    server = runner.server
    for site in list(runner.sites):
        await site.stop()
    looks = int(SILENCE_SECONDS / LOOK_SECONDS)
    while looks and door.has_silent:
        looks -= 1
        await asyncio.sleep(LOOK_SECONDS)
    try:
        async with asyncio.timeout(HAND_OVER_SECONDS):
            await runner.cleanup()
    except TimeoutError:
        _log.warning("some requests of the API were cut off by an upgrade")
        if isinstance(server, web.Server):
            await server.shutdown(CUT_OFF_SECONDS)
