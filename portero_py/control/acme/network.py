"""Requests to a CA and their replies: signed by the `acme` library, sent and read here.

- https only, certificates checked, no redirects; a reply has at most `MAX_REPLY` bytes and `TIMEOUT` seconds.
- A nonce that the CA refuses is replaced `MAX_NONCES` times (the library: once), by the one in the error
  first (RFC 8555, 6.5). At 60% of refusals a request fails once in four million times.
- Several threads may ask at a time: each has a session of its own; nonces and the account are common.
- Retry-After is kept with the error, and a 409 is the problem that it says it is (the library drops both).
"""

from __future__ import annotations

import threading
import time
from typing import Any, Final

import requests
import urllib3.exceptions
from acme import client, jws
from josepy import errors as jose_errors
from josepy import interfaces, jwa, jwk

import portero_py
from portero_py.control.acme.replies import MAX_URL, checked
from portero_py.errors import BadCaReply, CaOutOfReach, CaRefused, CaUnreachable

MAX_REPLY: Final = 256 * 1024
#: Seconds for connecting, for each silence, and for a whole reply.
CONNECT_TIMEOUT: Final = 10.0
SILENCE: Final = 15.0
TIMEOUT: Final = 30.0
MAX_NONCES: Final = 30


class Network(client.ClientNetwork):
    """The library's signing, with our own sending and reading."""

    def __init__(self, key: jwk.JWK, ca_file: str) -> None:
        super().__init__(key, alg=jwa.ES256, user_agent=f"portero-py/{portero_py.__version__}")
        self._ca: str | bool = ca_file or True
        self._own = threading.local()  # `session`: the thread's
        self._sessions: list[requests.Session] = [self.session]

    def close(self) -> None:
        """Close the connections."""
        for session in self._sessions:
            session.close()

    def fetch(self, url: str) -> requests.Response:
        """GET; a reply with an error raises."""
        return checked(self._exchange("GET", url))

    def send(self, url: str, content: interfaces.JSONDeSerializable | None, nonces: str) -> requests.Response:
        """POST what is signed (None: POST-as-GET); `nonces` is where fresh ones come from."""
        for _ in range(MAX_NONCES):
            nonce = self._take_nonce() or self._fresh_nonce(nonces)
            try:
                signed = self._wrap_in_jws(content, nonce, url)
            except (ValueError, TypeError, jose_errors.Error) as error:
                raise BadCaReply("the CA's nonce cannot be used") from error
            reply = self._exchange("POST", url, signed)
            self._keep_nonce(reply)
            try:
                return checked(reply)
            except CaRefused as error:
                if error.problem != "badNonce":
                    raise
        raise CaUnreachable(f"the CA refused {MAX_NONCES} of its own nonces")

    # Private

    def _session(self) -> requests.Session:
        found: requests.Session | None = getattr(self._own, "session", None)
        if found is None:
            found = self._own.session = requests.Session()
            self._sessions.append(found)
        return found

    def _take_nonce(self) -> Any:
        try:
            return self._nonces.pop()
        except KeyError:  # asked first, another thread could take the last one between
            return None

    def _fresh_nonce(self, url: str) -> Any:
        # Not by way of `_nonces`: another thread would take it.
        nonce = self._nonce_of(checked(self._exchange("HEAD", url)))
        if nonce is None:
            raise BadCaReply("the CA gives no nonce")
        return nonce

    def _keep_nonce(self, reply: requests.Response) -> None:
        nonce = self._nonce_of(reply)
        if nonce is not None:
            self._nonces.add(nonce)

    def _nonce_of(self, reply: requests.Response) -> Any:
        nonce = reply.headers.get(self.REPLAY_NONCE_HEADER, "")
        if not 0 < len(nonce) <= 1024:
            return None
        try:
            return jws.Header._fields["nonce"].decode(nonce)
        except jose_errors.DeserializationError:
            return None  # one that is garbled is none

    def _exchange(self, method: str, url: str, data: str | None = None) -> requests.Response:
        if not url.startswith("https://") or len(url) > MAX_URL or not url.isascii() or not url.isprintable():
            raise BadCaReply(f"the CA gives an address that is no https:// one: {url[:80]!r}")
        headers = {"User-Agent": self.user_agent, "Accept-Encoding": "identity"}
        if data is not None:
            headers["Content-Type"] = self.JOSE_CONTENT_TYPE
        ends = time.monotonic() + TIMEOUT
        try:
            with self._session().request(
                method,
                url,
                data=data,
                headers=headers,
                verify=self._ca,
                timeout=(CONNECT_TIMEOUT, SILENCE),
                allow_redirects=False,
                stream=True,
            ) as reply:
                body = bytearray()
                for part in reply.iter_content(8192):
                    body += part
                    if len(body) > MAX_REPLY:
                        raise BadCaReply(f"the CA's reply is longer than {MAX_REPLY} bytes")
                    if time.monotonic() > ends:
                        raise CaUnreachable(f"the CA did not finish its reply within {TIMEOUT:.0f} s")
                reply._content = bytes(body)
                reply.encoding = "utf-8"
                return reply
        except requests.exceptions.SSLError as error:
            raise CaUnreachable(
                f"the CA's own certificate cannot be verified (--acme-ca-file?): {_why(error)}"
            ) from error
        except (requests.RequestException, OSError, ValueError) as error:
            kind = CaOutOfReach if _never_connected(error) else CaUnreachable
            raise kind(f"{url.split('/')[2][:100]} cannot be reached: {_why(error)}") from error


# Private


def _never_connected(error: Exception) -> bool:
    """Whether no connection was made: refused, no such host, no network, no answer to the first packet."""
    if isinstance(error, requests.exceptions.ConnectTimeout | requests.exceptions.ProxyError):
        return True
    cause = getattr(error.args[0], "reason", None) if error.args else None
    return isinstance(cause, urllib3.exceptions.NewConnectionError)


def _why(error: Exception) -> str:
    """The innermost reason, without the library's own nesting."""
    reason: Any = error
    while (
        isinstance(getattr(reason, "args", None), tuple)
        and reason.args
        and isinstance(reason.args[0], Exception)
    ):
        reason = reason.args[0]
    reason = getattr(reason, "reason", None) or reason
    return " ".join(str(reason).split())[:200]
