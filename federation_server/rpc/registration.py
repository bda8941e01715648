"""Register, RefreshToken and Deregister: how a neuron comes in, stays in and leaves.

    own token good ─────────────────────────────▶ renewed
    else enrollment token good ─┬─ id is new ───▶ created                         counted
                                ├─ same request ▶ repeated
                                ├─ may re-enroll ▶ re-enrolled, older tokens die   counted
                                └─ else ────────▶ NEURON_EXISTS
    else, if strangers may come ┬─ id is new ───▶ PENDING, or created in mode `open`
                                ├─ same request ▶ repeated
                                └─ else ────────▶ NEURON_EXISTS

Nothing is said of a neuron_id, in words or in time, before a credential has proved good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from federation.v1 import session_service_pb2 as pb
from federation.v1.errors_pb2 import ErrorReason
from federation_server.domain.access import EnrollmentMode, EnrollmentToken, NeuronIdentity
from federation_server.domain.neuron import Lifecycle, NeuronDescription, Presence
from federation_server.live.notifier import hint_end
from federation_server.live.session import SessionEnd
from federation_server.rpc import audit, auth, errors
from federation_server.rpc.convert_access import token_to_proto
from federation_server.rpc.convert_neuron import description_from_proto, neuron_to_proto
from federation_server.rpc.tokens import Tokens
from federation_server.store import applications, enrollment, neurons
from federation_server.store import registration as store
from federation_server.store.database import Database, current_time

log = structlog.get_logger(__name__)

MOST_PENDING = 1000
"""How many neurons may wait for their approval: anybody can make another one."""

FULL_RETRY_S = 300.0


@dataclass(frozen=True, slots=True)
class _Admitted:
    """What a credential has got for a neuron."""

    generation: int
    how: str
    """For the logs: created, repeated, re-enrolled, renewed, applied, joined."""
    before: dict[str, Any] | None
    after: dict[str, Any]
    """What has changed of the description, for the audit log."""
    created: bool = False
    enrollment_token_id: str | None = None


class Registration:
    """Who is in the fleet, from the neurons' side."""

    def __init__(
        self,
        database: Database,
        tokens: Tokens,
        mode: EnrollmentMode = EnrollmentMode.TOKEN,
    ) -> None:
        """Writes to `database`; gives out `tokens`; `mode` says what becomes of strangers."""
        self._database = database
        self._tokens = tokens
        self._mode = mode

    def shown_token(
        self, request: pb.RegisterRequest, metadata: auth.Metadata | None
    ) -> NeuronIdentity | None:
        """What the token says that a call carries, if it is that of the neuron which it registers
        and its time is not over, or may still be renewed; it may have been revoked. Costs the
        database nothing.
        """
        try:
            own = self._tokens.verify(auth.neuron_token(metadata) or "", to_renew=True)
        except errors.Refused:
            return None
        return own if own.neuron_id == request.description.neuron_id else None

    async def register(
        self, request: pb.RegisterRequest, metadata: auth.Metadata | None
    ) -> pb.RegisterResponse:
        """Registers a neuron, or renews its description. The request has been checked.

        A neuron's own token that is no longer good does not stand in the way of an enrollment
        token; without one it is the error.

        Raises:
            errors.Refused: as the contract says.
        """
        description = description_from_proto(request.description)
        own = await self._own_identity(description.neuron_id, metadata)
        if isinstance(own, NeuronIdentity):
            response = await self._renewed(description, own, audit.logged_request_id(request))
            if response is not None:
                return response
            own = errors.credential_invalid()
        if not request.enrollment_token and self._mode is EnrollmentMode.TOKEN:
            raise own
        # Another transaction: an enrollment token's row is always locked before a neuron's.
        async with self._database.begin_for_neurons() as connection:
            if request.enrollment_token:
                admitted = await _enroll(connection, description, request)
            else:
                admitted = await _take_in(connection, description, request, self._mode, own)
            await _record(
                connection, description.neuron_id, admitted, audit.logged_request_id(request)
            )
            response = await self._response(connection, description, admitted)
        return _logged(response, admitted)

    async def refresh_token(self, neuron: NeuronIdentity) -> pb.RefreshTokenResponse:
        """A new token; the one before is good until this one is used.

        Raises:
            errors.Refused: the neuron was deactivated or deleted, or its token revoked, since it
                called.
        """
        async with self._database.begin_for_neurons() as connection:
            standing = await store.lock_neuron(connection, neuron.neuron_id)
            if standing is None or standing.generation > neuron.generation:
                raise errors.credential_invalid()
            _refuse_deactivated(standing, neuron.neuron_id)
            now = await current_time(connection)
            generation = store.newer_generation(neuron.generation, now)
            issued = self._tokens.issue(neuron.neuron_id, generation, now)
        log.info("token refreshed", action="token_refreshed", neuron_id=neuron.neuron_id)
        return pb.RefreshTokenResponse(token=token_to_proto(issued))

    async def deregister(
        self, neuron: NeuronIdentity, request: pb.DeregisterRequest
    ) -> pb.DeregisterResponse:
        """Takes a neuron out of the fleet. A second time changes nothing.

        Raises:
            errors.Refused: the neuron was deleted, or its token revoked, since it called.
        """
        neuron_id = neuron.neuron_id
        async with self._database.begin_for_neurons() as connection:
            standing = await store.lock_neuron(connection, neuron_id)
            if standing is None:
                raise errors.credential_invalid()
            if standing.generation > neuron.generation:
                if standing.lifecycle is Lifecycle.DEACTIVATED:
                    return pb.DeregisterResponse()
                raise errors.credential_invalid()
            reason = request.reason or "deregistered"
            await store.deregister(connection, neuron_id, reason)
            before = {"lifecycle": standing.lifecycle}
            after = {"lifecycle": Lifecycle.DEACTIVATED, "lifecycle_reason": reason}
            await audit.record(connection, "neuron", neuron_id, before, after)
            ended = await store.end_session(connection, neuron_id, Presence.OFFLINE, reason)
            await _tell(connection, neuron_id, ended, SessionEnd.DEACTIVATED)
        log.info("neuron deregistered", action="neuron_deregistered", neuron_id=neuron_id)
        return pb.DeregisterResponse()

    async def _renewed(
        self, description: NeuronDescription, identity: NeuronIdentity, request_id: str
    ) -> pb.RegisterResponse | None:
        async with self._database.begin_for_neurons() as connection:
            admitted = await _renew(connection, description, identity)
            if admitted is None:
                return None
            await _record(connection, description.neuron_id, admitted, request_id)
            response = await self._response(connection, description, admitted)
        return _logged(response, admitted)

    async def _own_identity(
        self, neuron_id: str, metadata: auth.Metadata | None
    ) -> NeuronIdentity | errors.Refused:
        """Whom the call's neuron token names, or why it does not count.

        Raises:
            errors.Refused: that cannot be told now. To go on by the enrollment token would end a
                token that may be good.
        """
        token = auth.neuron_token(metadata)
        if token is None:
            return errors.credential_missing()
        try:
            identity = await self._tokens.identify(token, to_renew=True)
        except errors.Refused as refused:
            if refused.code is not grpc.StatusCode.UNAUTHENTICATED:
                raise
            return refused
        return identity if identity.neuron_id == neuron_id else errors.not_this_neuron(neuron_id)

    async def _response(
        self, connection: AsyncConnection, description: NeuronDescription, admitted: _Admitted
    ) -> pb.RegisterResponse:
        neuron_id = description.neuron_id
        record = await neurons.get(connection, neuron_id)
        if record is None:
            raise RuntimeError("a locked neuron is gone")
        now = await current_time(connection)
        return pb.RegisterResponse(
            neuron=neuron_to_proto(record),
            token=token_to_proto(self._tokens.issue(neuron_id, admitted.generation, now)),
            created=admitted.created,
        )


def _logged(response: pb.RegisterResponse, admitted: _Admitted) -> pb.RegisterResponse:
    log.info(
        "neuron registered",
        action="neuron_registered",
        neuron_id=response.neuron.neuron_id,
        how=admitted.how,
        enrollment_token_id=admitted.enrollment_token_id,
    )
    return response


async def _record(
    connection: AsyncConnection, neuron_id: str, admitted: _Admitted, request_id: str
) -> None:
    """Puts a registration into the audit log, as the neuron's own doing."""
    after = admitted.after | {"how": admitted.how}
    if admitted.enrollment_token_id:
        after["enrollment_token_id"] = admitted.enrollment_token_id
    actor = f"neuron:{neuron_id}"
    before = admitted.before
    await audit.record(
        connection, "neuron", neuron_id, before, after, request_id=request_id, actor=actor
    )


async def _renew(
    connection: AsyncConnection, description: NeuronDescription, identity: NeuronIdentity
) -> _Admitted | None:
    """By the neuron's own token; None if that was revoked or its neuron deleted."""
    standing = await store.lock_neuron(connection, identity.neuron_id)
    if standing is None or standing.generation > identity.generation:
        return None
    _refuse_deactivated(standing, identity.neuron_id)
    await store.use_generation(connection, identity.neuron_id, identity.generation)
    before, after = await store.update_description(connection, description)
    now = await current_time(connection)
    generation = store.newer_generation(identity.generation, now)
    return _Admitted(generation, "renewed", before, after)


async def _enroll(
    connection: AsyncConnection, description: NeuronDescription, request: pb.RegisterRequest
) -> _Admitted:
    """By an enrollment token, whose row stays locked, so that its count is exact."""
    neuron_id, request_id = description.neuron_id, request.request_id
    token = await _good_token(connection, description, request.enrollment_token)
    token_id = token.enrollment_token_id
    if not token.used_up:
        generation = await store.insert_neuron(connection, description)
        if generation is not None:
            time = store.generation_time(generation)
            await enrollment.count_use(connection, token_id, neuron_id, request_id, time)
            after = store.values_of(description)
            return _Admitted(generation, "created", None, after, True, token_id)
    standing = await store.lock_neuron(connection, neuron_id)
    used = await enrollment.use_time(connection, token_id, neuron_id, request_id)
    if standing is not None and used is not None and used >= standing.generation_time:
        _refuse_deactivated(standing, neuron_id)
        before, after = await store.update_description(connection, description)
        created = used == standing.create_time
        return _Admitted(standing.generation, "repeated", before, after, created, token_id)
    if token.used_up:
        raise _refusal(description, "used up", token)
    if standing is None:
        raise errors.conflict(f"{neuron_id} was deleted at this moment")
    if not token.allow_reenrollment:
        raise errors.neuron_exists(neuron_id)
    _refuse_deactivated(standing, neuron_id)
    generation, before, after = await _reenroll(connection, description)
    time = store.generation_time(generation)
    await enrollment.count_use(connection, token_id, neuron_id, request_id, time)
    return _Admitted(generation, "re-enrolled", before, after, False, token_id)


async def _take_in(
    connection: AsyncConnection,
    description: NeuronDescription,
    request: pb.RegisterRequest,
    mode: EnrollmentMode,
    own: errors.Refused,
) -> _Admitted:
    """Without a good credential; `own` is why there is none. Only a new id, or one that this same
    call has taken in before.
    """
    neuron_id, request_id = description.neuron_id, request.request_id
    pending = mode is EnrollmentMode.APPROVE
    if pending and await applications.count_pending(connection) >= MOST_PENDING:
        log.warning("too many wait for approval", action="enrollment_full", neuron_id=neuron_id)
        raise errors.server_busy(FULL_RETRY_S)
    lifecycle = Lifecycle.PENDING if pending else Lifecycle.ACTIVE
    generation = await store.insert_neuron(connection, description, lifecycle)
    if generation is not None:
        await applications.note(connection, neuron_id, request_id)
        how = "applied" if pending else "joined"
        return _Admitted(generation, how, None, store.values_of(description), True)
    standing = await store.lock_neuron(connection, neuron_id)
    if standing is None:
        raise errors.conflict(f"{neuron_id} was deleted at this moment")
    fresh = standing.generation_time == standing.create_time
    if fresh and await applications.is_repeated(connection, neuron_id, request_id):
        _refuse_deactivated(standing, neuron_id)
        before, after = await store.update_description(connection, description)
        return _Admitted(standing.generation, "repeated", before, after, True)
    if own.reason is ErrorReason.ERROR_REASON_CREDENTIAL_MISSING:
        raise errors.neuron_exists(neuron_id)
    raise own


async def _reenroll(
    connection: AsyncConnection, description: NeuronDescription
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The same neuron in new hands: older tokens die, and with them the live session. Gives the new
    generation, and what changed.
    """
    neuron_id = description.neuron_id
    before, after = await store.update_description(connection, description)
    generation = await store.raise_generation(connection, neuron_id)
    ended = await store.end_session(connection, neuron_id, Presence.SUSPECT, "re-enrolled")
    await _tell(connection, neuron_id, ended, SessionEnd.REVOKED)
    return generation, before, after


async def _good_token(
    connection: AsyncConnection, description: NeuronDescription, secret: str
) -> EnrollmentToken:
    token = await enrollment.lock_by_secret(connection, secret)
    reason = (
        "unknown"
        if token is None
        else token.refuses(
            now=await current_time(connection),
            neuron_id=description.neuron_id,
            neuron_type=description.type,
            labels=description.labels,
        )
    )
    if token is None or reason is not None:
        raise _refusal(description, reason, token)
    return token


def _refusal(
    description: NeuronDescription, reason: str | None, token: EnrollmentToken | None
) -> errors.Refused:
    """The same answer for every reason, which only the log knows."""
    log.warning(
        "enrollment refused",
        action="enrollment_refused",
        neuron_id=description.neuron_id,
        reason=reason,
        enrollment_token_id=token.enrollment_token_id if token else None,
    )
    return errors.enrollment_refused()


def _refuse_deactivated(standing: store.Standing, neuron_id: str) -> None:
    if standing.lifecycle is Lifecycle.DEACTIVATED:
        raise errors.neuron_deactivated(neuron_id)


async def _tell(
    connection: AsyncConnection, neuron_id: str, ended: store.EndedSession | None, end: SessionEnd
) -> None:
    """Has the server that holds an ended session close its stream."""
    if ended is not None:
        await hint_end(connection, ended.server_id, neuron_id, end, below_epoch=ended.next_epoch)
