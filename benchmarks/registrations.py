"""Registering backends at a portero-py under test, through its API and over one keep-alive connection."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jwt

from benchmarks.stage import BenchError

TTL = 86_400


@dataclass(frozen=True)
class Api:
    """A registration API of 127.0.0.1, and what it takes to be let in."""

    port: int
    secret: str = field(repr=False)
    key: str = field(repr=False)

    def register(
        self, services: Iterable[str], backend_port: int, more: Mapping[str, object] | None = None
    ) -> int:
        """POST one backend of 127.0.0.1 for each service, with `more` fields; how many that were.

        BenchError: one was refused.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        done = 0
        try:
            for service in services:
                connection.request("POST", "/register", *self._request(service, backend_port, more or {}))
                response = connection.getresponse()
                answer = response.read()
                if response.status >= 300:
                    text = answer.decode(errors="replace")
                    raise BenchError(f"registration answered {response.status}: {text}")
                done += 1
        except (OSError, http.client.HTTPException) as error:
            raise BenchError(f"registration of the {done + 1}. service failed: {error!r}") from error
        finally:
            connection.close()
        return done

    def release(self, service: str, backend_port: int, wait_seconds: int) -> dict[str, Any]:
        """DELETE a backend, waiting for what is in flight there; the answer. BenchError: it was refused."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=wait_seconds + 20)
        more = {"wait_seconds": wait_seconds}
        try:
            connection.request("DELETE", "/register", *self._request(service, backend_port, more))
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise BenchError(f"the release failed: {error!r}") from error
        finally:
            connection.close()
        if response.status >= 300:
            raise BenchError(f"the release was answered {response.status}: {answer.decode(errors='replace')}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def answers(self, path: str) -> bool:
        """Whether a GET of a page that needs no secret is answered with 200."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    # Private

    def _request(self, service: str, port: int, more: Mapping[str, object]) -> tuple[bytes, dict[str, str]]:
        claims = {"service_name": service, "exp": int(time.time()) + TTL}
        body = {
            "service_name": service,
            "host": "127.0.0.1",
            "port": port,
            "ttl_seconds": TTL,
            "use_tls": False,
            **more,
        }
        headers = {
            "X-Register-Secret": self.secret,
            "Authorization": f"Bearer {jwt.encode(claims, self.key, algorithm='HS256')}",
            "Content-Type": "application/json",
        }
        return json.dumps(body).encode(), headers
