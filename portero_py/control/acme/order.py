"""One certificate's way from the CA to its folder, step by step, each written down before the next.

    key on disk -> newOrder -> ORDERED -> challenges shown, answered, validated -> CSR sent -> FINALIZED
    -> chain fetched, checked, in the state directory -> ISSUED -> in the certificate directory -> IDLE

It begins anywhere: with the order that `progress` names it asks the CA how far that is, and goes on there. A
crash loses at most the order whose address had not arrived yet; no certificate is ever issued for that one.

What a failure means for the order:
- the CA cannot be reached, limits the rate, or the disk is full: the order stays, and is carried on later;
- a validation failed: the order is dead (RFC 8555, 7.1.6); with `auto` the next type of challenge is tried
  at once in a new one, then there is a pause;
- a DNS record could not be made: the CA was told nothing, and the order stays; with `auto` the next type of
  challenge is tried in it;
- anything else: it is dropped, and the next attempt makes a new one.

The steps run on the event loop; whatever blocks goes through `ask` or `on_disk`, into ACME's threads. Between
two questions an order waits on the event loop: it keeps nobody from asking.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from portero_py.control.acme.challenges import PendingChallenges, Shown
from portero_py.control.acme.pairs import new_key
from portero_py.core.acme.progress import Progress, Step
from portero_py.core.acme.schedule import DNS_01, choose_challenge
from portero_py.core.certificate_pairs import parse_pair
from portero_py.core.certificates import Certificate
from portero_py.errors import (
    AcmeError,
    AlreadyReplaced,
    BadCaReply,
    BadCertificate,
    CaRateLimited,
    CaUnreachable,
    DnsFailed,
    OrderLost,
    StateUnwritable,
    ValidationFailed,
)

if TYPE_CHECKING:
    from portero_py.control.acme.client import AcmeClient
    from portero_py.control.acme.dns01.records import DnsRecords
    from portero_py.control.acme.files import AcmeFiles
    from portero_py.control.acme.folder import CertificateFolder
    from portero_py.control.acme.locks import Lock
    from portero_py.control.acme.replies import Authorization, Order

#: Seconds for all validations of an order, and for its certificate to be made.
VALIDATION_SECONDS: Final = 120.0
ISSUANCE_SECONDS: Final = 120.0
#: Seconds between two questions, from the first to the longest.
FIRST_POLL: Final = 0.25
LONGEST_POLL: Final = 10.0

#: What leaves an order as it is.
_KEPT: Final = (CaUnreachable, CaRateLimited, StateUnwritable)

_Answer = TypeVar("_Answer")
Call = Callable[..., Awaitable[Any]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all orders share. `answerable` says which types of challenge can validate names, best first."""

    files: AcmeFiles
    folder: CertificateFolder
    challenges: PendingChallenges
    dns: DnsRecords
    ask: Call  # the CA
    on_disk: Call
    clock: Callable[[], float]
    wanted: str
    answerable: Callable[[tuple[str, ...]], tuple[str, ...]]


class OrderRun:
    """One attempt at one certificate. `progress` is how far it is, on disk and here; the lock is held."""

    def __init__(
        self, around: Surroundings, client: AcmeClient, lock: Lock, names: tuple[str, ...], progress: Progress
    ) -> None:
        self.progress = progress
        self._around = around
        self._client = client
        self._lock = lock
        self._name = names[0]
        self._names = names
        self._answerable = around.answerable(names)
        # one order
        self._kind = ""  # of its challenges
        self._has_shown = False  # whether the CA could have found them

    async def run(self, replaces: str) -> Certificate:
        """Carry the order on that was begun, or make one; returns what was installed. Raises AcmeError."""
        is_second = False
        while True:
            try:
                return await self._once(replaces)
            except ValidationFailed as error:
                if not await self._other_challenge(error, self.progress.dropped):
                    raise
            except DnsFailed as error:
                if not await self._other_challenge(error, lambda: self.progress):
                    raise
            except OrderLost as error:
                if self.progress.step is not Step.IDLE:
                    await self._keep(self.progress.dropped())
                if is_second:
                    raise
                is_second = True
                _log.info("%s: %s", self._name, error)
            except AcmeError as error:
                if not isinstance(error, _KEPT) and self.progress.step in _UNISSUED:
                    await self._keep(self.progress.dropped())
                raise

    # Private: steps

    async def _once(self, replaces: str) -> Certificate:
        self._kind, self._has_shown = "", False
        progress = self.progress
        if progress.step is not Step.IDLE and set(progress.names) != set(self._names):
            await self._keep(progress.dropped())
        if self.progress.step is Step.IDLE:
            order = await self._begin(replaces)
        else:
            order = await self._ask(self._client.order, self.progress.order_url)
        return await self._carry_on(order)

    async def _begin(self, replaces: str) -> Order:
        await self._on_disk(self._around.files.save_order_key, self._name, new_key())
        replaces = "" if self.progress.no_replaces else replaces
        try:
            order: Order = await self._ask(self._client.new_order, self._names, replaces)
        except AlreadyReplaced:
            await self._keep(replace(self.progress, no_replaces=True))
            replaces = ""
            order = await self._ask(self._client.new_order, self._names, replaces)
        await self._keep(self.progress.ordered(self._names, order.url, replaces))
        return order

    async def _carry_on(self, order: Order) -> Certificate:
        key_pem = await self._on_disk(self._around.files.order_key, self._name)
        if key_pem is None:
            raise OrderLost("the order's key is gone from the state directory: a new order is made")
        if order.status == "pending":
            await self._authorize(order)
            order = await self._settled(order, frozenset({"pending"}), VALIDATION_SECONDS)
        if order.status == "ready":
            await self._ask(self._client.finalize, order, key_pem, self._names)
            if self.progress.step is Step.ORDERED:
                await self._keep(self.progress.finalized())
            order = await self._settled(order, frozenset({"ready", "processing"}), ISSUANCE_SECONDS)
        elif order.status == "processing":
            order = await self._settled(order, frozenset({"processing"}), ISSUANCE_SECONDS)
        if order.status != "valid" or not order.certificate:
            raise await self._reason(order)
        chain_pem = await self._ask(self._client.certificate, order)
        certificate = self._checked(chain_pem, key_pem)
        await self._on_disk(
            self._around.files.save_pair, self._name, certificate.chain_pem, certificate.key_pem
        )
        await self._keep(self.progress.issued())
        await self._on_disk(self._around.folder.install, certificate)
        await self._keep(self.progress.installed(certificate.fingerprint, self._around.clock()))
        return certificate

    def _checked(self, chain_pem: bytes, key_pem: bytes) -> Certificate:
        try:
            certificate = parse_pair(self._name, chain_pem, key_pem, "the CA's reply")
        except BadCertificate as error:
            raise BadCaReply(f"the CA's certificate cannot be used: {error}") from error
        missing = set(self._names) - set(certificate.names)
        if missing:
            raise BadCaReply(f"the CA's certificate is not for {', '.join(sorted(missing)[:5])}")
        if certificate.not_after <= self._around.clock():
            raise BadCaReply("the CA's certificate has expired already (is this machine's clock right?)")
        return certificate

    # Private: validation

    async def _authorize(self, order: Order) -> None:
        """Show what the CA wants to see, say so, and wait until it has made up its mind."""
        waiting: list[Authorization] = []
        for url in order.authorizations:
            authorization: Authorization = await self._ask(self._client.authorization, url)
            if authorization.status == "valid":
                continue
            if authorization.status not in _UNDECIDED:
                # It failed before this attempt: while nobody was there to answer, after a crash.
                raise OrderLost(f"the authorization of {authorization.name} is {authorization.status[:40]}")
            waiting.append(authorization)
        shown, answers = [], []
        for authorization in waiting:
            if authorization.name not in self._names:
                raise BadCaReply("the CA's order is for other names")
            challenge = self._chosen(authorization)
            proof = self._client.key_authorization(challenge.token)
            shown.append(Shown(challenge.kind, authorization.name, challenge.token, proof))
            if challenge.status == "pending":
                answers.append(challenge)
        at_listeners = [each for each in shown if each.kind != DNS_01]
        await self._around.challenges.show(at_listeners)
        try:
            async with self._in_dns([each for each in shown if each.kind == DNS_01]):
                self._has_shown = bool(shown)
                for challenge in answers:
                    await self._ask(self._client.answer, challenge)
                for authorization in waiting:
                    await self._validated(authorization)
        finally:
            await self._around.challenges.hide(at_listeners)

    @asynccontextmanager
    async def _in_dns(self, shown: list[Shown]) -> AsyncIterator[None]:
        """Have records in DNS, and remove them; at portero's end that is left to the next start."""
        dns = self._around.dns
        try:
            if shown:
                proofs = [(each.name, each.key_authorization) for each in shown]
                await dns.show(self._name, proofs, self._beat)
            yield
        except asyncio.CancelledError:
            raise
        except BaseException:  # raised on: whatever became of the order, its records go
            if shown:
                await dns.hide(self._name, self._beat)
            raise
        if shown:
            await dns.hide(self._name, self._beat)

    def _chosen(self, authorization: Authorization) -> Any:
        around = self._around
        offered = {challenge.kind: challenge for challenge in authorization.challenges if challenge.token}
        usable = tuple(kind for kind in self._answerable if kind in offered)
        kind = choose_challenge(around.wanted, usable, self.progress.tried)
        if not kind:
            wanted = around.wanted if around.wanted != "auto" else " or ".join(self._answerable) or "dns-01"
            raise ValidationFailed(f"the CA does not offer {wanted} for {authorization.name}")
        self._kind = kind
        return offered[kind]

    async def _validated(self, authorization: Authorization) -> None:
        found: Authorization = await self._polled(
            lambda: self._ask(self._client.authorization, authorization.url),
            _UNDECIDED,
            VALIDATION_SECONDS,
        )
        if found.status != "valid":
            raise _why_failed(found)

    async def _other_challenge(self, error: AcmeError, after: Callable[[], Progress]) -> bool:
        """Note which type failed, and what becomes of the order; whether another type is left to try now."""
        around, kind = self._around, self._kind
        progress = self.progress if self.progress.step is Step.IDLE else after()
        if kind:
            progress = progress.challenge_failed(kind, error.reason, str(error), around.clock())
        await self._keep(progress)
        left = choose_challenge(around.wanted, self._answerable, progress.tried) if kind else ""
        if left:
            _log.warning("%s: %s failed, %s is next: %s", self._name, kind, left, error)
        return bool(left)

    # Private: polling

    async def _settled(self, order: Order, passing: frozenset[str], seconds: float) -> Order:
        found: Order = await self._polled(lambda: self._ask(self._client.order, order.url), passing, seconds)
        return found

    async def _polled(
        self, ask: Callable[[], Awaitable[Any]], passing: frozenset[str], seconds: float
    ) -> Any:
        """Ask until the status is none of `passing`. Raises CaUnreachable when it takes longer."""
        clock = self._around.clock
        ends, pause = clock() + seconds, FIRST_POLL
        while True:
            found = await ask()
            if found.status not in passing:
                return found
            if clock() > ends:
                raise CaUnreachable(f"the CA did not decide within {seconds:.0f} s")
            await asyncio.sleep(min(max(pause, found.retry_after), LONGEST_POLL))
            pause = min(pause * 1.5, LONGEST_POLL)
            await self._beat()

    async def _beat(self) -> None:
        await self._on_disk(self._lock.renew, self._around.clock())

    async def _reason(self, order: Order) -> AcmeError:
        """Why an order did not become valid."""
        if not self._has_shown and self.progress.step is Step.ORDERED:
            return OrderLost("the order failed while nobody was there to answer: a new one is made")
        for url in order.authorizations:
            authorization = await self._ask(self._client.authorization, url)
            for challenge in authorization.challenges:
                if challenge.error is not None:
                    self._kind = self._kind or challenge.kind
                    return _about(authorization.name, challenge.error)
        if order.error is not None:
            return order.error
        return OrderLost(f"the CA says that the order is {order.status[:40]}: a new one is made")

    # Private: the threads

    async def _keep(self, progress: Progress) -> None:
        await self._on_disk(self._around.files.save_progress, self._name, progress)
        self.progress = progress

    async def _ask(self, function: Callable[..., _Answer], *arguments: object) -> _Answer:
        answer: _Answer = await self._around.ask(function, *arguments)
        return answer

    async def _on_disk(self, function: Callable[..., _Answer], *arguments: object) -> _Answer:
        answer: _Answer = await self._around.on_disk(function, *arguments)
        return answer


# Private

_UNISSUED: Final = (Step.ORDERED, Step.FINALIZED)
_UNDECIDED: Final = frozenset({"pending", "processing"})


def _why_failed(authorization: Authorization) -> AcmeError:
    for challenge in authorization.challenges:
        if challenge.error is not None:
            return _about(authorization.name, challenge.error)
    return OrderLost(f"the authorization of {authorization.name} is {authorization.status[:40]}")


def _about(name: str, error: AcmeError) -> AcmeError:
    return type(error)(f"{name}: {error}", error.retry_after)
