"""SNI -> certificate: the listener's TLS context, whose certificates change while it stays.

The theory
- The *front* context is created once (before workers are forked) and never replaced: session ticket keys
  live in it, so sessions go on being resumed over reloads and by every worker. The keys change
  (`ticket_keys`); a second front has those of the period before, and serves the clients whose tickets are so
  old.
- It holds no certificate. Each certificate has a context of its own; the SNI callback puts the right one
  in its place for one connection. From then on OpenSSL takes certificate, ciphers and ALPN from that one,
  but minimum version, options and ticket keys remain the front's. All of them are set on both anyway.
- A context that failed to load a pair is broken: always a fresh one, swapped in when it is whole. The disk
  is not touched: OpenSSL, which wants a path, reads the PEM from a memfd.
- What became of a handshake is seen here, in `do_handshake` of our `SSLObject`; of one that ends without a
  word (the client left, or the time ran out) `gone` has to tell. `downstream_tls` moves the bytes.
- OpenSSL hands over whatever name the client sent. Python turns non-ASCII ones into an "unraisable"
  error, a traceback on stderr that any stranger could cause; it becomes a count here.

- tls-alpn-01 (RFC 8737): while a challenge is pending, `do_handshake` holds back what comes in until the
  ClientHello is whole, looks, and hands the same bytes to OpenSSL. Only a hello that offers exactly
  `acme-tls/1` is given the challenge's context; the other clients of that name get its certificate as ever.
  While none is pending this costs one comparison a connection.
"""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import sys
from typing import TYPE_CHECKING, Any, Final, cast

from portero_py.core.certificates import Certificate, CertificateTable, server_name
from portero_py.core.challenges import ACME_TLS, Challenges
from portero_py.core.counters import Counters
from portero_py.errors import BadCertificate
from portero_py.proxy.downstream.ticket_keys import TicketKeys, setter
from portero_py.wire.client_hello import HelloReader

if TYPE_CHECKING:
    from collections.abc import Callable

    from portero_py.config.model import Tls

_log = logging.getLogger(__name__)

#: Mozilla's "intermediate" list without DHE (slow, and needs parameters). TLS 1.3 has its own, all good.
CIPHERS: Final = ":".join(
    f"ECDHE-{key}-{cipher}"
    for cipher in ("AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305")
    for key in ("ECDSA", "RSA")
)
ALPN: Final = ("h2", "http/1.1")
_ACME_ONLY: Final = (ACME_TLS.encode(),)
#: Most certificates that are loaded at once when a table is applied: 1 ms and 25 KiB each.
EAGER: Final = 16

_VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

# What became of a handshake: the `result` label, a bounded set. OpenSSL's words are on the left.
OK: Final = "ok"
GONE: Final = "gone"  # the client left, or the time ran out
NO_CERTIFICATE: Final = "no_certificate"
BAD_NAME: Final = "bad_name"
FAILED: Final = "failed"
_RESULTS: Final = {
    "HTTP_REQUEST": "http_request",
    "HTTPS_PROXY_REQUEST": "http_request",
    "UNSUPPORTED_PROTOCOL": "unsupported_version",
    "VERSION_TOO_LOW": "unsupported_version",
    "NO_PROTOCOLS_AVAILABLE": "unsupported_version",
    "NO_SHARED_CIPHER": "no_shared_cipher",
    "NO_SHARED_GROUPS": "no_shared_cipher",
    "NO_SUITABLE_KEY_SHARE": "no_shared_cipher",
    "NO_SUITABLE_GROUPS": "no_shared_cipher",
    "NO_SUITABLE_SIGNATURE_ALGORITHM": "no_shared_cipher",
    "NO_SHARED_SIGNATURE_ALGORITHMS": "no_shared_cipher",
    "WRONG_VERSION_NUMBER": "not_tls",
    "UNKNOWN_PROTOCOL": "not_tls",
    "PACKET_LENGTH_TOO_LONG": "not_tls",
    "BAD_RECORD_TYPE": "not_tls",
    "TLSV1_ALERT_UNKNOWN_CA": "certificate_refused",
    "SSLV3_ALERT_BAD_CERTIFICATE": "certificate_refused",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "certificate_refused",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "certificate_refused",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "certificate_refused",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "certificate_refused",
}
_ALERT: Final = "client_alert"  # any other alert that the client sent


class FrontTls:
    """The context for the listeners, and the certificates behind it. One a process; not thread-safe.

    `context` makes the connections (`wrap_bio`), unless `context_for` says another one. `counters` is where
    handshakes are counted: `handshakes[version, alpn, result]`, version and alpn "" when it failed.
    Without any certificate handshakes are refused with the alert "unrecognized_name". `tickets` are the keys
    of another process (`written_keys`), whose sessions are resumed here.
    """

    def __init__(self, tls: Tls, *, alpn: tuple[str, ...] = ALPN, tickets: bytes = b"") -> None:
        # process
        self.counters = Counters()
        self._min_version = _VERSIONS[tls.min_version]
        self._alpn = alpn
        self.context = self._front()
        self._older = self._front()
        self._older.num_tickets = 0
        self._keys = TicketKeys(tickets)
        self._set_keys = setter()
        self._use_keys()
        # one table
        self._table = CertificateTable()
        self._contexts: dict[str, ssl.SSLContext] = {}  # of those that were loaded
        self._former: dict[str, tuple[Certificate, ssl.SSLContext]] = {}  # until its successor is loaded
        # one set of challenges
        self._challenges = Challenges()
        self.challenge_contexts: dict[str, ssl.SSLContext] = {}

    @property
    def table(self) -> CertificateTable:
        """What is being served: the last table applied, less what OpenSSL would not take."""
        return self._table

    @property
    def written_keys(self) -> bytes:
        """The ticket keys, for a successor."""
        self.turn()
        return self._keys.written

    def turn(self) -> None:
        """Change the ticket keys if it is time; also for a process that only keeps them for others."""
        if self._keys.turn():
            if self._set_keys is None:
                self.context = self._front()
            self._use_keys()

    def forget_keys(self) -> None:
        """This process will never serve: it need not hold what opens tickets."""
        self._keys.forget()
        self._use_keys()

    def context_for(self, hello: bytes) -> FrontContext:
        """The context for a client whose first bytes these are: the older one if its ticket is that old.

        If the ticket comes in a later packet, that client has a whole handshake.
        """
        self.turn()
        return self._older if self._former_name in hello else self.context

    def apply(self, table: CertificateTable) -> None:
        """Serve these certificates to new connections; live ones keep theirs.

        A few changed ones are loaded at once; the others when the first client asks for them, because a
        thousand would stop all traffic for a second. A pair that OpenSSL refuses is logged and left out, or
        replaced by what was served under its name before.
        """
        contexts: dict[str, ssl.SSLContext] = {}
        former: dict[str, tuple[Certificate, ssl.SSLContext]] = {}
        changed: list[Certificate] = []
        for certificate in table.certificates:
            name = certificate.name
            known, context = self._table.get(name), self._contexts.get(name)
            if known is not None and known.same_bytes(certificate):
                if context is not None:
                    contexts[name] = context
            else:
                changed.append(certificate)
                if known is not None and context is not None:
                    former[name] = known, context
            if name not in contexts and name not in former and name in self._former:
                former[name] = self._former[name]
        self._table, self._contexts, self._former = table, contexts, former
        try:
            for certificate in changed[:EAGER]:
                self._load(certificate)
        except OSError as error:  # the first client will try again
            _log.error("a certificate cannot be loaded: %s", error)

    def apply_challenges(self, challenges: Challenges) -> None:
        """Answer these tls-alpn-01 challenges, and no others, in new connections. Older ones change nothing.

        A pair that OpenSSL refuses is logged and left out: that validation fails, nothing else does.
        """
        if challenges.version < self._challenges.version:
            return
        former, known = self._challenges.tls_alpn, self.challenge_contexts
        contexts: dict[str, ssl.SSLContext] = {}
        for name, pair in challenges.tls_alpn.items():
            if name in known and former.get(name) == pair:
                contexts[name] = known[name]
                continue
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._set_up(context, (ACME_TLS,))
            try:
                load_pair(context, *pair)
            except OSError as error:  # ssl.SSLError is one
                _log.error("the challenge's certificate for %s cannot be served: %s", name, error)
                continue
            contexts[name] = context
        self._challenges, self.challenge_contexts = challenges, contexts

    # Private

    def _front(self) -> FrontContext:
        context = FrontContext(ssl.PROTOCOL_TLS_SERVER)
        context.front = self
        self._set_up(context)
        context.sni_callback = self._on_server_name  # type: ignore[assignment]  # typeshed wants SSLSocket
        return context

    def _use_keys(self) -> None:
        self._former_name = self._keys.former_name
        if self._set_keys is not None:
            self._set_keys(self.context, self._keys.current)
            self._set_keys(self._older, self._keys.former)

    def _set_up(self, context: ssl.SSLContext, alpn: tuple[str, ...] = ()) -> None:
        _set_up(context, self._min_version, alpn or self._alpn)

    def _choose(self, name: str) -> tuple[Certificate, ssl.SSLContext] | None:
        while (certificate := self._table.select(name)) is not None:
            context = self._contexts.get(certificate.name) or self._load(certificate)
            if context is not None:
                return certificate, context
        return None

    def _load(self, certificate: Certificate) -> ssl.SSLContext | None:
        """Make a certificate's context. When OpenSSL refuses it, it leaves the table: choose again."""
        name = certificate.name
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._set_up(context)
        try:
            load_pair(context, certificate.chain_pem, certificate.key_pem)
        except ssl.SSLError as error:
            _log.error("certificate %s cannot be served: %s", certificate.origin, error.reason or error)
            served = {one.name: one for one in self._table.certificates}
            del served[name]
            if name in self._former:
                served[name], self._contexts[name] = self._former.pop(name)
            self._table = CertificateTable(served.values(), self._table.version)
            return None
        self._contexts[name] = context
        self._former.pop(name, None)
        return context

    def _on_server_name(self, tls: FrontSSLObject, sni: str | None, _: ssl.SSLContext) -> int | None:
        # Called by OpenSSL within do_handshake, for every ClientHello: also without a name (None), also
        # for a resumed session, and twice after a HelloRetryRequest. What returns is an alert, or None.
        if tls.is_challenge:
            return None  # it was chosen already
        try:
            name = server_name(sni)
            chosen = self._choose(name)
            if chosen is None:
                tls.refusal = NO_CERTIFICATE
                return int(ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME)
            tls.sni = name
            tls.certificate, tls.context = chosen
        except OSError as error:  # no descriptor or no memory left: the certificate is not to blame
            _log.error("a certificate cannot be loaded: %s", error)
            return int(ssl.ALERT_DESCRIPTION_INTERNAL_ERROR)
        except Exception:  # a bug: OpenSSL would print it, and the client would hear less
            _log.exception("choosing a certificate failed")
            return int(ssl.ALERT_DESCRIPTION_INTERNAL_ERROR)
        return None


class FrontSSLObject(ssl.SSLObject):
    """A client's TLS connection. The proxy reads the attributes from `get_extra_info("ssl_object")`.

    sni          the name that the client sent, normalised; "" when it sent none or no valid one
    certificate  the one that is presented; None until the client's hello was read
    refusal      why the choice of a certificate refused this client, if it did
    is_challenge whether this is a CA that validates a name: there is nothing to say after the handshake
    """

    sni: str = ""
    certificate: Certificate | None = None
    refusal: str = ""
    is_challenge: bool = False
    _front: FrontTls | None = None
    _incoming: ssl.MemoryBIO | None = None
    _hello: HelloReader | None = None

    def watch(self, front: FrontTls, incoming: ssl.MemoryBIO) -> None:
        """Count for `front` what becomes of this handshake; look at the hello if a challenge is pending."""
        self._front = front
        if front.challenge_contexts:
            self._incoming = incoming
            self._hello = HelloReader()

    def do_handshake(self) -> None:
        """Go on with the handshake as the base class does; count its end, once."""
        if self._incoming is not None:
            self._look()
        hook = sys.unraisablehook
        sys.unraisablehook = lambda unraisable: self._on_unraisable(unraisable, hook)
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            self._count("", "", self.refusal or _result(error))
            raise
        finally:
            sys.unraisablehook = hook
        self._count(self.version() or "", self.selected_alpn_protocol() or "", OK)

    def gone(self) -> None:
        """The client is gone. Counts if its handshake was never brought to an end."""
        self._count("", "", GONE)

    # Private

    def _look(self) -> None:
        """Take the challenge's context if the hello asks for it. SSLWantReadError until it is whole."""
        incoming, reader, front = self._incoming, self._hello, self._front
        assert incoming is not None
        assert reader is not None
        hello = reader.feed(incoming.read())
        if hello is None and not incoming.eof:
            raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "the ClientHello is not whole yet")
        self._incoming = self._hello = None
        if not incoming.eof:
            incoming.write(reader.data)
        if front is not None and hello is not None and hello.protocols == _ACME_ONLY:
            context = front.challenge_contexts.get(server_name(hello.server_name))
            if context is not None:
                self.is_challenge = True
                self.context = context

    def _count(self, version: str, alpn: str, result: str) -> None:
        front, self._front = self._front, None
        if front is not None:
            front.counters.handshakes[version, alpn, result] += 1

    def _on_unraisable(self, unraisable: Any, hook: Callable[[Any], object]) -> None:
        # CPython passes the name's bytes; anything else is somebody else's.
        if isinstance(unraisable.exc_value, UnicodeDecodeError) and isinstance(unraisable.object, bytes):
            self.refusal = BAD_NAME
        else:
            hook(unraisable)


class FrontContext(ssl.SSLContext):
    """The context that stays: each of its connections is a `FrontSSLObject`."""

    sslobject_class = FrontSSLObject
    front: FrontTls

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> FrontSSLObject:
        """Start one connection."""
        tls = cast(
            "FrontSSLObject", super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)
        )
        tls.watch(self.front, incoming)
        return tls


def load_pair(context: ssl.SSLContext, chain_pem: bytes, key_pem: bytes) -> None:
    """Load a chain and its key into a fresh context, from memory.

    Raises ssl.SSLError when OpenSSL does not take them; the context is useless then.
    """
    pem = key_pem + chain_pem
    if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):  # noqa: PTH112 - for each certificate
        descriptor = os.memfd_create("portero-certificate", os.MFD_CLOEXEC)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            file.write(pem)
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    else:
        import tempfile  # no Linux without memfd: nobody else needs it

        with tempfile.NamedTemporaryFile() as file:  # 0600, and gone at once
            file.write(pem)
            file.flush()
            context.load_cert_chain(file.name)


class Trial:
    """Tries a pair as the listener will use it, before it takes the place of one that works.

    OpenSSL takes pairs that no client can use: a curve that it does not negotiate (secp256k1) is noticed by
    nobody but the clients. So a pair is loaded under the listener's own settings, and a client of the same
    OpenSSL shakes hands with it in memory.
    """

    def __init__(self, tls: Tls) -> None:
        self._min_version = _VERSIONS[tls.min_version]
        self._client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Names, dates and issuers are for others to judge.
        self._client.check_hostname, self._client.verify_mode = False, ssl.CERT_NONE

    def __call__(self, certificate: Certificate) -> None:
        """Raises BadCertificate for a pair that cannot be served, and OSError when it cannot be tried."""
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _set_up(server, self._min_version, ALPN)
        try:
            load_pair(server, certificate.chain_pem, certificate.key_pem)
            shake_hands(self._client, server)
        except (ssl.SSLError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise BadCertificate(f"OpenSSL cannot serve it: {reason}") from error


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, name: str | None = None) -> ssl.SSLObject:
    """A handshake in memory; the client's end. Raises the ssl.SSLError of the end that is first to fail."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname=name)
    ends = (ours, server.wrap_bio(to_server, to_client, server_side=True))
    for _ in range(4):  # more flights than any version needs
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ours


# Private


def _set_up(context: ssl.SSLContext, min_version: ssl.TLSVersion, alpn: tuple[str, ...]) -> None:
    context.minimum_version = min_version
    context.set_ciphers(CIPHERS)
    context.set_alpn_protocols(list(alpn))
    context.options |= (
        ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_SINGLE_DH_USE | ssl.OP_SINGLE_ECDH_USE
    )
    # Every cipher here is good, and the client knows its hardware (so says Mozilla's "intermediate").
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    context.num_tickets = 1  # 2 by default, for clients with parallel connections; 15 µs a handshake


def _result(error: ssl.SSLError) -> str:
    reason = error.reason or ""
    return _RESULTS.get(reason) or (_ALERT if "_ALERT_" in reason else FAILED)
