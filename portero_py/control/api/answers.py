"""What the endpoints answer when all is well: JSON that nobody may keep."""

from __future__ import annotations

from typing import Any, Final

import orjson
from aiohttp import web

NO_STORE: Final = {"Cache-Control": "no-store"}


def answer(content: dict[str, Any]) -> web.Response:
    """A 200 with this content."""
    return web.Response(body=orjson.dumps(content), content_type="application/json", headers=NO_STORE)
