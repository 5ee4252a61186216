"""The CA's protocol (RFC 8555) around the `acme` library: plain values in and out, typed errors.

Everything here blocks: it runs in the threads that `control.acme` has for it, several at a time, and it is
imported there, not before, because the library costs 22 MiB. Orders may share a client; whoever changes its
account or its key (`register`, `has_account`, `change_key`) has it alone. The library makes and signs
messages (JWS, external accounts); `network` sends them, `replies` reads what comes back.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

from acme import jws, messages
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from josepy import b64, interfaces, json_util, jwa, jwk
from josepy import errors as jose_errors

from portero_py.control.acme import replies
from portero_py.control.acme.network import Network
from portero_py.control.acme.replies import MAX_URL, Authorization, Challenge, Order, RenewalInfo
from portero_py.core.acme import faults
from portero_py.errors import BadCaReply, CaRefused

if TYPE_CHECKING:
    import requests


class AcmeClient:
    """One account at one CA. `account` is its address, "" until `register` was called.

    Every method raises AcmeError: CaUnreachable, BadCaReply, or what `core.acme.faults` makes of a problem.
    """

    def __init__(self, directory_url: str, key_pem: bytes, account: str = "", *, ca_file: str = "") -> None:
        self._key = _jwk(key_pem)
        self._network = Network(self._key, ca_file)
        self._directory_url = directory_url
        self._directory: dict[str, Any] = {}
        self._asking = threading.Lock()  # for the directory: once is enough
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
        self._network.close()

    # The account

    @property
    def terms_of_service(self) -> str:
        """The address of the CA's terms, or ""."""
        meta = self._resource("meta", {})
        found = meta.get("termsOfService") if isinstance(meta, dict) else ""
        return found if isinstance(found, str) and len(found) <= MAX_URL and found.isprintable() else ""

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
            except (ValueError, jose_errors.Error) as error:
                raise CaRefused(
                    "--acme-eab-hmac-file holds no base64url: copy it as the CA gave it"
                ) from error
        asked = messages.NewRegistration.from_data(
            email=email or None, terms_of_service_agreed=True, external_account_binding=binding
        )
        self.account = ""
        reply = self._post(url, asked)
        self.account = replies.location(reply)
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
        self.account = replies.location(reply)
        return True

    def change_key(self, key_pem: bytes) -> None:
        """Give the account another key (RFC 8555, 7.3.5), and sign with that one from now on."""
        fresh, url = _jwk(key_pem), self._url("keyChange")
        old_key: dict[str, Any] = self._key.public_key().to_partial_json()
        inner = jws.JWS.sign(
            json.dumps({"account": self.account, "oldKey": old_key}).encode(),
            key=fresh,
            alg=jwa.ES256,
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
        return replies.order(replies.location(reply), reply)

    def order(self, url: str) -> Order:
        """What has become of an order. `OrderLost` when the CA does not know it."""
        try:
            return replies.order(url, self._post(url, None))
        except CaRefused as error:
            # RFC 8555 has no type of its own for "no such order": malformed (Boulder, Pebble), or bare 404.
            if error.problem in {"", "malformed", "unauthorized"}:
                raise faults.lost(str(error)) from error
            raise

    def authorization(self, url: str) -> Authorization:
        """What the CA wants to see for one of the order's names."""
        return replies.authorization(url, self._post(url, None))

    def key_authorization(self, token: str) -> str:
        """What shows that this account answers a challenge (RFC 8555, 8.1)."""
        return f"{token}.{b64.b64encode(self._key.thumbprint(hash_function=hashes.SHA256)).decode()}"

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
        chain: bytes = self._post(order.certificate, None).content
        return chain

    # Certificates

    @property
    def has_renewal_info(self) -> bool:
        """Whether the CA says when it wants certificates renewed (RFC 9773)."""
        return bool(self._resource("renewalInfo", ""))

    def renewal_info(self, certificate_id: str) -> RenewalInfo:
        """When the CA wants a certificate renewed."""
        url = f"{self._url('renewalInfo').rstrip('/')}/{certificate_id}"
        return replies.renewal_info(self._network.fetch(url))

    def revoke(self, chain_pem: bytes, reason: int) -> None:
        """Revoke a certificate of this account (RFC 8555, 7.6); `reason` as in RFC 5280, 5.3.1."""
        leaf = x509.load_pem_x509_certificate(chain_pem)
        self._post(self._url("revokeCert"), messages.Revocation(certificate=leaf, reason=reason))

    # Private

    def _resource(self, name: str, default: object) -> Any:
        with self._asking:
            if not self._directory:
                self._directory = replies.document_of(self._network.fetch(self._directory_url))
        return self._directory.get(name, default)

    def _url(self, name: str) -> str:
        found = self._resource(name, "")
        if not isinstance(found, str) or not found:
            raise BadCaReply(f"{self._directory_url} is no ACME directory: it has no {name}")
        return found

    def _post(self, url: str, content: interfaces.JSONDeSerializable | None) -> requests.Response:
        return self._network.send(url, content, self._url("newNonce"))


# Private


class _NewOrder(messages.NewOrder):
    """An order that names its predecessor (RFC 9773, 5)."""

    replaces: str | None = json_util.field("replaces", omitempty=True)


class _Nothing(json_util.JSONObjectWithFields):
    """`{}`: the payload that answers a challenge (RFC 8555, 7.5.1)."""

    def __bool__(self) -> bool:
        return True  # the library sends an empty payload for what is false


def _private_key(key_pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(key_pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadCaReply("the state directory holds a key that portero did not make")
    return key


def _jwk(key_pem: bytes) -> jwk.JWKEC:
    return jwk.JWKEC(key=_private_key(key_pem))
