"""The flags of a proxy that is to run, read without the library that reads every other command line.

That library, and what it takes to know the subcommands, is 10 MB that a proxy would keep for as long as it
runs, and a fifth of a second of every restart. So what is only known flags with their values is read here.
Anything else (a subcommand, --help, a flag that is not known or has no value, whatever is unusual) is none of
this file's business: then `main` reads it, and has the words for what is wrong with it.

What both can read they read alike: `tests/cli/test_plain_flags.py` compares them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from portero_py.config.sources import SETTINGS
from portero_py.config.values import shape_lines, shape_list, shape_words, switch

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Flags without a value.
SWITCHES: Final = frozenset(setting.flag for setting in SETTINGS if setting.read is switch)
#: Flags that may be given several times.
REPEATABLE: Final = frozenset(
    setting.flag for setting in SETTINGS if setting.shape in {shape_list, shape_lines, shape_words}
)
#: All that the proxy takes.
KNOWN: Final = frozenset(
    {
        "config",
        *(setting.flag for setting in SETTINGS if setting.flag),
        *(f"{setting.flag}-file" for setting in SETTINGS if setting.is_secret),
    }
)


def read(arguments: Sequence[str]) -> dict[str, str | list[str] | bool | None] | None:
    """The flags by their names without dashes; None when this is more than the plain flags of a proxy."""
    flags: dict[str, str | list[str] | bool | None] = {}
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in KNOWN:
            return None
        if name in SWITCHES:
            if equals:
                return None
            flags[name] = True
            continue
        if not equals:
            value = next(rest, "")
            if value.startswith("-"):  # perhaps the next flag: the value was forgotten
                return None
        if not value:
            return None
        if name in REPEATABLE:
            earlier = flags.setdefault(name, [])
            assert isinstance(earlier, list)
            earlier.append(value)
        else:
            flags[name] = value  # as everywhere: of several the last one counts
    return flags
