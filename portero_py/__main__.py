"""`python -m portero_py` is `portero-py`."""

import os
import sys

from portero_py.run import held_signals


def main() -> None:
    """The entry point: signals are held back before the rest is loaded."""
    held_signals.hold()
    if "PORTERO_MAIN" in os.environ:
        # The main process, after an upgrade: it needs next to nothing of the rest.
        from portero_py.run import main_process

        sys.exit(main_process.resume(os.environ))
    from portero_py.cli.start import start

    start()


if __name__ == "__main__":
    main()
