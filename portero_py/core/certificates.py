"""Certificates: what is known of one, and which one a client gets.

The rules of choice, for the name that a client sends (SNI)
  1. the folder of that name, whatever its certificate says: the operator decided;
  2. a certificate that lists the name;
  3. a wildcard (folder, then certificate) over it: the star stands for exactly one label (RFC 6125,
  6.4.3);
  4. the default: the first folder in sorted order ("*" sorts before digits and letters).

Names here are lower-case and without a trailing dot; IP addresses are in their shortest spelling.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from portero_py.core.names import normalise_host, normalise_service_name, wildcard_over

_UNDERSCORE_WILDCARD: Final = "_wildcard."


@dataclass(frozen=True, slots=True)
class Certificate:
    """A chain and its key, parsed and checked, ready to be served.

    name         the folder's name, normalised: "app.example" or "*.example.com"
    chain_pem    the certificates, leaf first; nothing else
    key_pem      the leaf's private key, not encrypted; never shown
    names        what the leaf lists (DNS names, wildcards, IP addresses)
    not_before, not_after   epoch seconds
    fingerprint  lower-case hex SHA-256 of the leaf (DER)
    issuer       of the leaf, for people
    chain_length number of certificates in `chain_pem`
    self_signed  issuer and subject of the leaf are the same
    origin       the file or folder that it came from, for people
    """

    name: str
    chain_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)
    names: tuple[str, ...]
    not_before: float
    not_after: float
    fingerprint: str
    issuer: str
    chain_length: int
    self_signed: bool
    origin: str

    def covers(self, host: str) -> bool:
        """Say whether it stands for `host` (normalised): by its folder's name or by what it lists."""
        wildcard = wildcard_over(host)
        return any(name in (self.name, *self.names) for name in (host, wildcard) if name)

    def same_bytes(self, other: Certificate) -> bool:
        """Say whether both put the same bytes on the wire."""
        return self.chain_pem == other.chain_pem and self.key_pem == other.key_pem

    def complaints(self, now: float) -> list[str]:
        """Say what some clients will not like about it at `now` (epoch seconds); empty when all is well."""
        found = []
        if now >= self.not_after:
            found.append("it has expired")
        elif now < self.not_before:
            found.append("it is not valid yet")
        if not self.names:
            found.append("it lists no names (subjectAltName), which every browser refuses")
        elif self.name not in self.names and wildcard_over(self.name) not in self.names:
            found.append(f"it is not for {self.name} but for {', '.join(self.names[:5])}")
        if self.chain_length == 1 and not self.self_signed:
            found.append("it has no intermediate certificate (is it a fullchain?), which many clients refuse")
        return found


class CertificateTable:
    """An immutable, versioned set of certificates; finding one costs a few dictionary look-ups.

    Two certificates never have the same `name`. The order given does not matter: it is by name.
    """

    __slots__ = ("_by_listed", "_by_name", "certificates", "version")

    def __init__(self, certificates: Iterable[Certificate] = (), version: int = 0) -> None:
        ordered = sorted(certificates, key=lambda certificate: certificate.name)
        by_listed: dict[str, Certificate] = {}
        for certificate in ordered:
            for name in certificate.names:
                # Of several that list a name, the one that serves longest: the others are leftovers.
                rival = by_listed.get(name)
                if rival is None or certificate.not_after > rival.not_after:
                    by_listed[name] = certificate
        self._by_name = {certificate.name: certificate for certificate in ordered}
        self._by_listed = by_listed
        self.certificates = tuple(ordered)
        self.version = version

    @property
    def default(self) -> Certificate | None:
        """The one for clients that name none or an unknown one."""
        return self.certificates[0] if self.certificates else None

    def get(self, name: str) -> Certificate | None:
        """Return the certificate of the folder `name`, or None."""
        return self._by_name.get(name)

    def find(self, host: str) -> Certificate | None:
        """Return the certificate that covers `host` (normalised), or None."""
        found = self._by_name.get(host) or self._by_listed.get(host)
        if found is None:
            wildcard = wildcard_over(host)
            found = self._by_name.get(wildcard) or self._by_listed.get(wildcard)
        return found

    def select(self, sni: str | None) -> Certificate | None:
        """Return the certificate to present to a client that sent `sni`, in any case, or none, or garbage.

        None only when the table is empty.
        """
        found = self.find(sni.lower().removesuffix(".")) if sni else None
        return found or self.default

    def misdirected(self, presented: Certificate, host: str) -> bool:
        """Say whether a request for `host` came over a connection made for another (RFC 9110, 15.5.20).

        True when `presented` does not cover `host` though another certificate does: the client should
        connect again. False when nobody covers it: that would end in the same certificate.
        """
        return not presented.covers(host) and self.find(host) is not None


def folder_name(raw: str) -> str | None:
    """The name that a folder (or a combined file without its ".pem") stands for, or None.

    "App.Example" -> "app.example"; "_wildcard.example.com" and "*.example.com" -> "*.example.com".
    """
    if raw.lower().startswith(_UNDERSCORE_WILDCARD):
        raw = f"*.{raw[len(_UNDERSCORE_WILDCARD) :]}"
    return normalise_service_name(raw)


def folder_of(name: str) -> str:
    """How portero itself calls the folder of a normalised name: a star in a path is a shell's delight."""
    return f"{_UNDERSCORE_WILDCARD}{name[2:]}" if name.startswith("*.") else name


def server_name(sni: str | None) -> str:
    """The host name in a ClientHello, normalised; "" when there is none, or when it is no name at all.

    OpenSSL passes whatever the client sent, as it was spelled. An IP address is not allowed (RFC 6066, 3),
    and neither is a port, but an IPv4 address cannot be told from a name and does no harm.
    """
    if not sni or ":" in sni:
        return ""
    return normalise_host(sni) or ""
