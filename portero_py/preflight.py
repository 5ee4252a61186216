"""What must hold before portero serves: secrets that are secret, directories that can be read.

`require` raises for what would be unsafe or useless, and returns warnings about what is only unwise. Neither
ever shows a secret.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from portero_py.config import Config, Registration
from portero_py.control.state_dir import existing, require_state_dir
from portero_py.core.acme_names import overlapping
from portero_py.errors import ConfigError

#: What example files carry, and attackers try first.
EXAMPLE_SECRET: Final = "changeme"  # noqa: S105 - the one that is refused

#: RFC 7518, 3.2: an HS256 key must be at least as long as the hash, bytes.
SHORT_KEY: Final = 32


def require(config: Config) -> list[str]:
    """The warnings about `config`. Raises `ConfigError` when portero must not or cannot serve with it."""
    _require_directories(config)
    if config.acme.enabled:
        _require_acme(config)
    warnings = _require_secrets(config.registration)
    if config.plain_http.listen is not None and not config.tls.enabled:
        warnings.append("--http-addr redirects to https, which --no-tls leaves to somebody else")
    if config.plain_http.acme_upstream is not None and config.plain_http.listen is None:
        warnings.append("--acme-upstream does nothing without --http-addr")
    if config.proxy.upstream_ca_file and not config.proxy.upstream_tls_verify:
        warnings.append("--upstream-ca-file does nothing without --upstream-tls-verify")
    if not config.proxy.upstream_tls_verify:
        warnings.append(
            "backends reached over TLS are verified only where they pin their certificate (tls_fingerprint); "
            "--upstream-tls-verify checks the others"
        )
    return warnings


def missing(flag: str) -> str:
    """What to do about a secret that is nowhere."""
    return f"--{flag} is missing: set it, PORTERO_{flag.upper().replace('-', '_')}, or --{flag}-file FILE"


# Private


def _require_directories(config: Config) -> None:
    if config.tls.enabled:
        _list(config.tls.cert_dir, "tls-cert-dir")
    if config.state_dir:
        require_state_dir(config.state_dir)
    _require_file(config.proxy.upstream_ca_file, "upstream-ca-file")


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
    _require_file(acme.ca_file, "acme-ca-file")
    state_dir = str(existing(config.state_dir))
    for directory, flag in ((state_dir, "state-dir"), (config.tls.cert_dir, "tls-cert-dir")):
        if not os.access(directory, os.W_OK | os.X_OK):
            raise ConfigError(f"--{flag}: cannot write to {directory}, which --{asked} needs")


def _require_file(path: str, flag: str) -> None:
    if path:
        try:
            Path(path).open("rb").close()
        except OSError as error:
            raise ConfigError(_cannot_read(flag, path, error)) from None


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
        if secret == EXAMPLE_SECRET:
            if not registration.listen.is_loopback:
                raise ConfigError(
                    f'--{flag} is the example "{EXAMPLE_SECRET}", and the registration API listens on '
                    f"{registration.listen}, outside loopback: choose another"
                )
            warnings.append(f'--{flag} is the example "{EXAMPLE_SECRET}": choose another one')
        elif flag != "register-secret" and len(secret.encode()) < SHORT_KEY:
            warnings.append(f"--{flag} is shorter than the {SHORT_KEY} bytes that RFC 7518, 3.2 asks for")
    return warnings
