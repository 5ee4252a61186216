"""What ACME keeps on disk: the account, and for each certificate its progress, its key and the issued pair.

    <state dir>/acme/<CA>/account.json              key, address, and during a rollover the next key
    <state dir>/acme/<CA>/account.lock              shared by who orders, exclusive for who changes the key
    <state dir>/acme/<CA>/<name>/progress.json      `core.acme.progress`
    <state dir>/acme/<CA>/<name>/order.key          the private key of the order that is going on
    <state dir>/acme/<CA>/<name>/pair.pem           key and chain that were issued last, in one file
    <state dir>/acme/<CA>/<name>/lock               `locks`
    <state dir>/acme/<CA>/<name>/dns.json           DNS records that were made for it, and not removed yet
    <state dir>/acme/<CA>/records/<digest>.lock     one program at a time for each DNS record

The folder of a wildcard is `_wildcard.<name>`, as in the certificate directory.

The rules
- Files are 0600, folders 0700, and a file is replaced by a rename after its bytes are on the disk: it holds
  the old content or the new one, whatever happens. A full disk leaves the old one.
- A key is on the disk before the CA hears of it.
- Everything that goes wrong is a `StateUnwritable`, in one line. A progress file that cannot be read counts
  as none: the pair beside it still says that a certificate exists, so nothing is ordered because of that.

Everything here blocks: it runs in ACME's thread, or in a command.
"""

from __future__ import annotations

import json
import logging
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from portero_py.control.regular_files import UnfitFileError, read_regular
from portero_py.core.acme import dns_records
from portero_py.core.acme.dns_records import TxtRecord
from portero_py.core.acme.names import orderable
from portero_py.core.acme.progress import Progress, from_json
from portero_py.core.certificate_pairs import parse_pair
from portero_py.core.certificates import Certificate, folder_name, folder_of
from portero_py.errors import BadCertificate, StateUnwritable

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_FILE: Final = 1 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Account:
    """`url` is "" before the CA knows the key; `next_key_pem` is there while the key is being changed."""

    key_pem: bytes = field(repr=False)
    url: str = ""
    next_key_pem: bytes = field(default=b"", repr=False)


class AcmeFiles:
    """One CA's folder in the state directory; `directory_url` says which CA."""

    def __init__(self, state_dir: str | Path, directory_url: str) -> None:
        host = re.sub(r"[^a-z0-9.-]", "-", (urlsplit(directory_url).hostname or "ca").lower())
        mark = sha256(directory_url.encode()).hexdigest()[:8]
        self.root = Path(state_dir) / "acme" / f"{host}-{mark}"

    # The account

    @property
    def account_lock(self) -> Path:
        """The file that is locked while the account's key is in use."""
        return self.root / "account.lock"

    def account(self) -> Account | None:
        """The account, or None. Raises StateUnwritable when there is one that cannot be read."""
        text = read(self.root / "account.json")
        if text is None:
            return None
        try:
            document: dict[str, Any] = decoded(text)
            return Account(
                document["key"].encode(), str(document["url"]), document.get("next_key", "").encode()
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            # Not to be replaced by a new one: the old key may be all that can revoke certificates.
            raise StateUnwritable(f"{self.root / 'account.json'} is damaged: restore or remove it") from error

    def save_account(self, account: Account) -> None:
        """Keep the account."""
        document = {"url": account.url, "key": account.key_pem.decode()}
        if account.next_key_pem:
            document["next_key"] = account.next_key_pem.decode()
        write(self.root / "account.json", json.dumps(document, indent=1).encode())

    # One certificate

    def names(self) -> list[str]:
        """The certificates that there is anything about."""
        try:
            found = (folder_name(path.name) for path in self.root.iterdir() if path.is_dir())
            return sorted(name for name in found if name and orderable(name))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _cannot("read", self.root, error) from error

    def folder(self, name: str) -> Path:
        """Where everything about it is."""
        return self.root / folder_of(name)

    def lock(self, name: str) -> Path:
        """The lock file of one certificate."""
        return self.folder(name) / "lock"

    def progress(self, name: str) -> Progress:
        """How far the certificate has come."""
        path = self.folder(name) / "progress.json"
        text = read(path)
        try:
            return from_json(decoded(text)) if text is not None else Progress()
        except ValueError as error:
            _log.error("%s is damaged, and counts as missing: %s", path, error)
            return Progress()

    def save_progress(self, name: str, progress: Progress) -> None:
        """Keep how far it has come."""
        write(self.folder(name) / "progress.json", json.dumps(progress.to_json(), indent=1).encode())

    def order_key(self, name: str) -> bytes | None:
        """The key of the order that is going on, PEM."""
        return read(self.folder(name) / "order.key")

    def save_order_key(self, name: str, key_pem: bytes) -> None:
        """Keep the key of the order that is about to begin."""
        write(self.folder(name) / "order.key", key_pem)

    def pair(self, name: str) -> Certificate | None:
        """The pair that was issued last, or None."""
        path = self.folder(name) / "pair.pem"
        content = read(path)
        if content is None:
            return None
        try:
            return _parsed(name, content, str(path))
        except BadCertificate as error:
            _log.error("%s is damaged, and counts as missing: %s", path, error)
            return None

    def save_pair(self, name: str, chain_pem: bytes, key_pem: bytes) -> None:
        """Keep an issued pair."""
        write(self.folder(name) / "pair.pem", key_pem.rstrip() + b"\n" + chain_pem)

    # DNS records

    def record_lock(self, record_name: str) -> Path:
        """The file that is locked while a program is at a DNS record."""
        return self.root / "records" / f"{sha256(record_name.encode()).hexdigest()[:32]}.lock"

    def dns_records(self, name: str) -> list[TxtRecord]:
        """The records that were made for a certificate, or were about to be, and are not known to be gone."""
        path = self.folder(name) / "dns.json"
        text = read(path)
        try:
            return dns_records.from_json(decoded(text)) if text is not None else []
        except ValueError as error:
            _log.error("%s is damaged, and counts as missing: %s", path, error)
            return []

    def save_dns_records(self, name: str, records: list[TxtRecord]) -> None:
        """Keep which records there are; without any the file is removed."""
        path = self.folder(name) / "dns.json"
        if records:
            write(path, json.dumps(dns_records.to_json(records), indent=1).encode())
            return
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _cannot("remove", path, error) from error


def read(path: Path) -> bytes | None:
    """A small file's bytes, None when there is no such file. Raises StateUnwritable."""
    try:
        return read_regular(path, MAX_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnfitFileError as error:
        raise StateUnwritable(f"{path} {error}") from error
    except OSError as error:
        raise _cannot("read", path, error) from error


def decoded(text: bytes) -> Any:
    """The document in a JSON file. Raises ValueError, whatever is wrong with it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace a file's content, whole or not at all. Raises StateUnwritable; the old file is there then.

    Its folder is made, 0700. Two writers of one file must exclude each other.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        make_folder(path.parent)
        with _removed_on_error(part):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with os.fdopen(os.open(part, flags, mode), "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _cannot("write", path, error) from error


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, 0700. Raises OSError."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


# Private


@lru_cache(maxsize=2048)  # each is looked at every half minute, and changes every two months
def _parsed(name: str, content: bytes, origin: str) -> Certificate:
    return parse_pair(name, content, content, origin)


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:  # raised on: half a file is of no use, whatever cut it off
        path.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot(verb: str, path: Path, error: OSError) -> StateUnwritable:
    return StateUnwritable(f"cannot {verb} {path}: {os.strerror(error.errno or 0)}")
