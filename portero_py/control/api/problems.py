"""Errors of the registration API on the wire: `application/problem+json` (RFC 9457), made in one place.

Members: `type`, `title`, `status`, `detail`, `reason` (stable: match on this) and, where one is to
blame, `field`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import web

from portero_py.errors import AuthError, BadField, PorteroError, RateLimited, TooManyWaits

_log = logging.getLogger(__name__)


@web.middleware
async def answer_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Turn whatever is raised behind it into a problem document. (aiohttp passes `handler` by name.)"""
    try:
        return await handler(request)
    except PorteroError as error:
        return problem(error)
    except web.HTTPException as error:
        # aiohttp's own: no such path, method not allowed.
        allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        return _document(error.status, error.reason.lower().replace(" ", "_"), error.reason, headers=allow)
    except Exception:  # a bug: a 500 in our own form
        _log.exception("%s %s failed", request.method, request.path)
        return problem(PorteroError("internal error: see the log"))


def problem(error: PorteroError) -> web.Response:
    """The answer for an error, with what its status asks for beside the body."""
    headers = {}
    if error.status == HTTPStatus.UNAUTHORIZED and isinstance(error, AuthError):
        headers["WWW-Authenticate"] = 'Bearer realm="portero"'  # RFC 9110, 15.5.2: a 401 must have one
    if isinstance(error, RateLimited | TooManyWaits):
        headers["Retry-After"] = str(error.retry_after)
    blamed = {"field": error.field} if isinstance(error, BadField) else {}
    return _document(error.status, error.reason, str(error), headers=headers, **blamed)


# Private


def _document(
    status: int, reason: str, detail: str, *, headers: Mapping[str, str], **more: Any
) -> web.Response:
    document = {
        "type": f"urn:portero:problem:{reason}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "reason": reason,
        **more,
    }
    return web.Response(
        body=orjson.dumps(document),
        status=status,
        content_type="application/problem+json",
        headers={"Cache-Control": "no-store", **headers},
    )
