"""AccessService: who may take part, and who did what; more of it is in the modules beside."""

from __future__ import annotations

import asyncio
import hashlib
import uuid

import grpc.aio
import structlog

from federation.v1 import access_service_pb2 as pb
from federation.v1 import access_service_pb2_grpc as pb_grpc
from federation_server.domain.access import EnrollmentToken
from federation_server.rpc import approval, audit, auth, errors, limits
from federation_server.rpc.api_keys import ApiKeys
from federation_server.rpc.convert import optional_span, to_timestamp
from federation_server.rpc.neuron_changes import SessionEnding
from federation_server.rpc.signing_keys import SigningKeys
from federation_server.rpc.tokens import Tokens
from federation_server.store import audit as audit_log
from federation_server.store import enrollment
from federation_server.store.database import Database, current_time

log = structlog.get_logger(__name__)


class AccessServicer(ApiKeys, SigningKeys, pb_grpc.AccessServiceServicer):
    """Makes, lists and revokes enrollment tokens, and shows the audit log; approving has a module
    of its own.
    """

    def __init__(self, database: Database, ending: SessionEnding, tokens: Tokens) -> None:
        """Serves from `database`; `tokens` follow what becomes of the signing keys."""
        self._database = database
        self._ending = ending
        self._tokens = tokens

    async def CreateEnrollmentToken(
        self,
        request: pb.CreateEnrollmentTokenRequest,
        context: grpc.aio.ServicerContext[
            pb.CreateEnrollmentTokenRequest, pb.CreateEnrollmentTokenResponse
        ],
    ) -> pb.CreateEnrollmentTokenResponse:
        """See the contract."""
        limits.check(request)
        admin = auth.current_admin()
        new = enrollment.NewEnrollmentToken(
            creator=admin.name,
            description=request.description,
            ttl=optional_span(request, "ttl") or enrollment.DEFAULT_TTL,
            max_uses=request.max_uses,
            neuron_type=request.neuron_type,
            neuron_id_pattern=request.neuron_id_pattern,
            labels=dict(request.labels),
            allow_reenrollment=request.allow_reenrollment,
            request_id=request.request_id or None,
            request_hash=hashlib.sha256(request.SerializeToString(deterministic=True)).digest(),
        )
        async with self._database.begin() as connection:
            created = await enrollment.create(connection, new)
            if created.secret:
                await audit.record(
                    connection,
                    "enrollment_token",
                    created.token.enrollment_token_id,
                    None,
                    created.token.audited,
                    request_id=request.request_id,
                )
        if created.request_hash != new.request_hash:
            raise errors.request_id_reused(request.request_id)
        if created.secret:
            log.info(
                "enrollment token created",
                action="enrollment_token_created",
                enrollment_token_id=created.token.enrollment_token_id,
                creator=admin.name,
            )
        return pb.CreateEnrollmentTokenResponse(
            enrollment_token=_to_message(created.token), secret=created.secret
        )

    async def ListEnrollmentTokens(
        self,
        request: pb.ListEnrollmentTokensRequest,
        context: grpc.aio.ServicerContext[
            pb.ListEnrollmentTokensRequest, pb.ListEnrollmentTokensResponse
        ],
    ) -> pb.ListEnrollmentTokensResponse:
        """See the contract."""
        limits.check(request)
        async with self._database.begin() as connection:
            tokens, next_page_token = await enrollment.list_tokens(
                connection, page_size=request.page_size, page_token=request.page_token
            )
        return pb.ListEnrollmentTokensResponse(
            enrollment_tokens=[_to_message(token) for token in tokens],
            next_page_token=next_page_token,
        )

    async def RevokeEnrollmentToken(
        self,
        request: pb.RevokeEnrollmentTokenRequest,
        context: grpc.aio.ServicerContext[
            pb.RevokeEnrollmentTokenRequest, pb.RevokeEnrollmentTokenResponse
        ],
    ) -> pb.RevokeEnrollmentTokenResponse:
        """See the contract."""
        limits.check(request)
        admin = auth.current_admin()
        token = None
        if _is_id(request.enrollment_token_id):
            async with self._database.begin() as connection:
                token = await enrollment.revoke(connection, request.enrollment_token_id)
                if token is not None and token.revoke_time == await current_time(connection):
                    await audit.record(
                        connection,
                        "enrollment_token",
                        token.enrollment_token_id,
                        {"revoke_time": None},
                        {"revoke_time": token.revoke_time},
                    )
        if token is None:
            raise errors.enrollment_token_not_found(request.enrollment_token_id)
        log.info(
            "enrollment token revoked",
            action="enrollment_token_revoked",
            enrollment_token_id=token.enrollment_token_id,
            admin=admin.name,
        )
        return pb.RevokeEnrollmentTokenResponse(enrollment_token=_to_message(token))

    async def ApproveNeuron(
        self,
        request: pb.ApproveNeuronRequest,
        context: grpc.aio.ServicerContext[pb.ApproveNeuronRequest, pb.ApproveNeuronResponse],
    ) -> pb.ApproveNeuronResponse:
        """See the contract."""
        limits.check(request)
        return await approval.approve(self._database, request)

    async def RejectNeuron(
        self,
        request: pb.RejectNeuronRequest,
        context: grpc.aio.ServicerContext[pb.RejectNeuronRequest, pb.RejectNeuronResponse],
    ) -> pb.RejectNeuronResponse:
        """See the contract."""
        limits.check(request)
        return await approval.reject(self._database, request)

    async def RevokeNeuronTokens(
        self,
        request: pb.RevokeNeuronTokensRequest,
        context: grpc.aio.ServicerContext[
            pb.RevokeNeuronTokensRequest, pb.RevokeNeuronTokensResponse
        ],
    ) -> pb.RevokeNeuronTokensResponse:
        """See the contract."""
        limits.check(request)
        return await approval.revoke_tokens(self._database, self._ending, request)

    async def ListAuditEntries(
        self,
        request: pb.ListAuditEntriesRequest,
        context: grpc.aio.ServicerContext[pb.ListAuditEntriesRequest, pb.ListAuditEntriesResponse],
    ) -> pb.ListAuditEntriesResponse:
        """See the contract."""
        limits.check(request)
        order_by = limits.order(request.order_by, audit_log.ORDERS)
        async with self._database.begin() as connection:
            entries, next_page_token = await audit_log.list_entries(
                connection,
                filter_text=request.filter,
                order_by=order_by,
                page_size=request.page_size,
                page_token=request.page_token,
            )
        answer = pb.ListAuditEntriesResponse(next_page_token=next_page_token)
        for stored in entries:
            answer.entries.append(audit.to_message(stored))
            # What neurons have put into a page may take seconds, which nobody else is to wait for.
            await asyncio.sleep(0)
        return answer


def _is_id(text: str) -> bool:
    """Whether it has the form of an id; one that has not is nobody's."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _to_message(token: EnrollmentToken) -> pb.EnrollmentToken:
    return pb.EnrollmentToken(
        enrollment_token_id=token.enrollment_token_id,
        description=token.description,
        creator=token.creator,
        create_time=to_timestamp(token.create_time),
        expire_time=to_timestamp(token.expire_time),
        revoke_time=to_timestamp(token.revoke_time),
        max_uses=token.max_uses,
        uses=token.uses,
        neuron_type=token.neuron_type,
        neuron_id_pattern=token.neuron_id_pattern,
        labels=dict(token.labels),
        allow_reenrollment=token.allow_reenrollment,
    )
