"""The composition root: one process that binds, serves both planes, heeds signals and ends in order.

The order of a start
 1. configuration and preflight: everything that can be wrong is said before anything is opened;
 2. the process (memory, open files), then all sockets: nothing serves before every port is ours;
 3. the event loop: certificates are read and published, the data plane accepts, the registration API and
    plain HTTP follow; /readyz says 200 and systemd hears READY=1.

Signals, one after the other through one queue
- SIGTERM, SIGINT: /readyz says 503, the listeners close, the exchanges in flight have `timeouts.drain`
  seconds, then the control plane closes (it stays until then: backends renew their leases to the end). Exit
  status 0. A second signal ends everything at once, with 1.
- SIGHUP: certificates are scanned again, and the configuration is read again. Timeouts, limits and the log
  change at once; what else changed is named in the log as waiting for a restart. A configuration that cannot
  be used changes nothing and says why.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, Final

import uvloop
from aiohttp import web

from portero_py import __version__, config_sources, logs, preflight, process
from portero_py.config import Config
from portero_py.config_sources import Environ, Flags
from portero_py.control.certificates import CertificateStore
from portero_py.control.feed import Feed
from portero_py.control.metrics import Metrics
from portero_py.control.plain_http import PlainHttp
from portero_py.control.registration_api import RegistrationApi, State
from portero_py.core.certificates import CertificateTable
from portero_py.core.registry import Registry
from portero_py.errors import ConfigError
from portero_py.proxy.worker import Worker
from portero_py.sockets import Listening, address_of, open_sockets
from portero_py.systemd import Notifier, inherited_sockets

#: The groups of `Config` that change while portero runs.
LIVE: Final = frozenset({"timeouts", "limits", "log"})

_log = logging.getLogger(__name__)


def run(flags: Flags, environ: Environ) -> int:
    """Run the proxy until it is told to stop; returns the exit status.

    Raises `ConfigError` for whatever keeps it from starting.
    """
    read = partial(config_sources.load, flags, environ)
    config = read()
    logs.set_up(config.log.level, environ)
    for warning in preflight.require(config):
        _log.warning("%s", warning)
    process.tune_malloc()
    process.raise_open_files()
    # Until the loop heeds it, a reload that comes early must not end the process.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    listening = open_sockets(config, inherited_sockets(environ, os.getpid()))
    try:
        return uvloop.run(Supervisor(config, read, listening, Notifier(environ)).serve())
    finally:
        listening.close()


def waiting_for_restart(running: Config, read: Config) -> list[str]:
    """The keys in which a configuration that was read again differs, and that cannot change live."""
    waiting = []
    for group in fields(Config):
        old, new = getattr(running, group.name), getattr(read, group.name)
        if group.name in LIVE or old == new:
            continue
        inner = fields(old) if is_dataclass(old) else ()
        changed = [each.name for each in inner if getattr(old, each.name) != getattr(new, each.name)]
        waiting += [f"{group.name}.{name}" for name in changed] or [group.name]
    return waiting


class Supervisor:
    """Both planes of one process. `read` reads the configuration again; the caller closes `listening`."""

    def __init__(
        self, config: Config, read: Callable[[], Config], listening: Listening, notifier: Notifier
    ) -> None:
        self._config = config
        self._read = read
        self._listening = listening
        self._notifier = notifier
        self._signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self._runners: list[web.BaseRunner] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._feed = Feed()
        self._store: CertificateStore | None = None

    async def serve(self) -> int:
        """Start, heed signals, stop; the exit status. Raises `ConfigError` when the start fails."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._signals.put_nowait, number)
        await self._start(loop)
        while await self._signals.get() == signal.SIGHUP:
            await self._reload()
        return await self._stop()

    # Private: start

    async def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        config, listening = self._config, self._listening
        self._worker = Worker(config, loop)
        feed = self._feed
        feed.subscribe(self._worker)
        registry = Registry(config.proxy.default_service)
        self._metrics = Metrics(registry, feed.counters)
        self._api = RegistrationApi(
            config.registration, registry, feed, self._metrics, clock=time.monotonic, wall_clock=time.time
        )
        if config.tls.enabled:
            self._store = CertificateStore(
                config.tls.cert_dir, self._publish_certificates, count=self._metrics.certificate_reload
            )
            await self._store.load()
            self._own(self._store.run(), "certificates")
        await self._api.start()
        await self._worker.start(listening.proxy, tls=config.tls.enabled)
        await self._serve_control(self._api.runner(), listening.registration)
        if listening.plain_http:
            https_port = address_of(listening.proxy[0]).port
            plain_http = PlainHttp(https_port, config.plain_http.acme_upstream)
            await self._serve_control(plain_http.runner(), listening.plain_http)
        if self._notifier.watchdog_seconds:
            self._own(self._tell_alive(self._notifier.watchdog_seconds / 2), "watchdog")
        self._api.state = State.READY
        self._notifier.ready(self._summary())
        _log.info("portero-py %s: %s", __version__, self._summary())

    async def _serve_control(self, runner: web.BaseRunner, sockets: list[socket.socket]) -> None:
        await runner.setup()
        self._runners.append(runner)
        for sock in sockets:
            await web.SockSite(runner, sock).start()

    def _own(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_on_end)
        self._tasks.append(task)

    def _summary(self) -> str:
        def said(sockets: list[socket.socket]) -> str:
            return ", ".join(str(address_of(sock)) for sock in sockets)

        listening = self._listening
        scheme = "https" if self._config.tls.enabled else "http"
        parts = [f"{scheme} on {said(listening.proxy)}", f"registration on {said(listening.registration)}"]
        if listening.plain_http:
            parts.append(f"http on {said(listening.plain_http)}")
        return "; ".join(parts)

    async def _publish_certificates(self, certificates: CertificateTable) -> None:
        await self._feed.publish_certificates(certificates)
        self._metrics.certificates({each.name: each.not_after for each in certificates.certificates})

    async def _tell_alive(self, interval: float) -> None:
        while True:
            self._notifier.alive()
            await asyncio.sleep(interval)

    # Private: reload

    async def _reload(self) -> None:
        self._notifier.reloading()
        try:
            read = await asyncio.to_thread(self._read)
            preflight.require(read)
        except ConfigError as error:
            _log.error("the configuration stays as it was: %s", error)
        else:
            self._take(read)
        if self._store is not None:
            await self._store.rescan()
        self._notifier.ready(self._summary())

    def _take(self, read: Config) -> None:
        waiting = waiting_for_restart(self._config, read)
        if waiting:
            _log.warning("changed, but waiting for a restart: %s", ", ".join(waiting))
        live = {name: getattr(read, name) for name in LIVE}
        if any(getattr(self._config, name) != value for name, value in live.items()):
            self._config = replace(self._config, **live)
            logs.set_level(self._config.log.level)
            self._worker.reconfigure(self._config)
        _log.info("configuration read again")

    # Private: stop

    async def _stop(self) -> int:
        timeouts = self._config.timeouts
        self._api.state = State.DRAINING
        self._notifier.stopping()
        _log.info("stopping: exchanges in flight have %g s", timeouts.drain)
        draining = asyncio.create_task(self._worker.drain(timeouts.drain), name="drain")
        hurry = asyncio.create_task(self._told_again(), name="second signal")
        await asyncio.wait({draining, hurry}, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            _log.warning("told to stop again: ending at once")
            draining.cancel()
            return 1
        hurry.cancel()
        fault = draining.exception()
        if fault is not None:
            _log.error("the drain failed", exc_info=fault)
        try:
            async with asyncio.timeout(timeouts.shutdown):
                await self._close_control()
        except TimeoutError:
            _log.warning("the control plane did not close within %g s", timeouts.shutdown)
        _log.info("stopped")
        return 0 if fault is None else 1

    async def _told_again(self) -> None:
        while await self._signals.get() == signal.SIGHUP:
            pass

    async def _close_control(self) -> None:
        for runner in reversed(self._runners):
            await runner.cleanup()
        await self._api.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _on_end(task: asyncio.Task[None]) -> None:
    # What it did is over, but traffic goes on: certificates then change with SIGHUP only.
    if not task.cancelled() and task.exception() is not None:
        _log.error("%s ended unexpectedly", task.get_name(), exc_info=task.exception())
