"""Where the configuration comes from: flag > environment > file > default, for every setting by itself.

`SETTINGS` is the one table of all settings. From it follow
- the flag (`--listen-addr`), its variable (`PORTERO_LISTEN_ADDR`) and Portero's own name (`LISTEN_ADDR`);
- the key of the TOML file: `proxy.listen` is `listen` under `[proxy]`, and the field `Config.proxy.listen`;
- for a secret also `--register-secret-file`, `PORTERO_REGISTER_SECRET_FILE`, `REGISTER_SECRET_FILE`, the key
  `secret_file`, and systemd's credential `register-secret` (in `$CREDENTIALS_DIRECTORY`), which ranks after
  the variables.

A new setting is a field of its group in `model` and a row here; a new section is a group and its rows.

Rules
- An empty variable counts as not set, as compose files leave them behind.
- A secret given twice at one rank (a flag and its -file, say) is an error, not a guess.
- An HMAC key may hold "=", and Portero's JWT_HMAC_KEY is taken as it is. So named keys, for rotation, have a
  flag of their own: `--jwt-named-key KID=KEY`, split at the first "=".
- No error and no warning shows a secret.
- Whatever is in a file, or in its place, ends in a `ConfigError` and in time (`files`).
- What stands in the configuration file is complained of with file, line and key. Its services and routes,
  and the files that it includes, are read by `services`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from portero_py.config import values
from portero_py.config.files import Seen, read_text
from portero_py.config.model import SERVICE_KEYS, Config
from portero_py.errors import ConfigError

if TYPE_CHECKING:
    from portero_py.config.toml_file import TomlFile

Flags = Mapping[str, "str | list[str] | bool | None"]
Environ = Mapping[str, str]

#: What a value came from, for complaints; to find its line takes time.
Source = str | Callable[[], str]


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: `key` in the file, `flag` and Portero's `bare` variable ("" when there is none).

    Its value is the field of `Config` that `key` names, unless `part_of` names another field of that section,
    a tuple: then `part` makes of the value what is appended there.
    """

    key: str
    read: values.Reader
    flag: str = ""
    bare: str = ""
    shape: Callable[[str], object] = values.shape_text
    is_secret: bool = False
    part_of: str = ""
    part: Callable[[Any], tuple[Any, ...]] = tuple

    @property
    def section(self) -> str:
        """The group of `Config`, or "" for `Config` itself."""
        return self.key.rpartition(".")[0]

    @property
    def field(self) -> str:
        """The field of that group."""
        return self.part_of or self.key.rpartition(".")[2]

    @property
    def variables(self) -> tuple[str, ...]:
        """The variables that set it, the strongest first."""
        named = (f"PORTERO_{self.flag.upper().replace('-', '_')}",) if self.flag else ()
        return (*named, *((self.bare,) if self.bare else ()))


def _shape_off(text: str) -> object:
    shaped = values.shape_switch(text)
    return not shaped if isinstance(shaped, bool) else shaped


_MANY_NETWORKS = values.many(values.network)

#: RFC 8945, 6.
_TSIG_ALGORITHMS: Final = tuple(
    f"hmac-{digest}" for digest in ("sha256", "sha224", "sha384", "sha512", "sha1", "md5")
)

SETTINGS: Final = (
    Setting("proxy.listen", values.many(values.address), "listen-addr", "LISTEN_ADDR", values.shape_list),
    Setting("proxy.trusted_proxies", _MANY_NETWORKS, "trusted-proxy", shape=values.shape_list),
    Setting("proxy.default_service", values.service_name, "default-service"),
    Setting("proxy.upstream_tls_verify", values.switch, "upstream-tls-verify", shape=values.shape_switch),
    Setting("proxy.upstream_ca_file", values.text, "upstream-ca-file"),
    Setting("registration.listen", values.address, "register-addr", "REGISTER_ADDR"),
    Setting("registration.secret", values.secret, "register-secret", "REGISTER_SECRET", is_secret=True),
    Setting(
        "registration.hmac_key",
        values.key,
        "jwt-hmac-key",
        "JWT_HMAC_KEY",
        is_secret=True,
        part_of="hmac_keys",
        part=lambda key: (("", key),) if key else (),
    ),
    Setting(
        "registration.named_keys",
        values.many(values.named_key),
        "jwt-named-key",
        shape=values.shape_lines,
        is_secret=True,
        part_of="hmac_keys",
    ),
    Setting("registration.audience", values.text, "jwt-audience"),
    Setting("registration.issuer", values.text, "jwt-issuer"),
    Setting("registration.backend_cidrs", _MANY_NETWORKS, "backend-cidr", shape=values.shape_list),
    Setting("plain_http.listen", values.address, "http-addr"),
    Setting("plain_http.acme_upstream", values.connect_address, "acme-upstream"),
    Setting("tls.enabled", values.switch, "no-tls", shape=_shape_off),
    Setting("tls.cert_dir", values.text, "tls-cert-dir", "TLS_CERT_DIR"),
    Setting("tls.min_version", values.one_of("1.2", "1.3"), "tls-min-version"),
    Setting("acme.domains", values.many(values.acme_names), "acme-domain", shape=values.shape_words),
    Setting(
        "acme.on_register", values.many(values.acme_pattern), "acme-on-register", shape=values.shape_list
    ),
    Setting("acme.email", values.email, "acme-email"),
    Setting("acme.directory", values.acme_directory, "acme-directory"),
    Setting("acme.ca_file", values.text, "acme-ca-file"),
    Setting("acme.challenge", values.one_of("auto", "tls-alpn-01", "http-01", "dns-01"), "acme-challenge"),
    Setting("acme.eab_kid", values.text, "acme-eab-kid"),
    Setting("acme.eab_hmac", values.secret, "acme-eab-hmac", is_secret=True),
    Setting("acme.agree_tos", values.switch, "acme-agree-tos", shape=values.shape_switch),
    Setting("acme.dns_hook", values.command, "acme-dns-hook", shape=values.shape_command),
    Setting("acme.dns_hook_seconds", values.seconds(1, 3600)),
    Setting("acme.dns_server", values.connect_address, "acme-dns-server"),
    Setting("acme.dns_zone", values.domain, "acme-dns-zone"),
    Setting("acme.dns_tsig_name", values.domain, "acme-dns-tsig-name"),
    Setting("acme.dns_tsig_secret", values.secret, "acme-dns-tsig-secret", is_secret=True),
    Setting("acme.dns_tsig_algorithm", values.one_of(*_TSIG_ALGORITHMS), "acme-dns-tsig-algorithm"),
    Setting("acme.dns_resolver", values.many(values.ip_port), "acme-dns-resolver", shape=values.shape_list),
    Setting("acme.dns_check", values.many(values.ip_port), "acme-dns-check", shape=values.shape_list),
    Setting("acme.dns_seconds", values.seconds(1, 3600)),
    Setting("timeouts.handshake", values.seconds(0.1)),
    Setting("timeouts.head", values.seconds(0.1)),
    Setting("timeouts.body_idle", values.seconds(0.1)),
    Setting("timeouts.keep_alive", values.seconds(0.1)),
    Setting("timeouts.connect", values.seconds(0.1)),
    Setting("timeouts.upstream_head", values.seconds(0.1)),
    Setting("timeouts.upstream_idle", values.seconds(0.1)),
    Setting("timeouts.drain", values.seconds(0)),
    Setting("timeouts.shutdown", values.seconds(0)),
    Setting("limits.request_line", values.whole(256, 1 << 20)),
    Setting("limits.header_bytes", values.whole(1024, 1 << 24)),
    Setting("limits.header_fields", values.whole(10, 10_000)),
    Setting("limits.body_bytes", values.whole(0, 1 << 50)),
    Setting("limits.body_rate", values.whole(0, 1 << 30)),
    Setting("limits.h2_streams", values.whole(1, 65_536)),
    Setting("limits.connections", values.whole(0, 1 << 30)),
    Setting("limits.connections_per_listener", values.whole(0, 1 << 30)),
    Setting("limits.connections_per_client", values.whole(0, 1 << 30)),
    Setting("limits.handshakes_per_client", values.whole(0, 1 << 30)),
    Setting("limits.buffered_bytes", values.whole(0, 1 << 50)),
    Setting("limits.queue_seconds", values.seconds(0)),
    Setting("limits.queue_length", values.whole(1, 1_000_000)),
    Setting("limits.queue_bytes", values.whole(65_536, 1 << 40)),
    Setting("health.interval", values.seconds(0.1)),
    Setting("health.timeout", values.seconds(0.1)),
    Setting("health.rise", values.whole(1, 1000)),
    Setting("health.fall", values.whole(1, 1000)),
    Setting("health.statuses", values.many(values.whole(500, 599))),
    Setting("log.access", values.one_of("json", "text", "off"), "access-log"),
    Setting("log.level", values.log_level, "log"),
    Setting("workers", values.workers, "workers", shape=values.shape_whole),
    Setting("state_dir", values.text, "state-dir"),
)


_SECRET_FILES: Final = tuple(f"{s.key}_file" for s in SETTINGS if s.is_secret)

#: The sections of the file: name -> the group of `Config`.
SECTIONS: Final[Mapping[str, type[Any]]] = {
    each.name: type(each.default) for each in fields(Config) if is_dataclass(each.default)
}


def load(flags: Flags, environ: Environ, seen: Seen | None = None) -> Config:
    """The configuration from all sources, each value checked; secrets may still be missing.

    `flags` maps a flag's name without dashes in front to what was given, or None. To `seen` go the
    configuration file and what it names, also when this fails. Raises `ConfigError`, with the flag, variable
    or place in a file to blame.
    """
    seen = Seen() if seen is None else seen
    sheet = _read_config_file(flags, environ, seen)
    in_file = _InFile(sheet)
    found: dict[str, dict[str, Any]] = {name: {} for name in ("", *SECTIONS)}
    for setting in SETTINGS:
        given = _find(setting, flags, environ, in_file)
        if given is not None:
            section, field = found[setting.section], setting.field
            section[field] = (*section.get(field, ()), *setting.part(given)) if setting.part_of else given
    groups: dict[str, Any] = {name: group(**found[name]) for name, group in SECTIONS.items()}
    config = Config(**groups, **found[""])
    if not config.proxy.listen:
        raise ConfigError("listen-addr: at least one address is needed")
    if sheet is None or sheet.content.keys().isdisjoint(SERVICE_KEYS):
        return config
    from portero_py.config.services import read_services  # for those who have some

    services, routes = read_services(sheet, seen)
    return replace(config, services=services, routes=routes)


def read_one(flag: str, flags: Flags, environ: Environ) -> Any:
    """One setting by its flag, for commands that need no more; None when neither flag nor variable has it."""
    setting = next(s for s in SETTINGS if s.flag == flag)
    return _find(setting, flags, environ, _InFile(None))


# Private


def _find(setting: Setting, flags: Flags, environ: Environ, in_file: _InFile) -> Any:
    for rank in _ranks(setting, flags, environ, in_file):
        given = [(source, value) for source, value in rank if value is not None]
        if len(given) > 1:
            both = f"{_named(given[0][0])} and {_named(given[1][0])}"
            raise ConfigError(f"{both} are both given: use one of them")
        for source, value in given:
            return _read(setting, source, value)
    return None


def _ranks(
    setting: Setting, flags: Flags, environ: Environ, in_file: _InFile
) -> Iterator[list[tuple[Source, object]]]:
    """The sources of one setting, the strongest first; those of one rank exclude each other."""

    def from_file(source: str, path: object) -> tuple[Source, object]:
        if not path:
            return source, None
        text = read_text(Path(str(path)), source)
        return f"{source} {path}", setting.shape(text.rstrip("\r\n"))

    flag, key = setting.flag, setting.key
    if flag:
        value = flags.get(flag)
        shaped = setting.shape(str(value)) if isinstance(value, (str, bool)) else (value or None)
        rank: list[tuple[Source, object]] = [(f"--{flag}", shaped)]
        if setting.is_secret:
            rank.append(from_file(f"--{flag}-file", flags.get(f"{flag}-file")))
        yield rank
    rank = []
    for variable in setting.variables:
        given = environ.get(variable)
        rank.append((variable, setting.shape(given) if given else None))
        if setting.is_secret:
            rank.append(from_file(f"{variable}_FILE", environ.get(f"{variable}_FILE")))
    # Of two names for one variable the longer wins: PORTERO_LISTEN_ADDR before LISTEN_ADDR.
    width = 2 if setting.is_secret else 1
    yield from (rank[i : i + width] for i in range(0, len(rank), width))
    if setting.is_secret:
        credential = Path(environ.get("CREDENTIALS_DIRECTORY") or "/nonexistent", flag)
        yield [from_file("credential", credential if os.path.lexists(credential) else None)]
    own: list[tuple[Source, object]] = [(partial(in_file.where, key), in_file.get(key))]
    if setting.is_secret:
        path_key = f"{key}_file"
        if in_file.get(path_key):
            own.append(from_file(in_file.where(path_key), in_file.get(path_key)))
    yield own


def _read(setting: Setting, source: Source, value: object) -> Any:
    try:
        return setting.read(value)
    except values.BadValueError as error:
        raise ConfigError(f"{_named(source)}: {error}") from None


def _named(source: Source) -> str:
    return source if isinstance(source, str) else source()


class _InFile:
    """The values of the configuration file by dotted key; every key is known."""

    def __init__(self, sheet: TomlFile | None) -> None:
        self._sheet = sheet
        self._found: dict[str, object] = {}
        for name, value in () if sheet is None else sheet.content.items():
            self._take(name, value)
        for key in _SECRET_FILES:
            if not isinstance(self._found.get(key, ""), str):
                raise ConfigError(f"{self.where(key)}: must be a file's path")

    def get(self, key: str) -> object:
        return self._found.get(key)

    def where(self, key: str) -> str:
        """File, line and key, for complaints."""
        assert self._sheet is not None
        return f"{self._sheet.where(key.split('.'))}: {key}"

    def _take(self, name: str, value: object) -> None:
        assert self._sheet is not None
        if name in SERVICE_KEYS:
            return
        known = [*(s.key for s in SETTINGS), *_SECRET_FILES]
        if name in SECTIONS and not isinstance(value, dict):
            raise ConfigError(f"{self._sheet.where((name,))}: {name} must be a section: [{name}]")
        if name not in SECTIONS and name not in known:
            tops = [*(key for key in known if "." not in key), *sorted(SECTIONS), *SERVICE_KEYS]
            raise ConfigError(
                f"{self._sheet.where((name,))}: unknown key {values.shown(name)}: "
                f'the nearest is "{values.nearest(name, tops)}"'
            )
        if not isinstance(value, dict) or name not in SECTIONS:
            self._found[name] = value
            return
        for key, inner in value.items():
            dotted = f"{name}.{key}"
            if dotted not in known:
                raise ConfigError(
                    f"{self._sheet.where((name, key))}: unknown key {values.shown(dotted)}: "
                    f'the nearest is "{values.nearest(dotted, known)}"'
                )
            self._found[dotted] = inner


def _read_config_file(flags: Flags, environ: Environ, seen: Seen) -> TomlFile | None:
    source, path = "--config", flags.get("config")
    if not path:
        source, path = "PORTERO_CONFIG", environ.get("PORTERO_CONFIG")
    if not path:
        return None
    from portero_py.config.toml_file import TomlFile  # for those who have such a file

    seen.file(str(path))
    return TomlFile.read(str(path), source)
