"""`python -m portero_py` is `portero-py`."""

from portero_py.cli import main

if __name__ == "__main__":
    main()
