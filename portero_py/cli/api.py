"""Where the registration API is, what opens it, and one question to it: for every command that asks.

Secrets come from flags, variables and files as the proxy itself takes them, so that a command beside a
running proxy needs no more than the same environment file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import aiohttp

from portero_py.client.call import MAX_LISTING, call
from portero_py.config import sources
from portero_py.config.values import is_url, shown
from portero_py.errors import ConfigError
from portero_py.run import preflight

if TYPE_CHECKING:
    from portero_py.config.sources import Environ, Flags

DEFAULT_URL: Final = "http://127.0.0.1:18080"

#: Seconds until an answer begins.
ANSWER_SECONDS: Final = 10.0


class OpenApi:
    """The API, for who knows the secret; one connection: `async with`."""

    def __init__(self, flags: Flags, environ: Environ) -> None:
        self._url = url(flags, environ)
        self._secret = secret(flags, environ)
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> OpenApi:
        self._session = aiohttp.ClientSession()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def backends(self) -> dict[str, Any]:
        """What GET /backends says. Raises a ClientError."""
        return await self._call("GET", "/backends", None)

    async def post(self, path: str, body: Mapping[str, object], wait_seconds: float = 0.0) -> dict[str, Any]:
        """What the API answers; with `wait_seconds` it may take so long. Raises a ClientError."""
        waits = {"wait_seconds": wait_seconds} if wait_seconds else {}
        return await self._call("POST", path, {**body, **waits}, wait_seconds)

    # Private

    async def _call(
        self, method: str, path: str, body: Mapping[str, object] | None, wait_seconds: float = 0.0
    ) -> dict[str, Any]:
        headers = {"X-Register-Secret": self._secret}
        return await call(
            self._session, method, self._url, path, body, headers, ANSWER_SECONDS, wait_seconds, MAX_LISTING
        )


def require_text(given: Mapping[str, object]) -> None:
    """Raises `ConfigError` for what cannot be sent: a shell passes any bytes on, JSON does not."""
    for name, value in given.items():
        if isinstance(value, str) and not value.isprintable():
            flag = name.removesuffix("_name").replace("_", "-")
            raise ConfigError(f"--{flag}: {shown(value)} is no text, or holds control characters")


def url(flags: Flags, environ: Environ) -> str:
    """The API's root. Raises `ConfigError` when it is no URL."""
    given = flags.get("register-url") or environ.get("PORTERO_REGISTER_URL") or environ.get("PORTERO_API")
    found = str(given or DEFAULT_URL)
    if not found.isprintable() or not is_url(found, "http", "https"):
        raise ConfigError(f"--register-url: {shown(found)} is no http:// or https:// URL")
    return found.rstrip("/")


def secret(flags: Flags, environ: Environ) -> str:
    """The shared secret. Raises `ConfigError` when it is missing."""
    found = str(sources.read_one("register-secret", flags, environ) or "")
    if not found:
        raise ConfigError(preflight.missing("register-secret"))
    return found
