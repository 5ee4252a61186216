"""`python -m portero_py` is `portero-py`."""

from portero_py.run import held_signals


def main() -> None:
    """The entry point: signals are held back before the rest is loaded."""
    held_signals.hold()
    from portero_py.cli.start import start

    start()


if __name__ == "__main__":
    main()
