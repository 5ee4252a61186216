"""Where each setting comes from, what it may hold, and what is said when it cannot be used."""

from __future__ import annotations

import os
import re
from dataclasses import fields, is_dataclass, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from portero_py.config import values
from portero_py.config.model import Address, Config, Log, Registration
from portero_py.config.sources import SETTINGS, load, read_one
from portero_py.config.values import BadValueError
from portero_py.errors import ConfigError
from portero_py.run import preflight
from portero_py.run.preflight import make_directories, require
from portero_py.run.sockets import open_sockets, rehearse

SECRET = "a-shared-secret"
KEY = "k" * 32
DNS = {
    "acme-domain": "a.example",
    "acme-agree-tos": "1",
    "state-dir": "FOLDER",
    "acme-dns-server": "127.0.0.1:53",
}
ACME = {"acme-domain": "a.example", "acme-agree-tos": "1", "state-dir": "FOLDER"}


def load_file(tmp_path: Path, text: str, **environ: str) -> Config:
    file = tmp_path / "portero.toml"
    file.write_text(text)
    return load({"config": str(file)}, environ)


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_file(tmp_path, text)
    return str(caught.value)


def serving(tmp_path: Path, **registration: Any) -> Config:
    given = {"secret": SECRET, "hmac_keys": (("", KEY),), **registration}
    config = load({"tls-cert-dir": str(tmp_path)}, {})
    return Config(proxy=config.proxy, tls=config.tls, registration=Registration(**given))


class TestSources:
    def test_without_any_source_the_defaults_hold(self) -> None:
        assert load({}, {}) == Config()

    def test_a_flag_goes_before_the_variable_the_variable_before_portero_s_own_and_that_before_the_file(
        self, tmp_path: Path
    ) -> None:
        file = tmp_path / "portero.toml"
        file.write_text('[registration]\nlisten = "127.0.0.1:1"\n')
        environ = {"REGISTER_ADDR": "127.0.0.1:2", "PORTERO_REGISTER_ADDR": "127.0.0.1:3"}
        flags = {"config": str(file), "register-addr": "127.0.0.1:4"}
        ports = []
        for given, variables in (
            (flags, environ),
            ({**flags, "register-addr": None}, environ),
            ({"config": str(file)}, {"REGISTER_ADDR": "127.0.0.1:2"}),
            ({"config": str(file)}, {}),
            ({}, {}),
        ):
            ports.append(load(given, variables).registration.listen.port)
        assert ports == [4, 3, 2, 1, 18080]

    @pytest.mark.parametrize(
        ("variable", "value", "where", "expected"),
        [
            ("LISTEN_ADDR", ":1,[::1]:2", "proxy.listen", (Address("", 1), Address("::1", 2))),
            ("REGISTER_ADDR", "[::1]:3", "registration.listen", Address("::1", 3)),
            ("TLS_CERT_DIR", "/certs", "tls.cert_dir", "/certs"),
            ("REGISTER_SECRET", "s", "registration.secret", "s"),
            ("JWT_HMAC_KEY", "a=b==", "registration.hmac_keys", (("", "a=b=="),)),
        ],
    )
    def test_portero_s_bare_names_work(self, variable: str, value: str, where: str, expected: object) -> None:
        group, _, name = where.partition(".")
        assert getattr(getattr(load({}, {variable: value}), group), name) == expected

    @pytest.mark.parametrize(
        ("flag", "value", "where", "expected"),
        [
            ("listen-addr", "1.2.3.4:5 [::]:6", "proxy.listen", (Address("1.2.3.4", 5), Address("::", 6))),
            ("trusted-proxy", "::1", "proxy.trusted_proxies", (ip_network("::1/128"),)),
            ("default-service", "App.Example.", "proxy.default_service", "app.example"),
            ("upstream-tls-verify", "yes", "proxy.upstream_tls_verify", True),
            ("upstream-ca-file", "/ca.pem", "proxy.upstream_ca_file", "/ca.pem"),
            ("register-addr", ":1", "registration.listen", Address("", 1)),
            ("register-secret", "s", "registration.secret", "s"),
            ("jwt-hmac-key", "k", "registration.hmac_keys", (("", "k"),)),
            ("jwt-named-key", "a=1\nb=2=", "registration.hmac_keys", (("a", "1"), ("b", "2="))),
            ("jwt-audience", "a", "registration.audience", "a"),
            ("jwt-issuer", "i", "registration.issuer", "i"),
            ("backend-cidr", "10.0.0.0/8", "registration.backend_cidrs", (ip_network("10.0.0.0/8"),)),
            ("http-addr", ":80", "plain_http.listen", Address("", 80)),
            ("acme-upstream", "acme:81", "plain_http.acme_upstream", Address("acme", 81)),
            ("no-tls", "1", "tls.enabled", False),
            (
                *("acme-domain", "a.example,www.A.example b.example", "acme.domains"),
                (("a.example", "www.a.example"), ("b.example",)),
            ),
            ("acme-on-register", "*.a.example", "acme.on_register", ("*.a.example",)),
            ("acme-email", "me@a.example", "acme.email", "me@a.example"),
            (
                *("acme-directory", "staging", "acme.directory"),
                "https://acme-staging-v02.api.letsencrypt.org/directory",
            ),
            ("acme-ca-file", "/ca.pem", "acme.ca_file", "/ca.pem"),
            ("acme-challenge", "http-01", "acme.challenge", "http-01"),
            ("acme-eab-kid", "kid", "acme.eab_kid", "kid"),
            ("acme-eab-hmac", "key", "acme.eab_hmac", "key"),
            ("acme-agree-tos", "yes", "acme.agree_tos", True),
            ("acme-dns-hook", "/bin/hook 'my zone' x", "acme.dns_hook", ("/bin/hook", "my zone", "x")),
            ("acme-dns-server", "ns1.example:53", "acme.dns_server", Address("ns1.example", 53)),
            ("acme-dns-zone", "A.Example.", "acme.dns_zone", "a.example"),
            ("acme-dns-tsig-name", "portero.", "acme.dns_tsig_name", "portero"),
            ("acme-dns-tsig-secret", "c2VjcmV0", "acme.dns_tsig_secret", "c2VjcmV0"),
            ("acme-dns-tsig-algorithm", "HMAC-SHA512", "acme.dns_tsig_algorithm", "hmac-sha512"),
            (
                *("acme-dns-resolver", "192.0.2.1:53 [::1]:54", "acme.dns_resolver"),
                (Address("192.0.2.1", 53), Address("::1", 54)),
            ),
            ("acme-dns-check", "192.0.2.1:53", "acme.dns_check", (Address("192.0.2.1", 53),)),
            ("tls-cert-dir", "/c", "tls.cert_dir", "/c"),
            ("tls-min-version", "1.3", "tls.min_version", "1.3"),
            ("access-log", "off", "log.access", "off"),
            ("log", "warn", "log.level", "warning"),
            ("workers", "1", "workers", 1),
            ("state-dir", "/s", "state_dir", "/s"),
        ],
    )
    def test_every_flag_has_its_variable(self, flag: str, value: str, where: str, expected: object) -> None:
        found: Any = load({}, {f"PORTERO_{flag.upper().replace('-', '_')}": value})
        for name in where.split("."):
            found = getattr(found, name)
        assert found == expected

    def test_that_list_of_flags_is_complete(self) -> None:
        mark = next(
            m
            for m in TestSources.test_every_flag_has_its_variable.pytestmark  # type: ignore[attr-defined]
            if m.name == "parametrize"
        )
        assert {case[0] for case in mark.args[1]} == {s.flag for s in SETTINGS if s.flag}

    def test_every_field_of_the_configuration_has_a_row_and_every_row_a_field(self) -> None:
        expected = set()
        for group in fields(Config):
            if group.name in ("services", "routes"):  # in the file only: `config.services`
                continue
            inner = getattr(Config(), group.name)
            expected |= (
                {(group.name, each.name) for each in fields(inner)}
                if is_dataclass(inner)
                else {("", group.name)}
            )
        assert {(setting.section, setting.field) for setting in SETTINGS} == expected
        keys = [setting.key for setting in SETTINGS]
        assert sorted(set(keys)) == sorted(keys)

    def test_a_field_has_one_row_unless_it_is_made_of_parts(self) -> None:
        whole = [(setting.section, setting.field) for setting in SETTINGS if not setting.part_of]
        parts = [(setting.section, setting.field) for setting in SETTINGS if setting.part_of]
        assert len(set(whole)) == len(whole)
        assert set(parts) == {("registration", "hmac_keys")}
        assert not set(parts) & set(whole)

    def test_an_empty_variable_counts_as_not_set(self) -> None:
        assert load({}, {"PORTERO_LISTEN_ADDR": "", "PORTERO_WORKERS": ""}) == Config()

    def test_a_repeated_flag_keeps_its_order_and_drops_duplicates(self) -> None:
        config = load({"listen-addr": [":2", ":1", ":2"]}, {})
        assert config.proxy.listen == (Address("", 2), Address("", 1))

    def test_a_refused_value_is_named_by_where_it_came_from(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"^--http-addr: \"x\" has no port"):
            load({"http-addr": "x"}, {})
        with pytest.raises(ConfigError, match=r"^LISTEN_ADDR: "):
            load({}, {"LISTEN_ADDR": "x"})
        assert refused(tmp_path, "[limits]\nh2_streams = 0\n").endswith(
            "portero.toml:2: limits.h2_streams: must be a whole number from 1 to 65536, not 0"
        )

    def test_workers_are_a_number_or_one_for_each_core(self) -> None:
        assert load({"workers": "7"}, {}).workers == 7
        assert load({}, {"PORTERO_WORKERS": "Auto"}).workers == len(os.sched_getaffinity(0))
        with pytest.raises(ConfigError, match="auto or a whole number from 1 to 1024, not 0"):
            load({"workers": "0"}, {})

    def test_no_address_at_all_is_refused(self, tmp_path: Path) -> None:
        assert "at least one address" in refused(tmp_path, "[proxy]\nlisten = []\n")


class TestFile:
    def test_every_section_is_taken_over(self, tmp_path: Path) -> None:
        config = load_file(
            tmp_path,
            """
            workers = 1
            state_dir = "/var/lib/portero"
            [timeouts]
            head = 2.5
            drain = 0
            [limits]
            body_bytes = 1000
            [tls]
            enabled = false
            min_version = "1.3"
            [proxy]
            listen = [":1", ":2"]
            trusted_proxies = ["10.0.0.0/8"]
            default_service = "app.example"
            [log]
            access = "text"
            level = "debug"
            [registration]
            named_keys = ["a=1"]
            hmac_key = "k"
            [plain_http]
            listen = ":80"
            """,
        )
        assert config.timeouts.head == 2.5
        assert config.timeouts.drain == 0
        assert config.timeouts.body_idle == 60
        assert config.limits.body_bytes == 1000
        assert (config.tls.enabled, config.tls.min_version) == (False, "1.3")
        assert config.proxy.trusted_proxies == (ip_network("10.0.0.0/8"),)
        assert config.log == Log("text", "debug")
        assert config.registration.hmac_keys == (("", "k"), ("a", "1"))
        assert config.plain_http.listen == Address("", 80)
        assert config.state_dir == "/var/lib/portero"

    def test_the_variable_can_name_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "c.toml"
        file.write_text("[timeouts]\nhead = 1\n")
        assert load({}, {"PORTERO_CONFIG": str(file)}).timeouts.head == 1

    @pytest.mark.parametrize(
        ("text", "unknown", "nearest"),
        [
            ("[timeouts]\nhaed = 1\n", "timeouts.haed", "timeouts.head"),
            ("[limit]\nh2_streams = 1\n", "limit", "limits"),
            ("[proxy]\ntrusted_proxy = []\n", "proxy.trusted_proxy", "proxy.trusted_proxies"),
            ("worker = 1\n", "worker", "workers"),
            ("[registration]\nsecret_files = 's'\n", "registration.secret_files", "registration.secret_file"),
        ],
    )
    def test_an_unknown_key_names_the_nearest_known_one(
        self, tmp_path: Path, text: str, unknown: str, nearest: str
    ) -> None:
        assert refused(tmp_path, text).endswith(f'unknown key "{unknown}": the nearest is "{nearest}"')

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            (
                "[timeouts]\nhead = '1'\n",
                'timeouts.head: must be a number of seconds from 0.1 to 86400, not "1"',
            ),
            ("[timeouts]\nhead = true\n", "timeouts.head: must be a number"),
            ("[timeouts]\nhead = nan\n", "timeouts.head: must be a number"),
            ("[timeouts]\nhead = inf\n", "timeouts.head: must be a number"),
            ("[timeouts]\nhead = -1\n", "timeouts.head: must be a number"),
            ("[limits]\nheader_fields = 1.5\n", "limits.header_fields: must be a whole number"),
            ("[limits]\nheader_fields = true\n", "limits.header_fields: must be a whole number"),
            ("[tls]\nmin_version = 1.3\n", "tls.min_version: must be 1.2 or 1.3, not 1.3"),
            ("[tls]\nmin_version = '1.1'\n", 'tls.min_version: must be 1.2 or 1.3, not "1.1"'),
            ("[tls]\nenabled = 'no'\n", "tls.enabled: must be true or false"),
            ("[tls]\ncert_dir = 1\n", "tls.cert_dir: must be text, not a number"),
            ("[log]\naccess = 'xml'\n", "log.access: must be json, text or off"),
            ("[log]\nlevel = 'loud'\n", "log.level: must be off, error, warn"),
            ("[log]\nlevel = 3\n", "log.level: must be off, error, warn"),
            ("[proxy]\nlisten = [80]\n", "proxy.listen: must be an address, not a number"),
            ("[proxy]\ntrusted_proxies = ['10.1.0.0/8']\n", "the network is 10.0.0.0/8"),
            ("[proxy]\ndefault_service = 'a b'\n", 'proxy.default_service: "a b" is no host name'),
            ("[registration]\nsecret = 'a\\tb'\nsecret_file = 1\n", "secret_file: must be a file's path"),
            ("timeouts = 3\n", "timeouts must be a section: [timeouts]"),
            ("[timeouts\n", "no valid TOML"),
        ],
    )
    def test_a_wrong_value_is_refused_with_its_key(self, tmp_path: Path, text: str, complaint: str) -> None:
        assert complaint in refused(tmp_path, text)

    def test_a_file_that_cannot_be_read_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"--config: cannot read .*gone.toml: No such file or directory"
        ):
            load({"config": str(tmp_path / "gone.toml")}, {})
        with pytest.raises(ConfigError, match="Is a directory"):
            load({"config": str(tmp_path)}, {})
        (tmp_path / "latin").write_bytes(b"# \xff")
        with pytest.raises(ConfigError, match="is not UTF-8 text"):
            load({"config": str(tmp_path / "latin")}, {})
        (tmp_path / "large").write_bytes(b"#" * (16 << 20) + b"#")
        with pytest.raises(ConfigError, match="is larger than"):
            load({"config": str(tmp_path / "large")}, {})


class TestSecrets:
    @pytest.fixture
    def file(self, tmp_path: Path) -> str:
        path = tmp_path / "secret"
        path.write_text("from-a-file\n")
        return str(path)

    @pytest.mark.parametrize("variable", ["PORTERO_REGISTER_SECRET_FILE", "REGISTER_SECRET_FILE"])
    def test_a_variable_may_name_the_file(self, file: str, variable: str) -> None:
        assert load({}, {variable: file}).registration.secret == "from-a-file"

    def test_a_flag_may_name_the_file_and_its_last_line_end_is_dropped(self, file: str) -> None:
        config = load({"register-secret-file": file, "jwt-hmac-key-file": file}, {"REGISTER_SECRET": "other"})
        assert config.registration.secret == "from-a-file"
        assert config.registration.hmac_keys == (("", "from-a-file"),)

    def test_the_configuration_file_may_name_the_file(self, tmp_path: Path, file: str) -> None:
        config = load_file(tmp_path, f"[registration]\nsecret_file = '{file}'\n")
        assert config.registration.secret == "from-a-file"

    def test_a_file_of_named_keys_has_one_a_line(self, tmp_path: Path) -> None:
        (tmp_path / "keys").write_text("# current\nnew=abc=\n\nold=def\n")
        config = load({"jwt-named-key-file": str(tmp_path / "keys")}, {})
        assert config.registration.hmac_keys == (("new", "abc="), ("old", "def"))

    def test_a_systemd_credential_ranks_after_the_variables(self, tmp_path: Path) -> None:
        (tmp_path / "register-secret").write_text("credential\n")
        environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
        assert load({}, environ).registration.secret == "credential"
        assert load({}, {**environ, "REGISTER_SECRET": "variable"}).registration.secret == "variable"

    @pytest.mark.parametrize(
        ("flags", "environ"),
        [
            ({"register-secret": "a", "register-secret-file": "FILE"}, {}),
            ({}, {"REGISTER_SECRET": "a", "REGISTER_SECRET_FILE": "FILE"}),
        ],
    )
    def test_a_secret_given_twice_at_one_rank_is_refused(
        self, file: str, flags: dict[str, str], environ: dict[str, str]
    ) -> None:
        with pytest.raises(ConfigError, match="are both given"):
            load(
                {name: value.replace("FILE", file) for name, value in flags.items()},
                {name: value.replace("FILE", file) for name, value in environ.items()},
            )

    def test_no_complaint_shows_a_secret(self) -> None:
        for flags in (
            {"register-secret": " hush"},
            {"register-secret": "hush\n"},
            {"jwt-named-key": ["hush"]},
        ):
            with pytest.raises(ConfigError) as caught:
                load(flags, {})
            assert "hush" not in str(caught.value)

    def test_no_repr_shows_a_secret(self) -> None:
        config = load({"register-secret": "hush", "jwt-hmac-key": "hush2", "jwt-named-key": ["a=hush3"]}, {})
        assert "hush" not in repr(config)

    def test_one_setting_can_be_read_alone(self) -> None:
        assert read_one("register-secret", {}, {"REGISTER_SECRET": "s"}) == "s"
        assert read_one("register-secret", {}, {}) is None


class TestPreflight:
    def test_a_whole_configuration_may_serve(self, tmp_path: Path) -> None:
        warnings = require(serving(tmp_path))
        assert len(warnings) == 1
        assert "--upstream-tls-verify" in warnings[0]

    @pytest.mark.parametrize(
        ("registration", "flag"),
        [
            ({"secret": ""}, "--register-secret is missing"),
            ({"hmac_keys": ()}, "--jwt-hmac-key is missing"),
            ({"hmac_keys": (("", ""),)}, "--jwt-hmac-key is missing"),
        ],
    )
    def test_a_missing_secret_is_refused(self, tmp_path: Path, registration: Any, flag: str) -> None:
        with pytest.raises(ConfigError, match=flag):
            require(serving(tmp_path, **registration))

    @pytest.mark.parametrize("given", [{"secret": "changeme"}, {"hmac_keys": (("", "changeme"),)}])
    @pytest.mark.parametrize("host", ["", "::", "0.0.0.0", "10.0.0.1", "portero.example"])
    def test_the_example_s_secret_is_refused_outside_loopback(
        self, tmp_path: Path, given: Any, host: str
    ) -> None:
        with pytest.raises(ConfigError, match="outside loopback"):
            require(serving(tmp_path, listen=Address(host, 1), **given))

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "::ffff:127.0.0.1"])
    def test_the_example_s_secret_is_a_warning_on_loopback(self, tmp_path: Path, host: str) -> None:
        warnings = require(serving(tmp_path, listen=Address(host, 1), secret="changeme"))
        assert any("changeme" in warning for warning in warnings)

    def test_a_short_key_is_a_warning(self, tmp_path: Path) -> None:
        assert any("shorter" in warning for warning in require(serving(tmp_path, hmac_keys=(("a", "b"),))))

    @pytest.mark.parametrize("flag", ["tls-cert-dir", "upstream-ca-file"])
    def test_what_cannot_be_read_is_refused(self, tmp_path: Path, flag: str) -> None:
        gone = str(tmp_path / "gone")
        config = load(
            {"tls-cert-dir": str(tmp_path), flag: gone, "jwt-hmac-key": KEY, "register-secret": "s"}, {}
        )
        with pytest.raises(ConfigError, match=f"--{flag}: cannot read {gone}: No such file"):
            require(config)

    @pytest.mark.parametrize(
        ("made", "flags", "complaint"),
        [
            ("pem", {"jwt-hmac-key-file": "PATH"}, "--jwt-hmac-key: the JWT HMAC key cannot be used"),
            ("pem", {"jwt-named-key": "a=ssh-rsa AAAAB3NzaC1yc2E"}, "--jwt-named-key: the JWT HMAC key"),
            ("empty", {"upstream-ca-file": "PATH", "upstream-tls-verify": "1"}, "no usable PEM certificates"),
            ("fifo", {"upstream-ca-file": "PATH"}, "--upstream-ca-file: PATH is not a regular file"),
            ("empty", {"state-dir": "PATH"}, "--state-dir: cannot read PATH: Not a directory"),
            ("empty", {"state-dir": "PATH/below"}, "--state-dir: cannot make PATH/below: Not a directory"),
            (
                "nothing",
                {"state-dir": "/proc/1/nothing/here"},
                "--state-dir: cannot make /proc/1/nothing/here",
            ),
            ("empty", {"tls-cert-dir": "PATH"}, "--tls-cert-dir: cannot read PATH: Not a directory"),
            ("empty", {**ACME, "acme-ca-file": "PATH"}, "--acme-ca-file PATH: no usable PEM"),
            (
                "nothing",
                {**ACME, "acme-ca-file": "/proc/self/mem"},
                "--acme-ca-file: cannot read /proc/self/mem",
            ),
            ("fifo", {**ACME, "acme-ca-file": "PATH"}, "--acme-ca-file: PATH is not a regular file"),
            ("empty", {**ACME, "acme-eab-kid": "k", "acme-eab-hmac": "a b!"}, "holds no base64url"),
            ("empty", {**ACME, "state-dir": None}, "needs --state-dir"),
            (
                "nothing",
                {**ACME, "acme-domain": "a.example,*.a.example"},
                "--acme-domain *.a.example needs DNS records: set --acme-dns-hook or --acme-dns-server",
            ),
            ("nothing", {**ACME, "acme-challenge": "dns-01"}, "--acme-challenge dns-01 needs DNS records"),
            (
                "nothing",
                {**DNS, "acme-domain": "*.a.example", "acme-challenge": "http-01", "http-addr": ":80"},
                "--acme-challenge http-01 cannot validate *.a.example: use auto or dns-01",
            ),
            ("nothing", {**ACME, "acme-dns-hook": "PATH"}, "--acme-dns-hook: PATH is not there"),
            ("empty", {**ACME, "acme-dns-hook": "PATH"}, "--acme-dns-hook: PATH cannot be run"),
            ("nothing", {**ACME, "acme-dns-hook": "no-such-program"}, "no-such-program is not there"),
            ("nothing", {**DNS, "acme-dns-hook": "/bin/true"}, "are both given"),
            ("nothing", {**DNS, "acme-dns-tsig-name": "k"}, "--acme-dns-tsig-secret-file belong"),
            (
                "nothing",
                {**DNS, "acme-dns-tsig-secret": "c2U="},
                "--acme-dns-tsig-secret-file belong together",
            ),
            (
                "nothing",
                {**DNS, "acme-dns-tsig-name": "k", "acme-dns-tsig-secret": "no base64"},
                "--acme-dns-tsig-secret-file holds no base64",
            ),
        ],
    )
    def test_what_the_start_could_not_use_is_said_before(
        self, tmp_path: Path, made: str, flags: dict[str, Any], complaint: str
    ) -> None:
        path = tmp_path / "made"
        match made:
            case "pem":
                path.write_text("-----BEGIN PUBLIC KEY-----\nMFkw\n-----END PUBLIC KEY-----\n")
            case "empty":
                path.touch()
            case "fifo":
                os.mkfifo(path)
        given: dict[str, Any] = {"tls-cert-dir": str(tmp_path), "register-secret": "s"}
        if not any(flag.startswith("jwt") for flag in flags):
            given["jwt-hmac-key"] = KEY
        for flag, value in flags.items():
            given[flag] = value and value.replace("PATH", str(path)).replace("FOLDER", str(tmp_path))
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ConfigError, match=re.escape(complaint.replace("PATH", str(path)))):
            require(load(given, {}))
        assert sorted(tmp_path.rglob("*")) == before

    def test_dns_01_without_dnspython_is_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = {"tls-cert-dir": str(tmp_path), "register-secret": "s", "jwt-hmac-key": KEY}
        flags = {**given, **DNS, "acme-domain": "*.a.example", "state-dir": str(tmp_path)}
        require(load(flags, {}))
        monkeypatch.setattr(preflight, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"dns-01 needs dnspython.*portero-py\[dns\]"):
            require(load(flags, {}))

    def test_a_missing_state_directory_is_made_for_its_owner_alone(self, tmp_path: Path) -> None:
        config = replace(serving(tmp_path), state_dir=str(tmp_path / "var" / "state"))
        require(config)
        assert not (tmp_path / "var").exists()
        make_directories(config)
        assert (tmp_path / "var" / "state").stat().st_mode & 0o777 == 0o700
        make_directories(config)
        require(config)
        make_directories(replace(config, state_dir=""))
        with pytest.raises(ConfigError, match=r"--state-dir: cannot make .*: No such file or directory"):
            make_directories(replace(config, state_dir="/proc/1/nothing"))

    def test_a_state_directory_that_cannot_be_written_to_or_made_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may do everything
        with pytest.raises(ConfigError, match=f"--state-dir: cannot write to {tmp_path}"):
            require(replace(serving(tmp_path), state_dir=str(tmp_path)))
        with pytest.raises(ConfigError, match=r"--state-dir: cannot make .*: Permission denied"):
            require(replace(serving(tmp_path), state_dir=str(tmp_path / "new")))

    def test_a_key_of_any_bytes_may_serve(self, tmp_path: Path) -> None:
        assert len(require(serving(tmp_path, hmac_keys=(("", "\udcff" * 32),)))) == 1

    def test_an_openssl_that_cannot_serve_is_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("portero_py.proxy.downstream.sni.CIPHERS", "NO-SUCH-CIPHER")
        with pytest.raises(ConfigError, match="TLS cannot be served with this machine's OpenSSL"):
            require(serving(tmp_path))

    @pytest.mark.parametrize(
        ("flags", "complaint"),
        [
            (
                {"listen-addr": "127.0.0.1:7001", "register-addr": "127.0.0.1:7001"},
                "--register-addr: 127.0.0.1:7001 is taken by --listen-addr",
            ),
            ({"listen-addr": ":7001", "register-addr": "127.0.0.1:7001"}, "--register-addr"),
            ({"listen-addr": "127.0.0.1:7001", "http-addr": "0.0.0.0:7001"}, "--http-addr"),
            ({"listen-addr": ["[::]:7001", "0.0.0.0:7001"]}, "--listen-addr: 0.0.0.0:7001 is taken"),
            ({"listen-addr": f"{'a' * 63}.invalid:7001"}, "--listen-addr: cannot resolve"),
        ],
    )
    def test_addresses_that_cannot_be_bound_side_by_side_are_refused(
        self, flags: dict[str, Any], complaint: str
    ) -> None:
        with pytest.raises(ConfigError, match=complaint):
            rehearse(load(flags, {}))
        with pytest.raises(ConfigError, match=complaint):
            open_sockets(load(flags, {}), {})

    def test_addresses_that_can_be_bound_side_by_side_are_not(self) -> None:
        flags = {"listen-addr": ["127.0.0.1:7001", "[::1]:7001", "127.0.0.2:7001"]}
        rehearse(load({**flags, "register-addr": "127.0.0.3:7001", "http-addr": ":0", "workers": "2"}, {}))

    def test_without_tls_no_certificate_directory_is_needed(self, tmp_path: Path) -> None:
        flags: dict[str, Any] = {"no-tls": True, "tls-cert-dir": str(tmp_path / "gone")}
        flags |= {"jwt-hmac-key": KEY, "register-secret": "s", "http-addr": ":80"}
        assert any("--no-tls" in warning for warning in require(load(flags, {})))


class TestValues:
    @pytest.mark.parametrize(
        ("text", "host", "port"),
        [
            (":443", "", 443),
            ("[::]:443", "::", 443),
            ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
            ("127.0.0.1:0", "127.0.0.1", 0),
            ("localhost:65535", "localhost", 65535),
            (" a_b.example:1 ", "a_b.example", 1),
        ],
    )
    def test_an_address_is_a_host_and_a_port(self, text: str, host: str, port: int) -> None:
        assert values.address(text) == Address(host, port)

    @pytest.mark.parametrize(
        "text",
        [
            *(
                "",
                "443",
                "::1:443",
                "[::1]",
                "[::1]443",
                "[::1",
                "[]:1",
                "[1.2.3.4]:1",
                "host:",
                "host:65536",
            ),
            *(
                "host:-1",
                "host:1x",
                "host: 1",
                "a b:1",
                "http://a:1",
                "1.2.3:4",
                "300.1.1.1:4",
                "host:١",
                "-a:1",
            ),
        ],
    )
    def test_what_is_no_address_is_refused_with_the_forms_that_are(self, text: str) -> None:
        with pytest.raises(BadValueError, match=r"use host:port, \[v6\]:port or :port"):
            values.address(text)

    @pytest.mark.parametrize("text", [":1", "host:0"])
    def test_an_address_to_connect_to_names_both_host_and_port(self, text: str) -> None:
        with pytest.raises(BadValueError, match="must name both"):
            values.connect_address(text)

    @pytest.mark.parametrize(
        ("text", "level"),
        [
            ("info", "info"),
            ("WARN", "warning"),
            ("trace", "debug"),
            ("off", "error"),
            ("", "info"),
            ("warn,portero=debug", "debug"),
            ("portero::proxy=error,info", "error"),
            ("hyper=trace", "info"),
        ],
    )
    def test_portero_s_log_filters_are_understood(self, text: str, level: str) -> None:
        assert values.log_level(text) == level

    @pytest.mark.parametrize("word", ["maybe", "2"])
    def test_a_switch_is_a_clear_word(self, word: str) -> None:
        with pytest.raises(ConfigError, match="must be true or false"):
            load({}, {"PORTERO_NO_TLS": word})

    @pytest.mark.parametrize(("word", "enabled"), [("on", False), ("FALSE", True), ("0", True)])
    def test_a_switch_can_be_turned_off_again(self, word: str, enabled: bool) -> None:
        assert load({}, {"PORTERO_NO_TLS": word}).tls.enabled is enabled

    @pytest.mark.parametrize("text", ["kid", "=key", "kid=", "a b=key"])
    def test_a_named_key_needs_both_halves(self, text: str) -> None:
        with pytest.raises(BadValueError, match="KID=KEY"):
            values.named_key(text)

    def test_control_characters_are_not_repeated_in_a_complaint(self) -> None:
        with pytest.raises(BadValueError) as caught:
            values.address("a\x1b[31m\nb:1")
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("/bin/hook word", "must be a list of words"),
        ([], "must name a program"),
        ([""], "must name a program"),
        (["/bin/hook", 1], "must be a list of words"),
        (["./hook"], "by a whole path, or by its name alone"),
        (["/bin/hook", "a\n"], "control characters"),
        ({"a": 1}, "must be a list of words"),
    ],
)
def test_a_command_that_is_none_says_why(value: object, complaint: str) -> None:
    with pytest.raises(BadValueError, match=complaint):
        values.command(value)


def test_a_command_is_words_that_no_shell_sees() -> None:
    assert values.command("/bin/hook") == ("/bin/hook",)
    assert values.command(["/bin/hook", "$(id)", ""]) == ("/bin/hook", "$(id)", "")
    assert values.shape_command("/bin/hook 'a b'") == ["/bin/hook", "a b"]
    assert values.shape_command("/bin/hook 'a b") == "/bin/hook 'a b"


def test_a_server_that_looks_names_up_has_no_name() -> None:
    assert values.ip_port("192.0.2.1:53") == Address("192.0.2.1", 53)
    with pytest.raises(BadValueError, match="must be an IP address and a port"):
        values.ip_port("ns.example:53")
