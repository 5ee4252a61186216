"""The program's entry: the proxy is run with as little loaded as can be, everything else by `main`."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

from portero_py.cli import outcome, plain_flags
from portero_py.run import tuning

if TYPE_CHECKING:
    from collections.abc import Sequence


def start() -> None:
    """Run the command line and exit."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that this terminal cannot show is no reason to say nothing at all. (stderr is so by itself.)
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read this has heard enough (`| head`). What the exit still flushes goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    tuning.leave(status)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit status."""
    flags = plain_flags.read(arguments)
    if flags is None:
        from portero_py.cli import main  # the subcommands and Typer: nothing that a running proxy needs

        return main.run(arguments)
    from portero_py.run import supervisor  # not for a subcommand, which loads what it needs

    return outcome.status_of(lambda: supervisor.run(flags, os.environ))
