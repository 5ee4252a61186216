"""`portero-py certs`: what is served, by whom it was made and until when; the doctor; the ACME account's key.

They read the same files as a running portero, and need no connection to it. What they change (`rollover`,
`revoke`) a running portero sees at its next look, within half a minute.
"""

from __future__ import annotations

import hashlib
import socket
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Final, TypeVar

from cryptography import x509

from portero_py.cli.challenges import examine, group_of
from portero_py.config import sources
from portero_py.control.acme.files import AcmeFiles
from portero_py.control.acme.folder import CertificateFolder
from portero_py.control.acme.locks import Lock, account_in_use
from portero_py.control.acme.pairs import held
from portero_py.control.certificates.store import CertificateStore
from portero_py.core.acme.names import orderable
from portero_py.core.acme.schedule import ends_soon, renewal_time
from portero_py.core.names import normalise_service_name, wildcard_over
from portero_py.errors import Busy, CaRefused, ConfigError
from portero_py.proxy.downstream.sni import Trial, load_pair, shake_hands

if TYPE_CHECKING:
    from portero_py.config.model import Address, Config
    from portero_py.config.sources import Environ, Flags
    from portero_py.control.certificates.files import Entry
    from portero_py.core.acme.progress import Progress
    from portero_py.core.certificates import Certificate

#: Seconds that a command waits for orders that are going on.
PATIENCE: Final = 60.0
_CONNECT_TIMEOUT: Final = 5.0

_Done = TypeVar("_Done")


def show(config: Config) -> int:
    """Print the certificates, and everything that is wrong with them; 0 when nothing is, else 2."""
    inventory = CertificateStore(config.tls.cert_dir, trial=Trial(config.tls)).check()
    for entry in inventory.entries:
        if entry.certificate is not None:
            _show(config, entry, entry.certificate)
    missing = [group for group in config.acme.domains if not _is_there(inventory.entries, group[0])]
    for group in missing:
        _say(f"no certificate yet for {', '.join(group)}: ACME is to bring one")
        _show_failure(_progress(config, group[0]))
    for warning in inventory.warnings:
        _say(f"warning: {warning}")
    problems = inventory.problems
    if config.acme.enabled and not inventory.entries and not inventory.problem:
        problems = []  # the first start: there will be some
    for problem in problems:
        _say(f"error: {problem}")
    return 2 if problems else 0


def certs(flags: Flags, environ: Environ) -> int:
    """Print the certificates; 0 when all is well with them, else 2."""
    return show(sources.load(flags, environ))


def check(flags: Flags, environ: Environ, name: str) -> int:
    """Examine what is served for `name`, one line a finding; 0 when all is well, else 1."""
    config = sources.load(flags, environ)
    host = normalise_service_name(name)
    if host is None:
        raise ConfigError(f'"{name}" is no host name')
    inventory = CertificateStore(config.tls.cert_dir, trial=Trial(config.tls)).check()
    if inventory.problem:
        raise ConfigError(inventory.problem)
    entry = _entry_for(inventory.entries, host)
    findings = _Findings()
    if entry is None:
        findings.bad(f"no folder or file in {config.tls.cert_dir} is for {host}")
    else:
        _examine(findings, entry, host)
    _examine_acme(findings, config, host)
    served = entry.certificate if entry is not None else None
    _examine_listener(findings, config.proxy.listen[0], host, served)
    return 1 if findings.worst else 0


def rollover(flags: Flags, environ: Environ) -> str:
    """Give the ACME account another key."""
    config, files = _with_account(flags, environ)
    from portero_py.control.acme.account import change_key

    url = _patiently(lambda: change_key(config.acme, files))
    return f"the account {url} has a new key; a running portero uses it from its next request on"


def revoke(flags: Flags, environ: Environ, name: str) -> str:
    """Revoke the certificate that ACME brought for `name`, and have it replaced."""
    config, files = _with_account(flags, environ)
    host = normalise_service_name(name) or ""
    pair = files.pair(host) if orderable(host) else None
    if pair is None:
        raise ConfigError(f"{name}: ACME has brought no certificate whose folder has that name")
    _patiently(lambda: _revoke(config, files, host, pair))
    return (
        f"revoked: {host}, {pair.fingerprint}\n"
        "A running portero that looks after the name replaces it within half a minute, at once after SIGHUP, "
        "and serves it until then. If nobody is to replace it, remove its folder."
    )


# Private: the list


def _show(config: Config, entry: Entry, certificate: Certificate) -> None:
    days = (certificate.not_after - time.time()) / 86400
    until = time.strftime("%Y-%m-%d", time.gmtime(certificate.not_after))
    names = ", ".join(certificate.names)
    _say(f"certificate {entry.name}: {names}; until {until} ({days:.0f} days left); {entry.origin}")
    progress = _progress(config, entry.name)
    if progress is None or not _is_by_acme(config, entry.name):
        _say(f"  issuer: {certificate.issuer}; from a file")
        return
    renewal = "now: it was revoked" if progress.revoked else _day(renewal_time(held(certificate), progress))
    why = f"; the CA says why: {progress.why}" if progress.why else ""
    _say(f"  issuer: {certificate.issuer}; by ACME; next renewal: {renewal}{why}")
    _show_failure(progress)


def _show_failure(progress: Progress | None) -> None:
    if progress is not None and progress.error:
        _say(
            f"  last error, {_moment(progress.failed_at)} ({progress.reason}): {progress.error}; "
            f"next attempt: {_moment(progress.retry_at) if progress.retry_at else 'now'}"
        )


def _is_there(entries: tuple[Entry, ...], name: str) -> bool:
    return any(entry.name == name and entry.certificate is not None for entry in entries)


def _progress(config: Config, name: str) -> Progress | None:
    """What ACME knows about the name; None without a state directory, or when it knows nothing."""
    if not config.state_dir or not orderable(name):
        return None
    files = AcmeFiles(config.state_dir, config.acme.directory)
    return files.progress(name) if (files.folder(name) / "progress.json").exists() else None


def _is_by_acme(config: Config, name: str) -> bool:
    served, is_ours = CertificateFolder(config.tls.cert_dir).served(name)
    return served is not None and is_ours


# Private: the doctor


class _Findings:
    """What was found, printed as it comes."""

    def __init__(self) -> None:
        self.worst = False

    def good(self, text: str) -> None:
        _say(f"ok: {text}")

    def bad(self, text: str) -> None:
        self.worst = True
        _say(f"bad: {text}")


def _entry_for(entries: tuple[Entry, ...], host: str) -> Entry | None:
    for name in (host, wildcard_over(host)):
        for entry in entries:
            if entry.name == name:
                return entry
    for entry in entries:
        if entry.certificate is not None and entry.certificate.covers(host):
            return entry
    return None


def _examine(findings: _Findings, entry: Entry, host: str) -> None:
    if entry.problem:
        findings.bad(f"{entry.origin} cannot be used: {entry.problem}")
    certificate = entry.certificate
    if certificate is None:
        return
    findings.good(f"{entry.origin}: the key belongs to the certificate; issuer {certificate.issuer}")
    listed = [name for name in (host, wildcard_over(host)) if name in certificate.names]
    if listed:
        findings.good(f"it is for {listed[0]}")
    else:
        findings.bad(f"it is not for {host} but for {', '.join(certificate.names[:5]) or 'no name at all'}")
    now = time.time()
    days = (certificate.not_after - now) / 86400
    if now >= certificate.not_after:
        findings.bad(f"it has expired on {_day(certificate.not_after)}")
    elif now < certificate.not_before:
        findings.bad(f"it is not valid before {_moment(certificate.not_before)}: is the clock right?")
    elif ends_soon(certificate.not_before, certificate.not_after, now):
        findings.bad(f"it ends soon, on {_day(certificate.not_after)}, in {days:.1f} days")
    else:
        findings.good(f"it is valid until {_day(certificate.not_after)}, for {days:.0f} days")
    _examine_chain(findings, certificate, host)


def _examine_chain(findings: _Findings, certificate: Certificate, host: str) -> None:
    chain = x509.load_pem_x509_certificates(certificate.chain_pem)
    for number, (below, above) in enumerate(pairwise(chain), 1):
        try:
            below.verify_directly_issued_by(above)
        except Exception:  # an unknown algorithm, a key of another kind, ...: it vouches for nothing
            findings.bad(f"certificate {number} of the chain was not issued by certificate {number + 1}")
            return
    complaint = _untrusted(certificate, host)
    if not complaint:
        findings.good(f"the chain is complete ({len(chain)}): this machine trusts it")
    elif certificate.self_signed:
        findings.bad("it is its own issuer: nobody trusts it who was not told to")
    elif len(chain) == 1:
        findings.bad("the chain has no intermediate certificate: is it a fullchain?")
    else:
        findings.bad(f"the chain ends in nothing that this machine trusts: {complaint}")


def _untrusted(certificate: Certificate, host: str) -> str:
    """Why a client on this machine would not trust it, "" if it would: a handshake in memory."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.create_default_context()
    client.check_hostname = False  # names are looked at by themselves
    try:
        load_pair(server, certificate.chain_pem, certificate.key_pem)
        shake_hands(client, server, host.removeprefix("*."))
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    except ssl.SSLError as error:
        return str(error.reason)
    return ""


def _examine_acme(findings: _Findings, config: Config, host: str) -> None:
    group = group_of(config, host)
    progress = _progress(config, group[0] if group else host)
    if progress is not None and progress.error:
        retry = _moment(progress.retry_at) if progress.retry_at else "now"
        findings.bad(f"ACME failed on {_moment(progress.failed_at)}: {progress.error}; next attempt: {retry}")
    elif progress is not None:
        findings.good("ACME has nothing to complain of")
    examine(findings, config, host)


def _examine_listener(findings: _Findings, address: Address, host: str, wanted: Certificate | None) -> None:
    where = address.host if address.host not in {"", "::", "0.0.0.0"} else "localhost"  # noqa: S104 - compared
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((where, address.port), timeout=_CONNECT_TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname=host.replace("*", "portero-check")) as tls,
        ):
            shown = tls.getpeercert(binary_form=True) or b""
    except ssl.SSLError as error:
        findings.bad(f"the listener at {address} refuses {host}: {error.reason}")
        return
    except OSError as error:
        findings.bad(f"nothing listens at {address}: {error.strerror or error}")
        return
    if wanted is not None and hashlib.sha256(shown).hexdigest() == wanted.fingerprint:
        findings.good(f"the listener at {address} presents it")
    else:
        findings.bad(f"the listener at {address} presents another certificate, for {_subject(shown)}")


def _subject(certificate: bytes) -> str:
    """For whom a stranger's certificate (DER) is, in words."""
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        try:
            listed = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return parsed.subject.rfc4514_string()
        return ", ".join(listed.get_values_for_type(x509.DNSName)[:3]) or parsed.subject.rfc4514_string()
    except Exception as error:  # whatever the library makes of what somebody else presents
        return f"nobody can tell whom ({type(error).__name__})"


# Private: the account


def _with_account(flags: Flags, environ: Environ) -> tuple[Config, AcmeFiles]:
    config = sources.load(flags, environ)
    if not config.state_dir:
        raise ConfigError("--state-dir is missing: the ACME account is kept there")
    files = AcmeFiles(config.state_dir, config.acme.directory)
    if files.account() is None:
        raise ConfigError(f"there is no ACME account for {config.acme.directory} in {config.state_dir}")
    return config, files


def _revoke(config: Config, files: AcmeFiles, name: str, pair: Certificate) -> None:
    from portero_py.control.acme.account import open_client

    lock = Lock(files.lock(name))
    lock.acquire(time.time())
    try:
        with account_in_use(files.account_lock):
            client = open_client(config.acme, files)
            try:
                client.revoke(pair.chain_pem, 0)
            except CaRefused as error:
                if error.problem != "alreadyRevoked":
                    raise
            finally:
                client.close()
        files.save_progress(name, replace(files.progress(name), revoked=True, retry_at=0.0))
    finally:
        lock.release()


def _patiently(act: Callable[[], _Done]) -> _Done:
    """Do it, and wait for whoever is at it. Raises AcmeError."""
    ends = time.monotonic() + PATIENCE
    while True:
        try:
            return act()
        except Busy:
            if time.monotonic() > ends:
                raise
        time.sleep(0.5)


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(moment))


def _moment(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
