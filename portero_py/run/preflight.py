"""What must hold before portero serves: secrets that are secret, files and directories that can be used.

`require` raises for what would be unsafe or useless, and returns warnings about what is only unwise. Neither
ever shows a secret. The start, `--check` and a reload all ask it, so that they agree: whatever it is that the
start refuses is tried here, with the code that the start uses. (Ports are not: a portero that runs has them.
`sockets.rehearse` looks at the rest of them.) It changes nothing; `make_directories` is for the start alone.
"""

from __future__ import annotations

import errno
import os
import re
import ssl
import stat
from base64 import b64decode
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from portero_py.config.model import Acme, Config, Registration
from portero_py.core.acme.names import has_wildcard, overlapping
from portero_py.errors import ConfigError
from portero_py.proxy.downstream.sni import FrontTls
from portero_py.proxy.downstream.ticket_keys import setter
from portero_py.proxy.upstream.tls import UpstreamTls

#: What example files carry, and attackers try first.
EXAMPLE_SECRET: Final = "changeme"  # noqa: S105 - the one that is refused

#: RFC 7518, 3.2: an HS256 key must be at least as long as the hash, bytes.
SHORT_KEY: Final = 32

#: A key that is certainly no PEM, DER, JWK or SSH key, which are refused: each has other characters.
_PLAIN_KEY: Final = re.compile(r"(?!ssh-|ecdsa-)(?!.*----)[A-Za-z0-9+/=_.:~-]+", re.ASCII)

_BASE64URL: Final = re.compile(r"[A-Za-z0-9_-]+={0,2}", re.ASCII)


def require(config: Config) -> list[str]:
    """The warnings about `config`. Raises `ConfigError` when portero must not or cannot serve with it."""
    _require_directories(config)
    _require_tls(config)
    if config.acme.enabled:
        _require_acme(config)
    warnings = _require_secrets(config.registration)
    if config.plain_http.listen is not None and not config.tls.enabled:
        warnings.append("--http-addr redirects to https, which --no-tls leaves to somebody else")
    if config.plain_http.acme_upstream is not None and config.plain_http.listen is None:
        warnings.append("--acme-upstream does nothing without --http-addr")
    if config.tls.enabled and config.workers > 1 and setter() is None:
        warnings.append(
            "this Python does not let session ticket keys be set: when they change, a client's session is "
            "known to one worker only, and it shakes hands in full with the others"
        )
    if config.proxy.upstream_ca_file and not config.proxy.upstream_tls_verify:
        warnings.append("--upstream-ca-file does nothing without --upstream-tls-verify")
    if not config.proxy.upstream_tls_verify:
        warnings.append(
            "backends reached over TLS are verified only where they pin their certificate (tls_fingerprint); "
            "--upstream-tls-verify checks the others"
        )
    warnings += _shared_cookies(config)
    return warnings


def make_directories(config: Config) -> None:
    """Make the state directory, for portero alone, when it is missing. Raises `ConfigError`."""
    if config.state_dir:
        try:
            Path(config.state_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(_cannot_make(config.state_dir, error.errno)) from None


def missing(flag: str) -> str:
    """What to do about a secret that is nowhere."""
    return f"--{flag} is missing: set it, PORTERO_{flag.upper().replace('-', '_')}, or --{flag}-file FILE"


# Private


def _require_directories(config: Config) -> None:
    if config.tls.enabled:
        _list(config.tls.cert_dir, "tls-cert-dir")
    if config.state_dir:
        _require_state_dir(config.state_dir)
    _require_file(config.proxy.upstream_ca_file, "upstream-ca-file")


def _require_state_dir(directory: str) -> None:
    """It can be listed and written to, or made."""
    if os.path.lexists(directory):
        _list(directory, "state-dir")
        if not os.access(directory, os.W_OK | os.X_OK):
            raise ConfigError(f"--state-dir: cannot write to {directory}")
        return
    above = next(path for path in Path(directory).absolute().parents if os.path.lexists(path))
    if not above.is_dir():
        raise ConfigError(_cannot_make(directory, errno.ENOTDIR))
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(_cannot_make(directory, errno.EACCES))


def _cannot_make(directory: str, number: int | None) -> str:
    return f"--state-dir: cannot make {directory}: {os.strerror(number or 0)}"


def _require_tls(config: Config) -> None:
    UpstreamTls(config.proxy)
    if config.tls.enabled:
        try:
            FrontTls(config.tls)
        except ssl.SSLError as error:  # OpenSSL's own configuration may forbid what the listener needs
            raise ConfigError(f"TLS cannot be served with this machine's OpenSSL: {error}") from None


def _require_acme(config: Config) -> None:
    acme = config.acme
    asked = "acme-domain" if acme.domains else "acme-on-register"
    if not config.tls.enabled:
        raise ConfigError(f"--{asked} does nothing with --no-tls: leave one of them out")
    if not config.state_dir:
        raise ConfigError(f"--{asked} needs --state-dir: keys and progress are kept there")
    if not acme.agree_tos:
        raise ConfigError(
            f"--{asked} needs --acme-agree-tos: read the terms of service that {acme.directory} names"
        )
    if acme.challenge == "http-01" and config.plain_http.listen is None:
        raise ConfigError("--acme-challenge http-01 needs --http-addr: the CA asks on port 80")
    twice = overlapping(acme.domains)
    if twice:
        raise ConfigError(f"--acme-domain: {twice} is given twice")
    if bool(acme.eab_kid) != bool(acme.eab_hmac):
        raise ConfigError("--acme-eab-kid and --acme-eab-hmac-file belong together: one is missing")
    if acme.eab_hmac and not _BASE64URL.fullmatch(acme.eab_hmac):
        raise ConfigError("--acme-eab-hmac-file holds no base64url: copy it as the CA gave it")
    _require_dns01(acme)
    _require_file(acme.ca_file, "acme-ca-file")
    if acme.ca_file:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=acme.ca_file)
        except ssl.SSLError:
            raise ConfigError(f"--acme-ca-file {acme.ca_file}: no usable PEM certificates in it") from None
        except OSError as error:  # it can be opened, and not be read
            raise ConfigError(_cannot_read("acme-ca-file", acme.ca_file, error)) from None
    if not os.access(config.tls.cert_dir, os.W_OK | os.X_OK):
        raise ConfigError(f"--tls-cert-dir: cannot write to {config.tls.cert_dir}, which --{asked} needs")


def _require_dns01(acme: Acme) -> None:
    if acme.dns_hook and acme.dns_server is not None:
        raise ConfigError("--acme-dns-hook and --acme-dns-server are both given: use one of them")
    wildcard = next((name for group in acme.domains for name in group if has_wildcard((name,))), "")
    if wildcard and acme.challenge not in {"auto", "dns-01"}:
        raise ConfigError(f"--acme-challenge {acme.challenge} cannot validate {wildcard}: use auto or dns-01")
    if not acme.has_dns:
        if wildcard or acme.challenge == "dns-01":
            asked = f"--acme-domain {wildcard}" if wildcard else "--acme-challenge dns-01"
            raise ConfigError(f"{asked} needs DNS records: set --acme-dns-hook or --acme-dns-server")
        return
    if find_spec("dns") is None:  # it is loaded by who uses it
        raise ConfigError("dns-01 needs dnspython, which is not installed: pip install 'portero-py[dns]'")
    if acme.dns_hook:
        from portero_py.control.acme.dns01.hook import unfit  # for those who have one

        problem = unfit(acme.dns_hook[0])
        if problem:
            raise ConfigError(f"--acme-dns-hook: {problem}")
    if bool(acme.dns_tsig_name) != bool(acme.dns_tsig_secret):
        raise ConfigError(
            "--acme-dns-tsig-name and --acme-dns-tsig-secret-file belong together: one is missing"
        )
    try:
        b64decode(acme.dns_tsig_secret, validate=True)
    except ValueError:
        raise ConfigError("--acme-dns-tsig-secret-file holds no base64: copy the key's secret") from None


def _require_file(path: str, flag: str) -> None:
    """A plain file that can be read: OpenSSL, which is given its path, would wait for a pipe for ever."""
    if path:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(_cannot_read(flag, path, error)) from None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"--{flag}: {path} is not a regular file")
        finally:
            os.close(descriptor)


def _list(directory: str, flag: str) -> None:
    try:
        with os.scandir(directory) as entries:
            next(entries, None)
    except OSError as error:
        raise ConfigError(_cannot_read(flag, directory, error)) from None


def _cannot_read(flag: str, path: str, error: OSError) -> str:
    return f"--{flag}: cannot read {path}: {os.strerror(error.errno or 0)}"


def _require_secrets(registration: Registration) -> list[str]:
    warnings = []
    keys = [("jwt-named-key" if kid else "jwt-hmac-key", key) for kid, key in registration.hmac_keys]
    for flag, secret in (("register-secret", registration.secret), *(keys or [("jwt-hmac-key", "")])):
        if not secret:
            raise ConfigError(missing(flag))
        if flag != "register-secret":
            _require_key(flag, secret)
        if secret == EXAMPLE_SECRET:
            if not registration.listen.is_loopback:
                raise ConfigError(
                    f'--{flag} is the example "{EXAMPLE_SECRET}", and the registration API listens on '
                    f"{registration.listen}, outside loopback: choose another"
                )
            warnings.append(f'--{flag} is the example "{EXAMPLE_SECRET}": choose another one')
        elif flag != "register-secret" and len(secret.encode("utf-8", "surrogateescape")) < SHORT_KEY:
            warnings.append(f"--{flag} is shorter than the {SHORT_KEY} bytes that RFC 7518, 3.2 asks for")
    return warnings


def _require_key(flag: str, key: str) -> None:
    if _PLAIN_KEY.fullmatch(key):
        return
    from portero_py.core.auth import TokenVerifier  # 12 MB that this process would keep, for an odd key only

    try:
        TokenVerifier([("", key)])
    except ConfigError as error:
        raise ConfigError(f"--{flag}: {error}") from None


def _shared_cookies(config: Config) -> list[str]:
    """Of services with one host: each would take the place of the other's cookie, and nobody would stay."""
    cookies = {
        service.name: service.policy.sticky.cookie
        for service in config.services
        if service.policy.sticky is not None and service.policy.sticky.mode == "insert"
    }
    found: dict[tuple[str, str], list[str]] = {}
    services_of = [(name, name) for name in cookies]
    services_of += [(route.host, route.service) for route in config.routes if route.service in cookies]
    for host, service in dict.fromkeys(services_of):
        found.setdefault((host, cookies[service]), []).append(service)
    return [
        f"the services {' and '.join(names)} have the host {host} and the sticky cookie {cookie} in common: "
        "they need cookies of different names, or no client stays with a backend of either"
        for (host, cookie), names in found.items()
        if len(names) > 1
    ]
