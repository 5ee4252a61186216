"""What a generation, one start of the program, knows of the main process that started it.

The main process (`main_process`) holds what must outlive every generation: the listening sockets, the
leases (`control/kept_leases`), the socket where workers find control. A generation is given them, and gives
back what the next one is to have.

The first generation is forked, serves as soon as it can, and its failure is that of the start. Every other
one is a new run of the program: it prepares everything, says so, and serves when it is told to.
"""

from __future__ import annotations

import json
import os
import select
import socket
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Final

from portero_py.run.channel import Channel, Message, Word
from portero_py.run.systemd import inherited_sockets

if TYPE_CHECKING:
    from portero_py.config.model import Config
    from portero_py.run.sockets import Inherited, Listening

#: The variable that names the channel and the descriptors which a generation inherits.
VARIABLE: Final = "PORTERO_GENERATION"

#: The names of the listening sockets.
NAMES: Final = ("https", "register", "http")
#: Added to the name of a socket that systemd holds too.
KEPT: Final = "+"

#: The names of what else is held.
LEASES: Final = "leases"
FEED: Final = "feed"
LOG: Final = "log"
LIMITS: Final = "limits"
TICKETS: Final = "tickets"

#: Seconds that a generation may need for its end beyond what is configured.
LAST_STEPS: Final = 15.0


class Generation:
    """The place of this process under its main process. `held` are descriptors, by name, in order."""

    def __init__(
        self,
        channel: Channel,
        main_pid: int,
        held: list[tuple[str, int]] | None = None,
        *,
        first: bool = True,
    ) -> None:
        self.channel = channel
        self.main_pid = main_pid
        self.is_first = first
        self._held = held or []

    @classmethod
    def inherited(cls, environ: MutableMapping[str, str]) -> Generation | None:
        """The place that a main process gave to this process, which then forgets the variable."""
        given = environ.pop(VARIABLE, None)
        if given is None:
            return None
        content = json.loads(given)
        held = [(str(name), int(descriptor)) for name, descriptor in content["held"]]
        for _, descriptor in held:
            os.set_inheritable(descriptor, False)
        return cls(Channel.of(content["channel"]), content["main"], held, first=False)

    def take(self, name: str) -> list[int]:
        """The held descriptors of that name; the caller owns them."""
        found = [descriptor for held, descriptor in self._held if held == name]
        self._held = [each for each in self._held if each[0] != name]
        return found

    def take_sockets(self, name: str) -> list[socket.socket]:
        """The same as sockets."""
        sockets = [socket.socket(fileno=descriptor) for descriptor in self.take(name)]
        for sock in sockets:
            sock.setblocking(False)
        return sockets

    def drop_rest(self) -> None:
        """Close what nobody took: of another version, or not wanted any more."""
        for _, descriptor in self._held:
            os.close(descriptor)
        self._held = []

    def inherited_sockets(self, environ: Mapping[str, str]) -> tuple[Inherited, Inherited]:
        """The listening sockets that systemd opened, and those of the former generation, by name.

        Raises `ConfigError` for what systemd should not have passed.
        """
        if self.is_first:
            return inherited_sockets(environ, self.main_pid), {}
        kept = {name: self.take_sockets(f"{name}{KEPT}") for name in NAMES}
        return kept, {name: self.take_sockets(name) for name in NAMES}

    def tickets(self) -> bytes:
        """The keys of TLS sessions that the former generation wrote down; they are wiped."""
        found = b""
        for descriptor in self.take(TICKETS):
            found = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
            os.pwrite(descriptor, bytes(len(found)), 0)
            os.close(descriptor)
        return found

    # Said

    def prepared(self) -> None:
        self.channel.say(Word.PREPARED)

    def offered(self, tickets: bytes) -> None:
        """The next generation may be started; `tickets` are the keys of TLS sessions: they touch no disk."""
        descriptor = os.memfd_create("portero-tickets", os.MFD_CLOEXEC)
        try:
            os.pwrite(descriptor, tickets, 0)
            self.channel.say(Word.OFFERED, [descriptor])
        finally:
            os.close(descriptor)

    def yielded(self) -> None:
        self.channel.say(Word.YIELDED)

    def ready(self, config: Config, listening: Listening, *others: tuple[str, int]) -> None:
        """This generation serves; the next one is to have these sockets and `others`, named descriptors."""
        for name, sock in listening.named():
            self._hold(f"{name}{KEPT}" if name in listening.kept else name, sock.fileno())
        for name, descriptor in others:
            self._hold(name, descriptor)
        self.channel.say(Word.READY, patience=_patience(config))

    def configured(self, config: Config) -> None:
        """The configuration was read again."""
        self.channel.say(Word.PATIENCE, seconds=_patience(config))

    def notify(self, text: str) -> None:
        """Tell systemd, who listens to the main process only."""
        self.channel.say(Word.NOTIFY, text=text)

    # Heard

    def heard(self) -> list[Message]:
        """What the main process has said since the last call."""
        return self.channel.heard()

    @property
    def is_orphaned(self) -> bool:
        """Whether the main process is gone."""
        return self.channel.is_over

    @property
    def has_main_process(self) -> bool:
        """Whether it lives, for a process that has no channel to it."""
        try:
            descriptor = os.pidfd_open(self.main_pid)
        except (OSError, AttributeError):  # it is gone, or this system cannot tell
            return False
        try:
            end = select.poll()
            end.register(descriptor, select.POLLIN)
            return not end.poll(0)
        finally:
            os.close(descriptor)

    # Private

    def _hold(self, name: str, descriptor: int) -> None:
        self.channel.say(Word.HOLD, [descriptor], name=name)


# Private


def _patience(config: Config) -> float:
    return config.timeouts.drain + config.timeouts.shutdown + LAST_STEPS
