"""Stickiness: a client stays with a backend by a cookie.

Two modes, as in HAProxy
- insert   a cookie of our own. It is set when the response comes from another backend than the one that the
           client's cookie names, and taken out of what the backend gets. What an application sets under this
           name is dropped.
- prefix   the application's own cookie. Its value has a mark before it on the way out, which is taken off on
           the way in. Whoever sets no cookie is not sticky.

The rules
- A token stands for a backend of a service: an HMAC over both names, under a key that follows from a secret
  of the configuration. So nobody learns an address from it, nobody makes one, and it is the same in all
  workers, in the next generation and on all nodes with that secret. A backend that comes back under its
  instance id has its clients back.
- Tokens that are not of a backend of this service are as none.
- The client's backend is its home while nobody goes before it (`Balancers.may_stay`). When it drains, is
  DOWN, is ejected or has failed this exchange, another one is chosen and becomes the home. When it is merely
  full, another one takes this exchange, and the home stays: one burst is not to move all clients for good.
- A response with a cookie of ours is one client's: shared caches may not keep it (`cookies.private`).
- Of several cookies by this name the first that is of a backend counts.

A client sends the same fields again and again, and our readers share one list of them then. What was found in
such a list is remembered under its identity, with the list itself, so that no other one can be taken for it.
"""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64encode
from typing import Final

from portero_py.core.model import Lease, Service
from portero_py.core.policies import Sticky
from portero_py.wire.cookies import MARK_LENGTH, Cookie, is_set, mark_of, marked, private
from portero_py.wire.message import (
    Fields,
    RequestHead,
    ResponseHead,
    request_with,
    response_with,
)

#: What the key is for: nothing else is ever signed with it.
PURPOSE: Final = b"portero: sticky cookies, 1"
#: Values of a cookie that are looked at.
MOST_VALUES: Final = 8
#: Lists of fields that are remembered.
MEMO_SIZE: Final = 256

_HANDLE: Final = MARK_LENGTH // 2  # by this part of it a token is found, by all of it it is believed


def sticky_key(secret: str) -> bytes:
    """The key for cookies that follows from a secret of the configuration, which nobody learns from it."""
    return hmac.digest(secret.encode("utf-8", "surrogateescape"), PURPOSE, "sha256")


class Stickiness:
    """The cookies of one service."""

    __slots__ = ("_by_handle", "_cookie", "_is_prefix", "_key", "_known", "_name", "_service", "_tokens")

    def __init__(self, sticky: Sticky, key: bytes) -> None:
        self._key = key
        self._name = sticky.cookie.encode()
        self._cookie = Cookie(self._name)
        self._is_prefix = sticky.mode == "prefix"
        self._known: dict[int, tuple[Fields, list[bytes], Fields]] = {}  # as received, tokens, as sent on
        self._service: Service | None = None
        self._tokens: dict[str, bytes] = {}  # by instance id
        self._by_handle: dict[bytes, tuple[bytes, Lease]] = {}

    def home(self, head: RequestHead, service: Service) -> Lease | None:
        """The lease of `service` that the client's cookie names, in whatever state it is."""
        for token in self._read(head)[1]:
            if service is not self._service:
                self._follow(service)
            found = self._by_handle.get(token[:_HANDLE])
            if found is not None and hmac.compare_digest(found[0], token):
                return found[1]
        return None

    def request_head(self, head: RequestHead) -> RequestHead:
        """What the backend gets instead of `head`, which stays as it is."""
        received, _, sent = self._read(head)
        return head if sent is received else request_with(head, sent)

    def response_head(
        self, head: ResponseHead, lease: Lease, *, is_at_home: bool, is_secure: bool
    ) -> ResponseHead:
        """What the client gets instead of the final `head` that the backend of `lease` has sent.

        `is_at_home`: the client's cookie is to stay as it is. `is_secure`: it came over TLS.
        """
        if self._is_prefix:
            fields = self._marked(head.fields, lease)
        else:
            fields = self._without_set(head.fields)
            if not is_at_home:
                cookie = b"%b=%b; Path=/; HttpOnly; SameSite=Lax" % (self._name, self.token(lease))
                fields = private(fields)
                fields = [*fields, (b"Set-Cookie", cookie + b"; Secure" if is_secure else cookie)]
        return head if fields is head.fields else response_with(head, fields)

    def token(self, lease: Lease) -> bytes:
        """What stands for the backend of `lease`."""
        known = self._tokens.get(lease.instance_id)
        if known is not None:
            return known
        said = f"{lease.service}\n{lease.instance_id}".encode()
        return urlsafe_b64encode(hmac.digest(self._key, said, "sha256"))[:MARK_LENGTH]

    # Private

    def _read(self, head: RequestHead) -> tuple[Fields, list[bytes], Fields]:
        """The fields as received, what in them may be tokens, and the fields that the backend gets."""
        fields = head.fields
        known = self._known.get(id(fields))
        if known is not None:
            return known
        cookie = self._cookie
        tokens = cookie.values(fields, MOST_VALUES)
        if self._is_prefix:
            tokens = [mark_of(value) for value in tokens]
            sent = cookie.unmarked(fields)
        else:
            sent = cookie.taken_out(fields)
        known = fields, [token for token in tokens if len(token) == MARK_LENGTH], sent
        if head.lines is not None or head.version == b"2":  # else nobody shares it
            if len(self._known) >= MEMO_SIZE:
                self._known.clear()
            self._known[id(fields)] = known
        return known

    def _follow(self, service: Service) -> None:
        self._service = service
        tokens = {}
        self._by_handle = {}
        for entry in service.leases:
            for lease in (entry, *entry.also):
                token = tokens[lease.instance_id] = self.token(lease)
                self._by_handle[token[:_HANDLE]] = token, entry
        self._tokens = tokens

    def _marked(self, fields: Fields, lease: Lease) -> Fields:
        changed: Fields | None = None
        for place, (name, value) in enumerate(fields):
            if len(name) == 10 and name.lower() == b"set-cookie" and is_set(value, self._name):
                if changed is None:
                    changed = fields[:]
                changed[place] = name, marked(value, self.token(lease))
        return fields if changed is None else changed

    def _without_set(self, fields: Fields) -> Fields:
        for name, value in fields:
            if len(name) == 10 and name.lower() == b"set-cookie" and is_set(value, self._name):
                return [field for field in fields if not self._is_set_by(field[0], field[1])]
        return fields

    def _is_set_by(self, name: bytes, value: bytes) -> bool:
        return name.lower() == b"set-cookie" and is_set(value, self._name)
