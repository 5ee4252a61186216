"""Whatever is given as configuration ends in a `Config` or in a `ConfigError`, and in time."""

from __future__ import annotations

import logging
import os
import socket
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from portero_py.cli import backends, main
from portero_py.client.registrar import Registration
from portero_py.config import files, toml_file
from portero_py.config.model import Config, Timeouts
from portero_py.config.sources import SETTINGS, Setting, load
from portero_py.config.values import BadValueError
from portero_py.errors import ConfigError
from portero_py.run import live_configuration, preflight

#: Text that parsers of URLs, addresses and networks take a second look at.
_LIKELY = st.one_of(
    st.from_regex(r"(https?:)?//[\[\]@:/a-z0-9%?#]*", fullmatch=True),
    st.from_regex(r"[\[\]0-9a-f:.%/-]{0,60}", fullmatch=True),
    st.from_regex(r"(\[[0-9a-f:.%]*\]|[a-z.*_]*)(:[0-9]*)?(/[0-9]+)?", fullmatch=True),
    st.sampled_from(["https://[x", "https://x:99999", "https://x:y", "9" * 5000, "a." * 200, "\ud800", "\0"]),
)
_TEXT = st.one_of(_LIKELY, st.text(), st.text(alphabet=st.characters()))
_LEAF = st.one_of(
    _TEXT,
    st.integers(),
    # Python writes no number of more than 4,300 digits, but reads it when it is hexadecimal.
    st.sampled_from([20_000, 20_001]).map(lambda bits: 1 << bits),
    st.floats(),
    st.booleans(),
    st.datetimes(),
    st.dates(),
    st.times(),
)
_VALUE = st.recursive(
    _LEAF,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)
_WITH_FLAG = [setting for setting in SETTINGS if setting.flag]


def refusal_of(act: Callable[[], object]) -> str:
    """What it says when it refuses, in the one way in which it may; "" when it does not."""
    try:
        act()
    except (BadValueError, ConfigError) as refusal:
        return str(refusal)
    return ""


@settings(deadline=None)
@given(st.sampled_from(SETTINGS), _VALUE)
@example(next(s for s in SETTINGS if s.key == "acme.directory"), "https://[x")
@example(next(s for s in SETTINGS if s.key == "limits.body_bytes"), 1 << 20_000)
@example(next(s for s in SETTINGS if s.key == "log.access"), [[1 << 20_000]])
def test_every_reader_takes_or_refuses_whatever_the_file_may_hold(setting: Setting, value: object) -> None:
    refusal = refusal_of(lambda: setting.read(value))
    assert len(refusal) < 400
    assert refusal.isprintable()


@settings(deadline=None)
@given(st.sampled_from(_WITH_FLAG), _TEXT, st.booleans())
def test_every_flag_and_every_variable_takes_or_refuses_any_text(
    setting: Setting, text: str, as_flag: bool
) -> None:
    flags: dict[str, Any] = {setting.flag: text} if as_flag else {}
    refusal = refusal_of(lambda: load(flags, {} if as_flag else {setting.variables[0]: text}))
    assert "\n" not in refusal


@settings(deadline=None)
@given(st.binary(max_size=300))
@example(b"x = " + b"[" * 5000)
@example(b"a." * 3000 + b"a = 1")
@example(b"limits.body_bytes = " + b"9" * 5000)
@example(b"limits.body_bytes = 0x" + b"f" * 9000)
@example(b'registration.secret_file = "a\\u0000b"')
@example(b'"" = {}')
@example(b"workers = {}")
@example(b"workers.a = 1")
@example(b'"\\u001b[31m\\u0000" = 1')
@example(b'["\\n"]\n')
@example(b"timeouts.drain = nan")
@example(b"timeouts.drain = inf")
@example(b"timeouts.drain = 1979-05-27")
@example(b"\xff\xfe")
def test_a_file_of_any_bytes_is_a_configuration_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_bytes(content)
    found: list[Config] = []
    refusal = refusal_of(lambda: found.append(load({"config": str(file)}, {})))
    assert len(refusal) < 1000
    # What was taken was not passed over.
    assert refusal or tomllib.loads(content.decode()) == {} or found != [Config()]


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([s.key for s in SETTINGS]), _LEAF, max_size=3))
def test_settings_of_any_kind_side_by_side_are_taken_or_refused(given: dict[str, object]) -> None:
    document: dict[str, Any] = {}
    for key, value in given.items():
        section, _, name = key.rpartition(".")
        (document.setdefault(section, {}) if section else document)[name] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toml_file, "read_text", lambda path, source, most: "")
        patch.setattr(tomllib, "loads", lambda _: document)
        assert len(refusal_of(lambda: load({"config": "any.toml"}, {}))) < 400


@pytest.mark.parametrize("kind", ["pipe", "folder", "zeros", "terminal", "socket", "loop", "long", "nul"])
@pytest.mark.parametrize("flag", ["config", "register-secret-file", "jwt-named-key-file"])
def test_what_stands_in_a_file_s_place_is_refused_in_time(
    tmp_path: Path, kind: str, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "FILE_PATIENCE", 0.01)
    path = str(tmp_path / "file")
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            Path(path).mkdir()
        case "zeros":
            path = "/dev/zero"
        case "terminal":
            own, other = os.openpty()
            path = os.ttyname(other)
        case "socket":
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(path)
        case "loop":
            Path(path).symlink_to(path)
        case "long":
            path = str(tmp_path / ("x" * 5000))
        case "nul":
            path = "a\0b"
    with pytest.raises(ConfigError, match=f"--{flag}"):
        load({flag: path}, {})
    if kind == "terminal":
        os.close(own)
        os.close(other)


def test_a_pipe_that_somebody_writes_to_is_read_to_its_end(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"from-a-pipe\n")
    os.close(writing)
    try:
        assert load({"register-secret-file": f"/dev/fd/{reading}"}, {}).registration.secret == "from-a-pipe"
    finally:
        os.close(reading)


def test_a_credential_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "register-secret").mkdir()
    with pytest.raises(ConfigError, match="credential: cannot read"):
        load({}, {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert load({}, {"CREDENTIALS_DIRECTORY": "x" * 5000}).registration.secret == ""


# A reload


@pytest.mark.parametrize(
    "fault",
    [
        ConfigError("bad"),
        ValueError("Invalid IPv6 URL"),
        RecursionError(),
        MemoryError(),
        OSError(24, "EMFILE"),
    ],
)
@pytest.mark.parametrize("where", ["reading", "judging"])
def test_a_reload_survives_whatever_happens(
    fault: Exception, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> Any:
        raise fault

    running, other = Config(), Config(timeouts=Timeouts(drain=1))
    read: Callable[[], Config] = fails if where == "reading" else lambda: other
    monkeypatch.setattr(preflight, "require", fails)
    assert live_configuration.read_again(running, read) is None
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "the configuration stays as it was" in record.getMessage()
    assert (record.exc_info is None) == isinstance(fault, ConfigError)


# The command line


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "https://[x"],
        ["explain", "a.example", "--register-url=http://[x"],
        ["explain", "a.example", "--register-url=http://x:99999"],
        ["explain", "a.example", "--register-url=http://x:y"],
        ["register", "--service=a.example", "--host=::1", "--port=1", "--register-url=https://[x"],
        ["register", "--service=a.example", "--host=::1", "--port=1", "--weight=99999999999999999999"],
        ["register", "--service=\udcff", "--host=::1", "--port=1"],
        ["register", "--service=a.example", "--host=\udcff", "--port=1"],
        ["agent", "--service=a.example", "--host=::1", "--port=1", "--instance-id=\udcff"],
        ["deregister", "--service=a.example", "--instance-id=\udcff"],
        ["deregister", "--service=a.example", "--host=::1", "--port=-99999999999999999999"],
        ["--acme-directory=https://[x", "--check"],
        ["--acme-directory=https://[x"],
        ["--config=/dev/zero"],
        ["--upstream-ca-file=/dev/zero", "--tls-cert-dir=/", "--check"],
        ["--state-dir=\udcff", "--check"],
        ["certs", "--config=\udcff"],
        ["certs", "check", "\udcff"],
        ["certs", "revoke", "\udcff", "--state-dir=/dev/null"],
        ["--workers=" + "9" * 5000],
        ["--listen-addr=" + "a." * 300 + "example:0", "--no-tls", "--check"],
    ],
    ids=lambda arguments: " ".join(arguments)[:60].encode("ascii", "replace").decode(),
)
def test_no_argument_ends_in_a_traceback(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORTERO_REGISTER_SECRET", "a-shared-secret")
    monkeypatch.setenv("PORTERO_JWT_HMAC_KEY", "k" * 32)
    assert main.run(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("portero-py: ")
    assert err.count("\n") == 1


def test_the_fields_of_a_registration_are_named_as_their_flags() -> None:
    for field, flag in (("service_name", "service"), ("instance_id", "instance-id")):
        backend = Registration(**{"service_name": "a", "host": "::1", "port": 1, field: "\udcff"})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"^--{flag}: "):
            backends.register({}, {}, backend)
