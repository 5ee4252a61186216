"""One call of the registration API: JSON there, JSON back, within bounds of time and size.

A call that waits (`wait_seconds`) is answered in two parts: a head at once, which says that portero is there
and has done what was asked, and the rest when there is something to say. Each part has its time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import aiohttp
import orjson

from portero_py.errors import AnswerBrokeOff, PorteroUnreachable, RegistrationRefused

#: The most of an answer that is read, bytes: a listing of 100,000 backends is 40 MB.
MAX_ANSWER: Final = 65536
MAX_LISTING: Final = 256 << 20

#: Seconds by which an answer that was waited for may be late.
WAIT_SLACK: Final = 5.0

_OK: Final = 200


async def call(
    session: aiohttp.ClientSession,
    method: str,
    root: str,
    path: str,
    body: Mapping[str, object] | None,
    headers: Mapping[str, str],
    timeout: float,
    wait_seconds: float = 0.0,
    longest: int = MAX_ANSWER,
) -> dict[str, Any]:
    """The answer: its head within `timeout`, the rest too, or with `wait_seconds` that much later.

    `root` is the API's URL. Raises PorteroUnreachable, RegistrationRefused, or AnswerBrokeOff when what was
    waited for did not come.
    """
    root = root.rstrip("/")
    is_done = False
    try:
        async with (
            asyncio.timeout(timeout) as limit,
            session.request(
                method,
                f"{root}{path}",
                data=None if body is None else orjson.dumps(body),
                headers={"Content-Type": "application/json", **headers},
                # A redirect would carry the secret somewhere else.
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None),
            ) as response,
        ):
            status = response.status
            if wait_seconds and status == _OK:
                is_done = True
                limit.reschedule(asyncio.get_running_loop().time() + wait_seconds + WAIT_SLACK)
            answer = _object(await _read(response.content, longest))
            retry_after = seconds(response.headers.get("Retry-After"), 0.0)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        what = f"{root}: {str(error) or 'no answer in time'}"
        raise (AnswerBrokeOff(what) if is_done else PorteroUnreachable(what)) from error
    if status != _OK:
        detail = answer.get("detail") or answer.get("title") or "no reason given"
        reason = str(answer.get("reason", ""))
        raise RegistrationRefused(f"{root}: {status}: {detail}", status, retry_after, reason)
    return answer


def seconds(value: object, otherwise: float) -> float:
    """A positive time that an answer named, at most a day; `otherwise` when it is none."""
    try:
        named = float(value)  # type: ignore[arg-type]  # what is no number raises
    except (TypeError, ValueError):
        return otherwise
    return min(named, 86400.0) if named > 0 else otherwise


# Private


async def _read(stream: aiohttp.StreamReader, longest: int) -> bytes:
    data = bytearray()
    async for chunk in stream.iter_any():
        data += chunk
        if len(data) > longest:
            raise ValueError("the answer is too long to be the registration API's")
    return bytes(data)


def _object(data: bytes) -> dict[str, Any]:
    try:
        answer = orjson.loads(data)
    except orjson.JSONDecodeError:
        return {}
    return answer if isinstance(answer, dict) else {}
