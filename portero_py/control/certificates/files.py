"""A certificate directory, read: which pairs are in it, which can be served, and why the others cannot.

The layouts
  <dir>/<name>/fullchain.pem or cert.pem, and privkey.pem   (fullchain.pem wins: certbot's cert.pem is a leaf)
  <dir>/<name>.pem                                          (HAProxy's: chain and key in one file)
with "*.example.com" or "_wildcard.example.com" as the name of a wildcard. Symbolic links are followed:
certbot's `live/` and Kubernetes' `..data` are made of them. Names with a leading dot and other files are
ignored.

The rules
- Each entry stands alone: whatever is wrong with one leaves the others as they are.
- A pair is tried with OpenSSL before it is taken, where that could tell something new: when it is of an
  uncommon kind, or takes the place of one that is good. (A trial costs 1.5 ms, parsing a tenth of that: ten
  thousand ordinary pairs at the start are not tried.)
- What was good stays until something good replaces it. Only an entry that is gone in two scans running
  loses its certificate: `mv` of a folder in place of another is not a removal.
- An entry that could not be read (no descriptors left, say) is read again at each scan.
- Files are read again when their inode, size or times changed, or when they changed so shortly before the
  last look that the next change could bear the same times.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from portero_py.control.regular_files import UnfitFileError, read_regular
from portero_py.core.certificate_pairs import is_ordinary, parse_pair
from portero_py.core.certificates import Certificate, folder_name
from portero_py.errors import BadCertificate

#: Larger than any real pair: a bigger file is not one.
MAX_FILE_BYTES: Final = 1 << 20
#: Times of files have a grain: a tick of the kernel, or two seconds on some file systems.
_GRAIN_SECONDS: Final = 2.5
_CHAINS: Final = ("fullchain.pem", "cert.pem")
_KEY: Final = "privkey.pem"
#: In the directory itself these are a misunderstanding, not a host name with ".pem" behind it.
_PARTS: Final = frozenset({"fullchain", "cert", "chain", "privkey"})

#: Tries a pair as the listener will use it. Raises BadCertificate.
Trial = Callable[[Certificate], None]

#: What tells one version of a file from the next; None: no such file.
FileState = tuple[int, int, int, int, int, int] | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One folder or combined file, at one scan.

    name         what it stands for, normalised; "" when it is no host name
    origin       its path
    state        of its files; equal states mean equal contents
    certificate  what is served for it: from these files or, when they are bad, from the last good ones
    problem      why these files cannot be served, in one line; "" when they can
    warnings     what will displease some clients; one line each
    """

    name: str
    origin: str
    state: tuple[FileState, ...]
    certificate: Certificate | None
    problem: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scan:
    """What one scan found, sorted by origin. `unsettled`: something may be half done; look again soon."""

    entries: tuple[Entry, ...]
    unsettled: bool = False

    @property
    def certificates(self) -> list[Certificate]:
        """The usable ones, one a name."""
        return [entry.certificate for entry in self.entries if entry.certificate is not None]


@dataclass(frozen=True, slots=True)
class _Known:
    entry: Entry
    settled: bool  # the next change of the files will show in their state
    missing: bool = False  # not seen in the last scan


class CertificateFiles:
    """The reader of one directory. It blocks, so it runs in a thread; one scan at a time.

    `trial` raises BadCertificate for a pair that cannot be served.
    """

    def __init__(
        self, directory: Path, clock: Callable[[], float] = time.time, trial: Trial | None = None
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._trial = trial
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}

    def scan(self) -> Scan:
        """Read what has changed. Raises OSError, and forgets nothing, when the directory cannot be read."""
        with self._lock:
            now = self._clock()
            known: dict[str, _Known] = {}
            unsettled = False
            for origin, is_folder in self._list():
                former = self._known.get(origin)
                fresh = _look(origin, is_folder, former, now, self._trial)
                if fresh is None:
                    continue
                known[origin] = fresh
                if fresh.entry.problem and (former is None or former.entry.state != fresh.entry.state):
                    unsettled = True
            for origin, former in self._known.items():
                if origin not in known and not former.missing and former.entry.certificate is not None:
                    known[origin] = replace(former, missing=True)
                    unsettled = True
            self._known = known
            entries = _one_a_name([known[origin].entry for origin in sorted(known)])
            return Scan(tuple(_with_complaints(entry, now) for entry in entries), unsettled)

    def adopt(self, certificates: Iterable[Certificate]) -> None:
        """Take these for the last good ones of entries that have none: another process had read them."""
        with self._lock:
            for certificate in certificates:
                known = self._known.get(certificate.origin)
                if known is not None and known.entry.certificate is None:
                    entry = replace(known.entry, certificate=certificate)
                    self._known[certificate.origin] = replace(known, entry=entry)

    # Private

    def _list(self) -> list[tuple[str, bool]]:
        """All paths that may hold a certificate, and whether each is a folder."""
        found = []
        with os.scandir(self._directory) as listing:
            for item in listing:
                if item.name.startswith("."):
                    continue
                if _is_folder(item):
                    found.append((item.path, True))
                elif item.name.endswith(".pem"):
                    found.append((item.path, False))
        return found


# Private


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        # A dangling link is what is left of a folder: to be complained about, not to be taken for a removal.
        return item.is_dir() or (item.is_symlink() and not item.is_file() and not item.name.endswith(".pem"))
    except OSError:
        return not item.name.endswith(".pem")


def _look(
    origin: str, is_folder: bool, former: _Known | None, now: float, trial: Trial | None
) -> _Known | None:
    """Read one entry, or find it unchanged. None: it is nothing to do with certificates."""
    path = Path(origin)
    raw_name = path.name if is_folder else path.stem
    name = folder_name(raw_name) or ""
    last_good = former.entry.certificate if former is not None else None
    state: tuple[FileState, ...] = ()
    settled = False
    try:
        chain, key, state = _locate(path) if is_folder else (path, path, (_state(path),))
        if is_folder and not any(state) and last_good is None and "." not in name:
            return None  # nothing in it, nothing ever was, and no name that somebody waits for
        settled = all(one is None or max(one[3], one[4]) / 1e9 < now - _GRAIN_SECONDS for one in state)
        if former is not None and former.settled and former.entry.state == state:
            return replace(former, missing=False)
        certificate = _parse(name, raw_name, chain, key, origin)
        if trial is not None and _wants_trial(certificate, last_good):
            trial(certificate)
    except FileNotFoundError:
        missing = f"there is no {' or '.join(_CHAINS)}" if not any(state[:2]) else f"there is no {_KEY}"
        problem = f"{missing} in it" if is_folder else "it is gone"
    except OSError as error:
        problem = f"it cannot be read: {error.strerror}"
        settled = False  # what is to blame may be elsewhere, and pass
    except BadCertificate as error:
        problem = str(error)
    else:
        return _Known(Entry(name, origin, state, certificate), settled)
    return _Known(Entry(name, origin, state, last_good, problem), settled)


def _wants_trial(certificate: Certificate, last_good: Certificate | None) -> bool:
    if last_good is not None:
        return not certificate.same_bytes(last_good)
    return not is_ordinary(certificate)


def _parse(name: str, raw_name: str, chain: Path, key: Path, origin: str) -> Certificate:
    if chain == key and raw_name in _PARTS:
        raise BadCertificate("it belongs into a folder that has the name of its host")
    if not name:
        raise BadCertificate(f'"{raw_name}" is not a host name')
    return parse_pair(name, _read(chain), _read(key), origin)


def _locate(folder: Path) -> tuple[Path, Path, tuple[FileState, ...]]:
    """Where the chain and the key of a folder are, and the state of all three files."""
    state = tuple(_state(folder / file) for file in (*_CHAINS, _KEY))
    return folder / (_CHAINS[0] if state[0] else _CHAINS[1]), folder / _KEY, state


def _state(path: Path) -> FileState:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_mode)


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, MAX_FILE_BYTES)
    except UnfitFileError as error:
        raise BadCertificate(f"{path.name} {error}") from error


def _one_a_name(entries: list[Entry]) -> list[Entry]:
    """Of several entries for one name the first serves (a folder before its ".pem"), the others say so."""
    server: dict[str, Entry] = {}
    result = []
    for entry in entries:
        if entry.certificate is not None:
            first = server.setdefault(entry.name, entry)
            if first is not entry:
                problem = entry.problem or f"{first.origin} serves this name already"
                entry = replace(entry, certificate=None, problem=problem)
        result.append(entry)
    return result


def _with_complaints(entry: Entry, now: float) -> Entry:
    if entry.certificate is None or entry.problem:
        return entry
    warnings = entry.certificate.complaints(now)
    key_state = entry.state[-1]
    if key_state is not None and key_state[5] & stat.S_IROTH:
        warnings.append("its private key can be read by every user of this machine")
    return replace(entry, warnings=tuple(warnings))
