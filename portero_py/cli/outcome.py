"""How a command ends, as a shell sees it: an exit status, and one line on stderr when something is wrong.

Exit status: 0 when all went well, 2 for a flag, file or port that cannot be used, 1 for anything else, 130
when it was interrupted.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from portero_py.errors import ConfigError, PorteroError

if TYPE_CHECKING:
    from collections.abc import Callable


def status_of(work: Callable[[], int]) -> int:
    """Do `work`, and return the exit status."""
    try:
        return work()
    except ConfigError as error:
        return complain(str(error), 2)
    except PorteroError as error:
        return complain(str(error), 1)
    except KeyboardInterrupt:
        return 130


def complain(message: str, status: int) -> int:
    """Say on stderr what is wrong, in one line; returns `status`."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(message.split()))
    print(f"portero-py: {line}", file=sys.stderr, flush=True)  # noqa: T201 - this is a command's own word
    return status
