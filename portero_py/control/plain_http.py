"""Port 80: sends browsers to https, and answers ACME's http-01 challenges.

- `/.well-known/acme-challenge/<token>`: our own key authorization when there is one, else what the ACME
  upstream says (an ACME client beside the proxy), else 404. Never a redirect: the CA asks here for a reason.
- Everything else: https, on the same host, path and query. 301 for GET and HEAD; 308 otherwise, which makes
  the client repeat method and body (RFC 9110, 15.4.9).

No open redirect: the host comes from the client's own request and passed `core.names`, and it is written
again from its normalised form; whatever the target holds comes after it, with everything but visible ASCII
percent-encoded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final
from urllib.parse import quote_from_bytes

import aiohttp
from aiohttp import web

from portero_py.config.model import Address
from portero_py.control.open_server import Door, quiet_logger
from portero_py.core.names import normalise_host

#: The most of a challenge's answer that is passed on, bytes. Key authorizations have about 90.
MAX_CHALLENGE: Final = 16 * 1024

#: Seconds that the ACME upstream has for its whole answer.
UPSTREAM_TIMEOUT: Final = 10.0

#: Connections at a time, and seconds: a redirect takes one round trip.
MAX_CONNECTIONS: Final = 4096
WAIT_SECONDS: Final = 10.0
BUSY_SECONDS: Final = 20.0

_CHALLENGES: Final = "/.well-known/acme-challenge/"
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{1,256}")  # base64url (RFC 8555, 8.3)
_ABSOLUTE: Final = re.compile(r"http://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
_VISIBLE: Final = "".join(map(chr, range(0x21, 0x7F)))
_HTTPS_PORT: Final = 443

# aiohttp would name its own version and Python's.
_HEADERS: Final = {"Cache-Control": "no-store", "Server": "portero"}


def no_challenges(token: str) -> str | None:
    """Where no ACME client of our own is at work."""
    return None


class PlainHttp:
    """The redirect server. `challenges` gives the key authorization of a token of our own, or None.

    Sites that let strangers in stand behind `door`.
    """

    def __init__(
        self,
        https_port: int = _HTTPS_PORT,
        acme_upstream: Address | None = None,
        challenges: Callable[[str], str | None] = no_challenges,
        *,
        upstream_timeout: float = UPSTREAM_TIMEOUT,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self.door = Door("plain HTTP", max_connections, wait_seconds=WAIT_SECONDS, busy_seconds=BUSY_SECONDS)
        self._port = "" if https_port == _HTTPS_PORT else f":{https_port}"
        self._acme_upstream = acme_upstream
        self._challenges = challenges
        self._timeout = upstream_timeout

    def runner(self) -> web.ServerRunner:
        """The server for sites to run: `await runner.setup()` first, `await runner.cleanup()` at the end."""
        server = web.Server(
            self._on_connected_request, access_log=None, auto_decompress=False, logger=quiet_logger
        )
        return web.ServerRunner(server, handle_signals=False)

    # Private

    async def _on_connected_request(self, request: web.BaseRequest) -> web.StreamResponse:
        response: web.StreamResponse = await self.door.busy(request, self._on_request)
        return response

    async def _on_request(self, request: web.BaseRequest) -> web.Response:
        host, target = _asked(request)
        if host is None:
            return _text(400, "the Host header is missing or is no host name")
        if target.startswith(_CHALLENGES):
            return await self._challenge(request, host, target.removeprefix(_CHALLENGES).partition("?")[0])
        status = 301 if request.method in {"GET", "HEAD"} else 308
        location = f"https://{_authority(host)}{self._port}{target}"
        return _text(status, f"this is at {location}", Location=location)

    async def _challenge(self, request: web.BaseRequest, host: str, token: str) -> web.Response:
        if request.method not in {"GET", "HEAD"}:
            return _text(405, "a challenge is read with GET", Allow="GET, HEAD")
        if not _TOKEN.fullmatch(token):
            return _text(404, "this is no challenge")
        key_authorization = self._challenges(token)
        if key_authorization is not None:
            return _text(200, key_authorization)
        if self._acme_upstream is None:
            return _text(404, "no such challenge")
        return await self._forwarded(
            request.method, f"http://{self._acme_upstream}{_CHALLENGES}{token}", host
        )

    async def _forwarded(self, method: str, url: str, host: str) -> web.Response:
        # Identity: what comes is passed on as it is, and a packed answer would need its field too.
        headers = {"Host": _authority(host), "Accept-Encoding": "identity"}
        try:
            async with (
                aiohttp.ClientSession(
                    timeout=aiohttp.ClientTimeout(self._timeout), auto_decompress=False
                ) as session,
                session.request(method, url, headers=headers, allow_redirects=False) as response,
            ):
                body = await response.content.read(MAX_CHALLENGE + 1)
                while len(body) <= MAX_CHALLENGE and (more := await response.content.read(MAX_CHALLENGE)):
                    body += more
        except TimeoutError:
            return _text(504, "the ACME upstream did not answer in time")
        except aiohttp.ClientError:
            return _text(502, "the ACME upstream could not be reached")
        if len(body) > MAX_CHALLENGE:
            return _text(502, "the ACME upstream's answer is too long for a challenge")
        return web.Response(status=response.status, body=body, content_type="text/plain", headers=_HEADERS)


def _authority(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _asked(request: web.BaseRequest) -> tuple[str | None, str]:
    """The normalised host, and the target from its path on."""
    target = quote_from_bytes(request.raw_path.encode("utf-8", "surrogateescape"), safe=_VISIBLE)
    hosts = request.headers.getall("Host", [])
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is not None:
        # RFC 9112, 3.2.2: the target's host counts, Host is ignored.
        hosts, target = [absolute[1]], absolute[2]
    if not target.startswith("/"):
        target = f"/{target}"
    return normalise_host(hosts[0]) if len(hosts) == 1 else None, target


def _text(status: int, text: str, **headers: str) -> web.Response:
    return web.Response(status=status, text=text, headers={**_HEADERS, **headers})
