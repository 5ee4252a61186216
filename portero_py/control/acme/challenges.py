"""The challenges that are pending: collected from all orders, published to listeners, asked by port 80."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from portero_py.config.model import Address, Config
from portero_py.control.acme.pairs import tls_alpn_pair
from portero_py.core.acme.schedule import HTTP_01, TLS_ALPN_01
from portero_py.core.challenges import Challenges

Publish = Callable[[Challenges], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Shown:
    """One challenge that portero answers now."""

    kind: str
    name: str
    token: str
    key_authorization: str


class PendingChallenges:
    """All that is shown at the moment. `version` begins above what an earlier control process published."""

    def __init__(self, publish: Publish, version: int) -> None:
        self._publish = publish
        self._version = version
        self._tls_alpn: dict[str, tuple[bytes, bytes]] = {}
        self._http: dict[str, str] = {}

    def http(self, token: str) -> str | None:
        """The key authorization for a token, or None: what port 80 answers."""
        return self._http.get(token)

    async def show(self, challenges: list[Shown]) -> None:
        """Answer these too; when it returns, every listener does."""
        for each in challenges:
            if each.kind == TLS_ALPN_01:
                self._tls_alpn[each.name] = tls_alpn_pair(each.name, each.key_authorization)
            else:
                self._http[each.token] = each.key_authorization
        await self._tell()

    async def hide(self, challenges: list[Shown]) -> None:
        """Answer these no longer."""
        for each in challenges:
            if each.kind == TLS_ALPN_01:
                self._tls_alpn.pop(each.name, None)
            else:
                self._http.pop(each.token, None)
        await self._tell()

    # Private

    async def _tell(self) -> None:
        self._version += 1
        await self._publish(Challenges(self._version, dict(self._tls_alpn), dict(self._http)))


def at_usual_port(config: Config) -> tuple[str, ...]:
    """The types that are answered where a CA comes to: at ports 443 and 80, for everybody."""
    plain = config.plain_http.listen
    https = TLS_ALPN_01 if any(_is_public(each, 443) for each in config.proxy.listen) else ""
    http = HTTP_01 if plain is not None and _is_public(plain, 80) else ""
    return tuple(filter(None, (https, http)))


# Private


def _is_public(address: Address, port: int) -> bool:
    return address.port == port and not address.is_loopback
