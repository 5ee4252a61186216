"""Every error that portero-py raises on purpose, with its HTTP meaning.

Rules
- `status` is what a client or a registering backend gets; `reason` is a stable snake_case word that
  serves as log field, metric label and problem type. Nothing ever matches on an error's text.
- The text (`str(error)`) is one line for a person: what is wrong and what to do. It never holds a secret.
"""

from __future__ import annotations

from typing import ClassVar


class PorteroError(Exception):
    """Base of all: `status` is the HTTP answer, `reason` the log field and metric label."""

    status: ClassVar[int] = 500
    reason: ClassVar[str] = "internal_error"


class ConfigError(PorteroError):
    """A flag, variable, file or port that cannot be used: printed as one line, exit status 2."""

    reason = "config"


class BadCertificate(ConfigError):
    """A certificate, or its key, that cannot be served."""

    reason = "bad_certificate"


class FeedError(PorteroError):
    """Bytes between control and a worker that are no message: a fault of portero's own."""

    reason = "feed"


class BadSnapshot(PorteroError):
    """A snapshot of the leases in the state directory that cannot be read or written."""

    reason = "bad_snapshot"


# Registration (docs/registration.md)


class RegistrationError(PorteroError):
    """A registration that is refused because of what it says."""

    status = 400
    reason = "bad_registration"


class BadJson(RegistrationError):
    reason = "bad_json"


class BadField(RegistrationError):
    """One field is missing, of the wrong type or out of range; `field` names it."""

    reason = "bad_field"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class RegistrationTooLarge(RegistrationError):
    status = 413
    reason = "too_large"


class NotJson(RegistrationError):
    status = 415
    reason = "not_json"


class NoSuchLease(RegistrationError):
    status = 404
    reason = "no_such_lease"


class UnknownService(RegistrationError):
    """A service that was to be paused, stopped or resumed, and that nobody knows."""

    status = 404
    reason = "no_such_service"


class TooManyWaits(RegistrationError):
    """As many callers as there may be wait for a drain; nothing was done. `retry_after` is in seconds."""

    status = 503
    reason = "too_many_waits"
    retry_after = 1


class RegistryFull(RegistrationError):
    """The registry holds as many services or leases as it is willing to."""

    status = 503
    reason = "registry_full"


class AuthError(PorteroError):
    """Who registers could not prove that he may."""

    status = 401
    reason = "unauthorized"


class SecretMissing(AuthError):
    reason = "secret_missing"


class SecretWrong(AuthError):
    status = 403
    reason = "secret_wrong"


class TokenMissing(AuthError):
    reason = "token_missing"


class TokenMalformed(AuthError):
    reason = "token_malformed"


class TokenExpired(AuthError):
    reason = "token_expired"


class TokenAlgorithm(AuthError):
    """The token is signed with anything but HS256."""

    status = 403
    reason = "token_algorithm"


class TokenMismatch(AuthError):
    """The token is good, but for another service, audience or issuer."""

    status = 403
    reason = "token_mismatch"


class BackendRefused(AuthError):
    """The backend's address lies outside the networks that may register."""

    status = 403
    reason = "backend_refused"


class RateLimited(AuthError):
    """Too many failed authentications from one peer; `retry_after` is in seconds."""

    status = 429
    reason = "rate_limited"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


# The backend's side of a registration


class ClientError(PorteroError):
    """A backend's registration that did not come about."""

    reason = "not_registered"


class PorteroUnreachable(ClientError):
    """No answer from the registration API, or one that is not its own."""

    reason = "unreachable"


class AnswerBrokeOff(ClientError):
    """The registration API did what it was asked, but what was waited for did not come."""

    reason = "answer_broke_off"


class RegistrationRefused(ClientError):
    """The registration API said no.

    `answered` is its status, `retry_after` in seconds, 0 when not said, `reason_given` the problem's reason.
    """

    reason = "refused"

    def __init__(self, message: str, answered: int, retry_after: float = 0.0, reason_given: str = "") -> None:
        super().__init__(message)
        self.answered = answered
        self.retry_after = retry_after
        self.reason_given = reason_given


class DockerUnreachable(PorteroError):
    """No answer from Docker, or one that is of no use: where it was asked, and why."""

    reason = "docker_unreachable"


# Certificates by ACME


class AcmeError(PorteroError):
    """A certificate that could not be had for now; `retry_after` is in seconds, 0.0 when nobody said any."""

    reason = "acme_failed"

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class CaUnreachable(AcmeError):
    """No answer from the CA, or none in time."""

    reason = "ca_unreachable"


class CaOutOfReach(CaUnreachable):
    """No connection to the CA could be made: it never heard of the attempt, and no limit of its counts it."""


class BadCaReply(AcmeError):
    """The CA answered something that is no ACME, or too long."""

    reason = "bad_ca_reply"


class CaRateLimited(AcmeError):
    reason = "ca_rate_limited"


class CaRefused(AcmeError):
    """The CA said no; `problem` is the last word of its problem's type, "" when it is none of RFC 8555's."""

    reason = "ca_refused"

    def __init__(self, message: str, retry_after: float = 0.0, problem: str = "") -> None:
        super().__init__(message, retry_after)
        self.problem = problem


class ValidationFailed(AcmeError):
    """The CA came to look, and did not find its challenge answered."""

    reason = "validation_failed"


class DnsFailed(AcmeError):
    """The record that a CA wants to see could not be made, or did not get to the name's servers in time."""

    reason = "dns_failed"


class OrderLost(AcmeError):
    """The CA does not know the order any more, or has ended it."""

    reason = "order_lost"


class AlreadyReplaced(AcmeError):
    """The certificate that an order was to replace has a successor already (RFC 9773, 5)."""

    reason = "already_replaced"


class StateUnwritable(AcmeError):
    """The state or the certificate directory cannot be read or written."""

    reason = "state_unwritable"


class Busy(AcmeError):
    """Another instance, or a command, is at the same certificate."""

    reason = "busy"


# Bytes on a socket


class WireError(PorteroError):
    """Bytes that are no HTTP, or could be read in two ways. The connection cannot go on."""

    status = 400
    reason = "bad_request"


class BadRequest(WireError):
    """Malformed or ambiguous request."""


class Http2Preface(BadRequest):
    """The beginning of HTTP/2 where HTTP/1 is read: its owner may know what to do with it."""


class VersionRefused(WireError):
    """A request of a major version of HTTP that is not spoken in this way (RFC 9110, 15.6.6)."""

    status = 505
    reason = "version_refused"


class TargetTooLong(WireError):
    status = 414
    reason = "uri_too_long"


class HeadTooLarge(WireError):
    status = 431
    reason = "headers_too_large"


class BodyTooLarge(WireError):
    status = 413
    reason = "body_too_large"


class HeadTimeout(WireError):
    status = 408
    reason = "head_timeout"


class BodyTimeout(WireError):
    """The client stopped in the middle of its body."""

    status = 408
    reason = "body_timeout"


class BadResponse(WireError):
    """A backend's bytes that are no HTTP response, or could be read in two ways."""

    status = 502
    reason = "bad_response"


# Exchanges


class ExchangeError(PorteroError):
    """One request that could not be served; `retry_after` in seconds, 0 when that says nothing."""

    status = 502
    reason = "upstream_failed"
    retry_after: int = 0


class NoSuchService(ExchangeError):
    status = 404
    reason = "no_such_service"


class AmbiguousPath(ExchangeError):
    """Routes lead the path to one service as it is, and to another one as some applications would read it."""

    status = 400
    reason = "ambiguous_path"


class NoBackend(ExchangeError):
    """The service is known, but no backend can take the request now."""

    status = 503
    reason = "no_backend"


class QueueFull(NoBackend):
    """Every backend has as many exchanges as it takes, and no more may wait."""

    reason = "queue_full"


class QueueTimeout(NoBackend):
    """It waited for a backend with room, and there was none in time."""

    reason = "queue_timeout"


class ServiceHalted(NoBackend):
    """Somebody paused or stopped the service; the text is what he wants clients to read."""

    reason = "stopped"


class ServicePaused(ServiceHalted):
    """It was not resumed in time."""

    reason = "paused"


class UnderMaintenance(NoBackend):
    """The service's operator has put a page in its place: `page`, of `content_type`.

    `retry_after` in seconds, 0 when nobody can say.
    """

    reason = "maintenance"

    def __init__(self, message: str, page: str = "", content_type: str = "", retry_after: int = 0) -> None:
        super().__init__(message)
        self.page = page
        self.content_type = content_type
        self.retry_after = retry_after


class GoingDown(NoBackend):
    """This process ends before there was room."""

    reason = "going_down"


class AddressRefused(ExchangeError):
    """The service is not for the client's address."""

    status = 403
    reason = "address_refused"


class TooManyRequests(ExchangeError):
    """The client, or all of them together, are over a rate limit of the service."""

    status = 429
    reason = "rate_limited"

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unauthorized(ExchangeError):
    """A name and a password are needed, of `realm` (RFC 9110, 15.5.2)."""

    status = 401
    reason = "credentials"

    def __init__(self, message: str, realm: str = "") -> None:
        super().__init__(message)
        self.realm = realm


class TooManyLogins(ExchangeError):
    """More passwords wait for being checked than may."""

    status = 429
    reason = "too_many_logins"


class AuthUnreachable(ExchangeError):
    """The server that a service asks about its requests gave no answer that can be used."""

    reason = "auth_unreachable"


class AuthTimeout(ExchangeError):
    status = 504
    reason = "auth_timeout"


class Misdirected(ExchangeError):
    """The Host is not covered by the certificate that this connection presented (RFC 9110, 15.5.20)."""

    status = 421
    reason = "misdirected"


class MethodRefused(ExchangeError):
    """CONNECT, and methods that portero does not pass."""

    status = 405
    reason = "method_refused"


class ConnectFailed(ExchangeError):
    reason = "connect_failed"


class ConnectTimeout(ConnectFailed):
    """There was no connection in time: what failed so has cost somebody that time."""


class Unconnectable(ConnectFailed):
    """What was asked for is nothing to connect to, a host that is no TLS name: no fault of the backend."""


class OutOfDescriptors(ExchangeError):
    """This process, or the machine, has no descriptor for a connection: no fault of the backend."""

    status = 503
    reason = "out_of_descriptors"


class OutOfBuffers(ExchangeError):
    """There is no room for the body of a request that waits for a connection."""

    status = 503
    reason = "out_of_buffers"


class UpstreamTlsFailed(ExchangeError):
    reason = "upstream_tls_failed"


class UpstreamClosed(ExchangeError):
    """The backend closed the connection before its response was complete."""

    reason = "upstream_closed"


class UpstreamTimeout(ExchangeError):
    status = 504
    reason = "upstream_timeout"


class ClientGone(ExchangeError):
    """In the log only: there is nobody to answer."""

    status = 499
    reason = "client_gone"
