"""Both planes in one process: what runs without `--workers`.

The order of a start: certificates and leases are read and published, the data plane accepts, the registration
API and plain HTTP follow; /readyz says 200 and systemd hears READY=1.

Signals (`signals`: a stop goes before reloads, and abandons a start or a reload that is going on)
- SIGTERM, SIGINT: /readyz says 503, the listeners close, the exchanges in flight have `timeouts.drain`
  seconds, then the control plane closes (it stays until then: backends renew their leases to the end). Exit
  status 0. A second signal ends everything at once, with 1.
- SIGHUP: certificates are scanned again, and the configuration is read again (`live_config`). Whatever may go
  wrong with that, the proxy goes on as it was.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

from portero_py import __version__
from portero_py.config.model import Config
from portero_py.control.api.state import State
from portero_py.feed.feed import Feed
from portero_py.proxy.worker import Worker
from portero_py.run import held_signals, tuning
from portero_py.run.control_plane import ControlPlane
from portero_py.run.live_configuration import read_again
from portero_py.run.signals import Signals
from portero_py.run.slack import Slack
from portero_py.run.sockets import Listening, address_of
from portero_py.run.systemd import Notifier

_log = logging.getLogger(__name__)


class SingleProcess:
    """Both planes on one loop. `read` reads the configuration again; the caller closes `listening`."""

    def __init__(
        self, config: Config, read: Callable[[], Config], listening: Listening, notifier: Notifier
    ) -> None:
        self._config = config
        self._read = read
        self._listening = listening
        self._notifier = notifier
        self._signals = Signals()

    async def serve(self) -> int:
        """Start, heed signals, stop; the exit status. Raises `ConfigError` when the start fails."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(tuning.Threads(thread_name_prefix="portero"))
        self._signals.listen_to(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        config, listening = self._config, self._listening
        feed = Feed()
        shares = tuning.shares(tuning.open_files(), control=True, traffic=True)
        self._worker = Worker(config, loop, most=shares.clients)
        feed.subscribe(self._worker)
        self._worker.tell(feed.found)
        self._control = ControlPlane(config, listening, address_of(listening.proxy[0]).port, feed, shares)
        held_signals.let_go()
        try:
            if await self._signals.unless_stopped(self._start()):
                while await self._signals.next() is signal.SIGHUP:
                    await self._signals.unless_stopped(self._reload())
            else:
                await self._signals.stop()
            return await self._stop()
        finally:
            held_signals.hold()  # what comes late was meant for a process that is ending

    # Private

    async def _start(self) -> None:
        config, listening, notifier = self._config, self._listening, self._notifier
        await self._control.load()
        await self._worker.start(listening.proxy, tls=config.tls.enabled)
        await self._control.serve()
        self._control.own(Slack().run, "memory")
        if notifier.watchdog_seconds:
            self._control.own(lambda: self._tell_alive(notifier.watchdog_seconds / 2), "watchdog")
        self._control.state = State.READY
        notifier.ready(listening.summary())
        _log.info("portero-py %s: %s", __version__, listening.summary())

    async def _tell_alive(self, interval: float) -> None:
        while True:
            self._notifier.alive()
            await asyncio.sleep(interval)

    async def _reload(self) -> None:
        self._notifier.reloading()
        try:
            found = await asyncio.to_thread(read_again, self._config, self._read)
            if found is not None:
                if found is not self._config:
                    self._worker.reconfigure(found)
                    self._control.reconfigure(found)
                    self._config = found
                _log.info("configuration read again")
            await self._control.rescan()
        except Exception:
            _log.exception("the reload failed: what it had not changed yet stays")
            self._control.count_fault("reload")
        self._notifier.ready(self._listening.summary())

    async def _stop(self) -> int:
        self._control.state = State.DRAINING
        self._notifier.stopping()
        _log.info("stopping: exchanges in flight have %g s", self._config.timeouts.drain)
        ending = asyncio.create_task(self._end(), name="end")
        hurry = asyncio.create_task(self._signals.stop(), name="second signal")
        await asyncio.wait({ending, hurry}, return_when=asyncio.FIRST_COMPLETED)
        if not ending.done():
            _log.warning("told to stop again: ending at once")
            ending.cancel()
            return 1
        hurry.cancel()
        return ending.result()

    async def _end(self) -> int:
        """The data plane first, then the control plane; the exit status."""
        timeouts, status = self._config.timeouts, 0
        try:
            await self._worker.drain(timeouts.drain)
        except Exception:
            _log.exception("the drain failed")
            status = 1
        try:
            async with asyncio.timeout(timeouts.shutdown):
                await self._control.close()
        except TimeoutError:
            _log.warning("the control plane did not close within %g s", timeouts.shutdown)
        _log.info("stopped")
        return status
