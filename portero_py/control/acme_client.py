"""The CA's protocol (RFC 8555), around the `acme` library: plain values in and out, typed errors, bounded replies.

Everything here blocks: it runs in the one thread that `control.acme` has for it, and it is imported there, not
before, because the library costs 22 MiB. The library signs (JWS, nonces, external accounts); requests are sent
and replies are read here, because a CA's reply is a stranger's:
- https only, certificates checked, no redirects, at most `MAX_REPLY` bytes, at most `TIMEOUT` seconds;
- a nonce that the CA refuses is replaced `MAX_NONCES` times (the library: once), the one in the error first;
- Retry-After is kept with the error, and a 409 is the problem that it says it is (the library: a conflict).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar

import josepy as jose
import requests
from acme import client, jws, messages
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

import portero_py
from portero_py.core import acme_faults
from portero_py.errors import AcmeError, BadCaReply, CaRefused, CaUnreachable

MAX_REPLY: Final = 256 * 1024
#: Seconds for connecting, for each silence, and for a whole reply.
CONNECT_TIMEOUT: Final = 10.0
SILENCE: Final = 15.0
TIMEOUT: Final = 30.0
MAX_NONCES: Final = 30
#: More than any order of `acme_names.MAX_NAMES` has.
_MAX_LIST: Final = 200
_MAX_URL: Final = 2048

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class Order:
    """RFC 8555, 7.1.3. `error` is what the CA says about an order that is "invalid", or None."""

    url: str
    status: str
    authorizations: tuple[str, ...]
    finalize: str
    certificate: str
    error: AcmeError | None
    retry_after: float


@dataclass(frozen=True, slots=True)
class Challenge:
    """RFC 8555, 7.1.5. `error` is why it failed, or None."""

    kind: str
    url: str
    token: str
    status: str
    error: AcmeError | None


@dataclass(frozen=True, slots=True)
class Authorization:
    """RFC 8555, 7.1.4: what has to be shown for one name."""

    url: str
    name: str
    status: str
    challenges: tuple[Challenge, ...]
    retry_after: float


@dataclass(frozen=True, slots=True)
class RenewalInfo:
    """RFC 9773, 4.2: the window (epoch seconds), the CA's explanation or "", and its Retry-After."""

    start: float
    end: float
    why: str
    retry_after: float


class AcmeClient:
    """One account at one CA. `account` is its address, "" until `register` was called.

    Every method raises `AcmeError`s: CaUnreachable, BadCaReply, or what `core.acme_faults` makes of a problem.
    """

    def __init__(self, directory_url: str, key_pem: bytes, account: str = "", *, ca_file: str = "") -> None:
        self._key = _jwk(key_pem)
        self._network = _Network(self._key, ca_file)
        self._directory_url = directory_url
        self._directory: dict[str, Any] = {}
        self.account = account

    @property
    def account(self) -> str:
        """The account's address."""
        known = self._network.account
        return str(known["uri"]) if known is not None else ""

    @account.setter
    def account(self, url: str) -> None:
        body = messages.Registration()
        self._network.account = messages.RegistrationResource(uri=url, body=body) if url else None

    def close(self) -> None:
        """Close the connections."""
        self._network.session.close()

    # The account

    @property
    def terms_of_service(self) -> str:
        """The address of the CA's terms, or ""."""
        meta = self._resource("meta", {})
        found = meta.get("termsOfService") if isinstance(meta, dict) else ""
        return found if isinstance(found, str) and len(found) <= _MAX_URL and found.isprintable() else ""

    def register(self, email: str = "", eab_kid: str = "", eab_hmac: str = "") -> str:
        """Make the account, or find the one that this key has; returns its address.

        Registering says that the terms of service are agreed to. `eab_hmac` is base64url.
        """
        url = self._url("newAccount")
        binding = None
        if eab_kid:
            directory = messages.Directory({"newAccount": url})
            try:
                binding = messages.ExternalAccountBinding.from_data(
                    self._key.public_key(), eab_kid, eab_hmac, directory
                )
            except (ValueError, jose.errors.Error) as error:
                raise CaRefused(
                    "--acme-eab-hmac-file holds no base64url: copy it as the CA gave it"
                ) from error
        asked = messages.NewRegistration.from_data(
            email=email or None, terms_of_service_agreed=True, external_account_binding=binding
        )
        self.account = ""
        reply = self._post(url, asked)
        self.account = _location(reply)
        return self.account

    def has_account(self) -> bool:
        """Whether the CA knows this key; if so, `account` is set."""
        self.account = ""
        try:
            reply = self._post(self._url("newAccount"), messages.NewRegistration(only_return_existing=True))
        except CaRefused as error:
            if error.problem == "accountDoesNotExist":
                return False
            raise
        self.account = _location(reply)
        return True

    def change_key(self, key_pem: bytes) -> None:
        """Give the account another key (RFC 8555, 7.3.5), and sign with that one from now on."""
        fresh, url = _jwk(key_pem), self._url("keyChange")
        old_key: dict[str, Any] = self._key.public_key().to_partial_json()
        inner = jws.JWS.sign(
            json.dumps({"account": self.account, "oldKey": old_key}).encode(),
            key=fresh,
            alg=jose.ES256,
            nonce=None,
            url=url,
        )
        self._post(url, inner)
        self._key = self._network.key = fresh

    # Orders

    def new_order(self, names: tuple[str, ...], replaces: str = "") -> Order:
        """Order a certificate; `replaces` is the ARI identifier of the one that it succeeds."""
        identifiers = [messages.Identifier(typ=messages.IDENTIFIER_FQDN, value=name) for name in names]
        reply = self._post(
            self._url("newOrder"), _NewOrder(identifiers=identifiers, replaces=replaces or None)
        )
        return _order(_location(reply), reply)

    def order(self, url: str) -> Order:
        """What has become of an order. `OrderLost` when the CA does not know it."""
        try:
            return _order(url, self._post(url, None))
        except CaRefused as error:
            # RFC 8555 has no type of its own for "no such order": malformed (Boulder, Pebble), or bare 404.
            if error.problem in {"", "malformed", "unauthorized"}:
                raise acme_faults.lost(str(error)) from error
            raise

    def authorization(self, url: str) -> Authorization:
        """What the CA wants to see for one of the order's names."""
        reply = self._post(url, None)
        document = _document(reply)
        identifier = document.get("identifier")
        if not isinstance(identifier, dict):
            raise BadCaReply("an authorization of the CA is for no name")
        return Authorization(
            url=url,
            name=_text(identifier, "value").lower(),
            status=_text(document, "status"),
            challenges=tuple(_challenge(each) for each in _list(document, "challenges")),
            retry_after=_retry_after(reply),
        )

    def key_authorization(self, token: str) -> str:
        """What shows that this account answers a challenge (RFC 8555, 8.1)."""
        return f"{token}.{jose.b64encode(self._key.thumbprint(hash_function=hashes.SHA256)).decode()}"

    def answer(self, challenge: Challenge) -> None:
        """Tell the CA that it may come and look."""
        self._post(challenge.url, _Nothing())

    def finalize(self, order: Order, key_pem: bytes, names: tuple[str, ...]) -> None:
        """Send the CSR for `names`, signed with the certificate's future key. Never with must-staple."""
        listed = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        request = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([]))
            .add_extension(listed, critical=False)
            .sign(_private_key(key_pem), hashes.SHA256())
        )
        self._post(order.finalize, messages.CertificateRequest(csr=request))

    def certificate(self, order: Order) -> bytes:
        """The chain of an order that is "valid", PEM, leaf first."""
        return self._post(order.certificate, None).content

    # Certificates

    @property
    def has_renewal_info(self) -> bool:
        """Whether the CA says when it wants certificates renewed (RFC 9773)."""
        return bool(self._resource("renewalInfo", ""))

    def renewal_info(self, certificate_id: str) -> RenewalInfo:
        """When the CA wants a certificate renewed."""
        reply = self._network.fetch(f"{self._url('renewalInfo').rstrip('/')}/{certificate_id}")
        document = _document(reply)
        window = document.get("suggestedWindow")
        if not isinstance(window, dict):
            raise BadCaReply("the CA's renewal information has no window")
        start, end = _moment(_text(window, "start")), _moment(_text(window, "end"))
        if end <= start:
            raise BadCaReply("the CA's renewal window ends before it begins")
        why = document.get("explanationURL", "")
        why = why if isinstance(why, str) and why.isprintable() else ""
        return RenewalInfo(start, end, why[:_MAX_URL], _retry_after(reply))

    def revoke(self, chain_pem: bytes, reason: int) -> None:
        """Revoke a certificate of this account (RFC 8555, 7.6); `reason` as in RFC 5280, 5.3.1."""
        leaf = x509.load_pem_x509_certificate(chain_pem)
        self._post(self._url("revokeCert"), messages.Revocation(certificate=leaf, reason=reason))

    # Private

    def _resource(self, name: str, default: object) -> Any:
        if not self._directory:
            self._directory = _document(self._network.fetch(self._directory_url))
        return self._directory.get(name, default)

    def _url(self, name: str) -> str:
        found = self._resource(name, "")
        if not isinstance(found, str) or not found:
            raise BadCaReply(f"{self._directory_url} is no ACME directory: it has no {name}")
        return found

    def _post(self, url: str, content: jose.JSONDeSerializable | None) -> requests.Response:
        return self._network.send(url, content, self._url("newNonce"))


def new_key() -> bytes:
    """A fresh P-256 key, PEM, not encrypted."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


# Private


class _NewOrder(messages.NewOrder):
    """An order that names its predecessor (RFC 9773, 5)."""

    replaces: str | None = jose.field("replaces", omitempty=True)


class _Nothing(jose.JSONObjectWithFields):
    """`{}`: the payload that answers a challenge (RFC 8555, 7.5.1)."""

    def __bool__(self) -> bool:
        return True  # the library sends an empty payload for what is false


class _Network(client.ClientNetwork):
    """The library's signing, with our own sending and reading."""

    def __init__(self, key: jose.JWK, ca_file: str) -> None:
        super().__init__(key, alg=jose.ES256, user_agent=f"portero-py/{portero_py.__version__}")
        self._ca: str | bool = ca_file or True

    def fetch(self, url: str) -> requests.Response:
        """GET; a reply with an error raises."""
        return _checked(self._exchange("GET", url))

    def send(self, url: str, content: jose.JSONDeSerializable | None, nonces: str) -> requests.Response:
        """POST what is signed, POST-as-GET when `content` is None; `nonces` is where fresh nonces come from."""
        for _ in range(MAX_NONCES):
            nonce = self._nonces.pop() if self._nonces else self._fresh_nonce(nonces)
            try:
                signed = self._wrap_in_jws(content, nonce, url)  # type: ignore[arg-type]  # None is POST-as-GET
            except (ValueError, TypeError, jose.errors.Error) as error:
                raise BadCaReply("the CA's nonce cannot be used") from error
            reply = self._exchange("POST", url, signed)
            self._keep_nonce(reply)
            try:
                return _checked(reply)
            except CaRefused as error:
                if error.problem != "badNonce":
                    raise
        raise CaUnreachable(f"the CA refused {MAX_NONCES} of its own nonces")

    # Private

    def _fresh_nonce(self, url: str) -> Any:
        self._keep_nonce(_checked(self._exchange("HEAD", url)))
        if not self._nonces:
            raise BadCaReply("the CA gives no nonce")
        return self._nonces.pop()

    def _keep_nonce(self, reply: requests.Response) -> None:
        nonce = reply.headers.get(self.REPLAY_NONCE_HEADER, "")
        if 0 < len(nonce) <= 1024:
            try:
                self._nonces.add(jws.Header._fields["nonce"].decode(nonce))  # noqa: SLF001
            except jose.DeserializationError:
                return  # one that is garbled is none

    def _exchange(self, method: str, url: str, data: str | None = None) -> requests.Response:
        if (
            not url.startswith("https://")
            or len(url) > _MAX_URL
            or not url.isascii()
            or not url.isprintable()
        ):
            raise BadCaReply(f"the CA gives an address that is no https:// one: {url[:80]!r}")
        headers = {"User-Agent": self.user_agent, "Accept-Encoding": "identity"}
        if data is not None:
            headers["Content-Type"] = self.JOSE_CONTENT_TYPE
        ends = time.monotonic() + TIMEOUT
        try:
            with self.session.request(
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
                reply._content = bytes(body)  # type: ignore[attr-defined]  # noqa: SLF001 - read, within its bound
                reply.encoding = "utf-8"
                return reply
        except requests.exceptions.SSLError as error:
            raise CaUnreachable(
                f"the CA's own certificate cannot be verified (--acme-ca-file?): {_why(error)}"
            ) from error
        except (requests.RequestException, OSError, ValueError) as error:
            raise CaUnreachable(f"{url.split('/')[2][:100]} cannot be reached: {_why(error)}") from error


def _checked(reply: requests.Response) -> requests.Response:
    if 200 <= reply.status_code < 300:
        return reply
    retry_after = _retry_after(reply)
    try:
        document = _document(reply)
    except BadCaReply:
        document = {}
    problem, detail = document.get("type"), document.get("detail")
    if isinstance(problem, str) and acme_faults.kind_of(problem):
        raise _fault(document, retry_after)
    said = f"status {reply.status_code}" + (f", {detail[:200]}" if isinstance(detail, str) else "")
    if reply.status_code in {429, 503} or reply.status_code >= 500:
        raise CaUnreachable(f"the CA cannot serve at the moment: {said}", retry_after)
    raise CaRefused(f"the CA refused: {said}", retry_after)


def _fault(document: Mapping[str, Any], retry_after: float = 0.0) -> AcmeError:
    """The error of a problem document; of several in one (RFC 8555, 6.7.1) the first counts."""
    parts = document.get("subproblems")
    if isinstance(parts, list) and parts and isinstance(parts[0], dict) and "type" in parts[0]:
        document = {**document, **parts[0]}
    problem, detail = document.get("type"), document.get("detail")
    return acme_faults.fault(str(problem or ""), str(detail or ""), retry_after)


def _order(url: str, reply: requests.Response) -> Order:
    document = _document(reply)
    authorizations = _list(document, "authorizations")
    if not all(isinstance(each, str) for each in authorizations):
        raise BadCaReply("the CA's order lists something that is no authorization")
    error = document.get("error")
    certificate = document.get("certificate", "")
    return Order(
        url=url,
        status=_text(document, "status"),
        authorizations=tuple(authorizations),
        finalize=_text(document, "finalize"),
        certificate=certificate if isinstance(certificate, str) else "",
        error=_fault(error) if isinstance(error, dict) else None,
        retry_after=_retry_after(reply),
    )


def _challenge(document: object) -> Challenge:
    if not isinstance(document, dict):
        raise BadCaReply("the CA's authorization lists something that is no challenge")
    error, token = document.get("error"), document.get("token", "")
    return Challenge(
        kind=_text(document, "type"),
        url=_text(document, "url"),
        token=token if isinstance(token, str) else "",
        status=_text(document, "status"),
        error=_fault(error) if isinstance(error, dict) else None,
    )


def _document(reply: requests.Response) -> dict[str, Any]:
    try:
        document = json.loads(reply.content)
    except (ValueError, RecursionError) as error:
        raise BadCaReply(f"the CA's reply is no JSON (status {reply.status_code})") from error
    if not isinstance(document, dict):
        raise BadCaReply("the CA's reply is no JSON object")
    return document


def _text(document: Mapping[str, Any], name: str) -> str:
    found = document.get(name)
    if not isinstance(found, str) or len(found) > _MAX_URL:
        raise BadCaReply(f"the CA's reply has no usable {name}")
    return found


def _list(document: Mapping[str, Any], name: str) -> list[Any]:
    found = document.get(name)
    if not isinstance(found, list) or len(found) > _MAX_LIST:
        raise BadCaReply(f"the CA's reply has no usable {name}")
    return found


def _location(reply: requests.Response) -> str:
    url = reply.headers.get("Location", "")
    if not url:
        raise BadCaReply("the CA's reply has no Location")
    return str(url)


def _retry_after(reply: requests.Response) -> float:
    """Seconds (RFC 9110, 10.2.3), 0.0 when there are none."""
    said = reply.headers.get("Retry-After", "").strip()
    if said.isascii() and said.isdigit():
        return float(said[:9])
    return _or_nothing(lambda: max(parsedate_to_datetime(said).timestamp() - time.time(), 0.0), 0.0)


def _moment(said: str) -> float:
    """RFC 3339 as epoch seconds."""
    from datetime import datetime  # noqa: PLC0415

    found = _or_nothing(lambda: datetime.fromisoformat(said), None)
    if found is None or found.tzinfo is None:
        raise BadCaReply("the CA's renewal window has no usable times")
    return found.timestamp()


def _or_nothing(read: Callable[[], _Found], otherwise: _Found) -> _Found:
    try:
        return read()
    except (ValueError, TypeError, OverflowError):
        return otherwise


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


def _private_key(key_pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(key_pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadCaReply("the state directory holds a key that portero did not make")
    return key


def _jwk(key_pem: bytes) -> jose.JWKEC:
    return jose.JWKEC(key=_private_key(key_pem))
