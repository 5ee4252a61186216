"""What is read without Typer is what Typer would have read; the rest is left to it."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from portero_py.cli import main, outcome, plain_flags, start
from portero_py.errors import ConfigError
from portero_py.run import supervisor

VALUES = st.sampled_from(["", "x", "a,b", "a b", "0", "=", "a=b", "-", "-x", "--no-tls", "--", "1.3", "é"])
FLAGS = st.sampled_from(sorted(plain_flags.KNOWN))
WORDS = st.one_of(
    FLAGS.map(lambda name: [f"--{name}"]),
    st.tuples(FLAGS, VALUES).map(lambda pair: [f"--{pair[0]}", pair[1]]),
    st.tuples(FLAGS, VALUES).map(lambda pair: [f"--{pair[0]}={pair[1]}"]),
)


def by_typer(arguments: list[str]) -> dict[str, Any] | int:
    """The flags with which Typer would have run the proxy, or the status with which it ended instead."""
    found: list[dict[str, Any]] = []

    def take(flags: dict[str, Any], environ: object) -> int:
        found.append(flags)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor, "run", take)
        patch.setattr("portero_py.run.held_signals.let_go", lambda: None)
        status = main.run(arguments)
    return {name: value for name, value in found[0].items() if value} if found else status


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS, max_size=5).map(lambda words: list(chain.from_iterable(words))))
def test_both_read_the_same(arguments: list[str]) -> None:
    plain = plain_flags.read(arguments)
    if plain is not None:
        assert by_typer(arguments) == plain


def test_each_flag_is_of_the_same_kind_for_both() -> None:
    parameters = {each.opts[0].removeprefix("--"): each for each in typer.main.get_command(main.app).params}
    ours = {name: each for name, each in parameters.items() if name not in {"check", "version", "help"}}
    assert set(ours) == plain_flags.KNOWN
    assert {name for name, each in ours.items() if getattr(each, "is_flag", False)} == plain_flags.SWITCHES
    assert {name for name, each in ours.items() if getattr(each, "multiple", False)} == plain_flags.REPEATABLE


@pytest.mark.parametrize("flag", sorted(plain_flags.KNOWN))
def test_every_flag_of_the_proxy_can_be_read_alone(flag: str) -> None:
    if flag in plain_flags.SWITCHES:
        assert plain_flags.read([f"--{flag}"]) == {flag: True}
    else:
        expected = {flag: ["a=b"] if flag in plain_flags.REPEATABLE else "a=b"}
        assert plain_flags.read([f"--{flag}=a=b"]) == plain_flags.read([f"--{flag}", "a=b"]) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo"],
        ["--help"],
        ["--version"],
        ["--check"],
        ["--frobnicate"],
        ["--frobnicate=1"],
        ["--listen-addr"],
        ["--listen-addr="],
        ["--listen-addr", ""],
        ["--register-addr", "--no-tls"],
        ["--no-tls=yes"],
        ["--no-tls", "certs"],
        ["--", "--no-tls"],
        ["-h"],
        ["no-tls"],
        [""],
    ],
)
def test_whatever_is_not_plain_is_left_to_typer(arguments: list[str]) -> None:
    assert plain_flags.read(arguments) is None


def test_no_flags_at_all_run_the_proxy() -> None:
    assert plain_flags.read([]) == {}


def test_a_proxy_that_cannot_start_says_why_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(flags: object, environ: object) -> int:
        raise ConfigError("two\nlines\x1b[31m")

    monkeypatch.setattr(supervisor, "run", refuse)
    assert start.run(["--no-tls"]) == 2
    assert capsys.readouterr().err == "portero-py: two lines\N{REPLACEMENT CHARACTER}[31m\n"


def test_what_is_interrupted_ends_with_130() -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert outcome.status_of(interrupted) == 130
