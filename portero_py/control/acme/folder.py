"""The certificate directory as ACME writes it: in the usual layout, and never over somebody else's work.

A folder that portero filled holds `.portero-acme`, with the fingerprints of the certificate it put there and
of the one before, and the address of the CA's directory. The certificate that is served counts as portero's
only while its fingerprint is one of these; anything else was put there by a person or another program, and is
left alone from then on. The address says who issued it: a pair of the test CA is not taken for one of the
real CA when the state directory is lost.

The order of writing: mark, key, chain. Between the last two the pair does not fit, so the certificate store
keeps what it had; after a crash there the start completes it (`Acme.recover`), before certificates are read.
"""

from __future__ import annotations

import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from portero_py.control.acme import files
from portero_py.core.acme.schedule import Held
from portero_py.core.certificate_pairs import parse_pair
from portero_py.core.certificates import Certificate, folder_name, folder_of
from portero_py.errors import BadCertificate, StateUnwritable

MARK: Final = ".portero-acme"
_CHAIN: Final = "fullchain.pem"
_KEY: Final = "privkey.pem"
_OTHER_CHAIN: Final = "cert.pem"
_PARTS: Final = (_CHAIN, _OTHER_CHAIN, _KEY)
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")

#: Name -> the paths that stand for it, however they are spelled.
Entries = dict[str, list[Path]]


class CertificateFolder:
    """Where the certificates of `cert_dir` come from, and how one more gets there. It blocks.

    `directory_url` is the CA that issues what is installed.
    """

    def __init__(self, cert_dir: str | Path, directory_url: str = "") -> None:
        self._cert_dir = Path(cert_dir)
        self._directory_url = directory_url

    def entries(self) -> Entries:
        """Every path in the directory by the name that it stands for. Raises StateUnwritable."""
        try:
            paths = sorted(self._cert_dir.iterdir())
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise StateUnwritable(f"cannot read {self._cert_dir}: {reason}") from error
        found: Entries = {}
        for path in paths:
            for name in (folder_name(path.name), folder_name(path.stem) if path.suffix == ".pem" else None):
                if name:
                    found.setdefault(name, []).append(path)
        return found

    def served(self, name: str, entries: Entries | None = None) -> tuple[Held | None, bool]:
        """What is there for `name`, and whether portero put it there: (None, True) when there is nothing.

        Files that are no certificate count as somebody else's. `entries` spares reading the directory once
        more. Raises StateUnwritable when it cannot be read.
        """
        own = self._own(name)
        for path in (self.entries() if entries is None else entries).get(name, []):
            if path != own and (path.is_file() or any((path / part).exists() for part in _PARTS)):
                return _found(path / _CHAIN if path.is_dir() else path), False
        if not any((own / part).exists() for part in _PARTS):
            return None, True
        fingerprints = self._fingerprints(name)
        if not (own / _CHAIN).exists():
            # A key alone, of ours: the end of an installation that broke off.
            return None, bool(fingerprints) and not (own / _OTHER_CHAIN).exists()
        found = _found(own / _CHAIN)
        return found, found.fingerprint in fingerprints

    def own_pair(self, name: str) -> Certificate | None:
        """The pair that this CA issued to portero for `name`, when it is whole; None otherwise.

        Raises StateUnwritable.
        """
        mark = self._mark(name)
        if not self._directory_url or self._directory_url not in mark:
            return None
        own = self._own(name)
        chain, key = files.read(own / _CHAIN), files.read(own / _KEY)
        if chain is None or key is None:
            return None
        try:
            found = parse_pair(name, chain, key, str(own))
        except BadCertificate:
            return None
        return found if found.fingerprint in mark else None

    def install(self, certificate: Certificate) -> None:
        """Put a pair in its folder. Raises StateUnwritable; what was served before is still there then.

        The caller has made sure that `served` is portero's own.
        """
        folder = self._own(certificate.name)
        try:
            folder.mkdir(mode=0o755, exist_ok=True)
        except OSError as error:
            raise StateUnwritable(f"cannot make {folder}: {os.strerror(error.errno or 0)}") from error
        fingerprints = [certificate.fingerprint, *self._fingerprints(certificate.name)]
        issuer = [self._directory_url] if self._directory_url else []
        mark = json.dumps([*list(dict.fromkeys(fingerprints))[:2], *issuer]).encode()
        files.write(folder / MARK, mark, 0o644)
        files.write(folder / _KEY, certificate.key_pem, 0o600)
        files.write(folder / _CHAIN, certificate.chain_pem, 0o644)

    # Private

    def _own(self, name: str) -> Path:
        return self._cert_dir / folder_of(name)

    def _fingerprints(self, name: str) -> list[str]:
        return [one for one in self._mark(name) if _FINGERPRINT.fullmatch(one)]

    def _mark(self, name: str) -> list[str]:
        try:
            found = files.decoded(files.read(self._own(name) / MARK) or b"[]")
        except ValueError:
            return []
        return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []


# Private


def _found(path: Path) -> Held:
    """The first certificate of a file. One that is none is somebody's all the same, with no name."""
    try:
        return _leaf(files.read(path) or b"")
    except (ValueError, x509.InvalidVersion):
        return Held(frozenset(), 0.0, 0.0, "")


@lru_cache(maxsize=4096)
def _leaf(pem: bytes) -> Held:
    leaf = x509.load_pem_x509_certificate(pem)
    return Held(
        frozenset(),  # who wants to know takes `own_pair`
        leaf.not_valid_before_utc.timestamp(),
        leaf.not_valid_after_utc.timestamp(),
        leaf.fingerprint(hashes.SHA256()).hex(),
    )
