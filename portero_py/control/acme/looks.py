"""A look at a certificate: what the disk knows about it, and what there is to do. It blocks.

What is wrong with one keeps nobody from looking at the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from portero_py.control.acme.files import AcmeFiles
from portero_py.control.acme.folder import CertificateFolder, Entries
from portero_py.control.acme.pairs import held
from portero_py.core.acme.names import Group
from portero_py.core.acme.progress import Progress
from portero_py.core.acme.schedule import Decision, Turn, decide, turn
from portero_py.errors import AcmeError

if TYPE_CHECKING:
    from portero_py.core.certificates import Certificate

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Look:
    """One certificate at one look: what is known about it, and what to do."""

    names: Group
    progress: Progress
    kept: Certificate | None
    is_served: bool
    decision: Decision
    turn: Turn


class Looks:
    """Looks at what `files` and `folder` hold. `unkept` is progress that the disk did not take."""

    def __init__(
        self,
        files: AcmeFiles,
        folder: CertificateFolder,
        unkept: Mapping[str, Progress],
        clock: Callable[[], float],
    ) -> None:
        self._files = files
        self._folder = folder
        self._unkept = unkept
        self._clock = clock

    def at_all(self, groups: list[Group]) -> tuple[list[Look], list[AcmeError]]:
        """Those that could be looked at, and why the others could not."""
        entries = self._folder.entries()
        looks, complaints = [], []
        for names in groups:
            try:
                looks.append(self.at(names, entries))
            except AcmeError as error:
                complaints.append(error)
            except Exception as error:  # a bug: a complaint as any other, the others are looked at
                _log.debug("a look at %s failed", names[0], exc_info=error)
                complaints.append(AcmeError(f"{names[0]} is passed over, a fault in portero: {error!r}"))
        return looks, complaints

    def at(self, names: Group, entries: Entries | None = None) -> Look:
        """Look at one. Raises AcmeError."""
        name = names[0]
        progress = self._unkept.get(name) or self._files.progress(name)
        kept = self._files.pair(name)
        known = held(kept) if kept else None
        served, is_ours = self._folder.served(name, entries)
        adoptable = None
        if served is not None and is_ours and (kept is None or kept.fingerprint != served.fingerprint):
            adoptable = self._folder.own_pair(name)
        decision = decide(
            names,
            progress,
            known,
            served,
            self._clock(),
            is_ours=is_ours,
            adoptable=held(adoptable) if adoptable else None,
        )
        return Look(names, progress, kept, served is not None, decision, turn(decision.act, progress, known))
