"""The operator's log: one line a record, on stderr.

Under systemd's journal (stderr is the very stream that `$JOURNAL_STREAM` names, systemd.exec(5)) a line
begins with `<N>`, the priority of sd-daemon(3), and the journal adds the time. Elsewhere it begins with the
time in UTC. Control characters are escaped: what a client sent cannot forge a line.

The access log is not here: it belongs to the data plane.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Final

_PRIORITIES: Final = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}

_CONTROLS: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}


class LineFormatter(logging.Formatter):
    """`time LEVEL name: message`, or `<N>name: message` for the journal; a traceback follows."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        name = record.name.rpartition(".")[2] if record.name.startswith("portero_py.") else record.name
        message = f"{name}: {record.getMessage()}".translate(_CONTROLS)
        if self._journal:
            mark = f"<{_PRIORITIES.get(record.levelno, 6)}>"
            line = f"{mark}{message}"
        else:
            mark = ""
            seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            line = f"{seconds}.{int(record.msecs):03d}Z {record.levelname:<7} {message}"
        if record.exc_info:
            # A bug: the one case in which more than a line is of use.
            traceback = self.formatException(record.exc_info)
            line += "".join(f"\n{mark}  {part}" for part in traceback.splitlines())
        return line


def set_up(level: str, environ: Mapping[str, str]) -> None:
    """Send this process's log to stderr, from `level` on (a word of `config.Log.level`)."""
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setFormatter(LineFormatter(journal=_stderr_is_journal(environ)))
    root = logging.getLogger()
    for former in root.handlers[:]:
        root.removeHandler(former)
    root.addHandler(to_stderr)
    # Libraries speak up when something is wrong; portero itself says what it does.
    root.setLevel(logging.WARNING)
    set_level(level)


def set_level(level: str) -> None:
    """Change how much portero says, also while it runs."""
    logging.getLogger("portero_py").setLevel(level.upper())


# Private


def _stderr_is_journal(environ: Mapping[str, str]) -> bool:
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
