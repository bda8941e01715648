"""AccessService: the keys that sign neurons' tokens."""

from __future__ import annotations

import grpc.aio
import structlog

from federation.v1 import access_service_pb2 as pb
from federation.v1 import access_service_pb2_grpc as pb_grpc
from federation_server.rpc import auth, limits
from federation_server.rpc.convert import optional_span, to_timestamp
from federation_server.rpc.tokens import Tokens
from federation_server.store import signing_keys as store
from federation_server.store.database import Database

log = structlog.get_logger(__name__)


class SigningKeys(pb_grpc.AccessServiceServicer):
    """Lists and rotates signing keys."""

    _database: Database
    _tokens: Tokens

    async def ListSigningKeys(
        self,
        request: pb.ListSigningKeysRequest,
        context: grpc.aio.ServicerContext[pb.ListSigningKeysRequest, pb.ListSigningKeysResponse],
    ) -> pb.ListSigningKeysResponse:
        """See the contract."""
        limits.check(request)
        async with self._database.begin() as connection:
            keys, next_page_token = await store.list_keys(
                connection, page_size=request.page_size, page_token=request.page_token
            )
        return pb.ListSigningKeysResponse(
            signing_keys=[_to_message(key) for key in keys], next_page_token=next_page_token
        )

    async def RotateSigningKey(
        self,
        request: pb.RotateSigningKeyRequest,
        context: grpc.aio.ServicerContext[pb.RotateSigningKeyRequest, pb.RotateSigningKeyResponse],
    ) -> pb.RotateSigningKeyResponse:
        """See the contract."""
        limits.check(request)
        overlap = optional_span(request, "overlap")
        if overlap is None:
            overlap = self._tokens.default_overlap
        async with self._database.begin() as connection:
            key = await store.rotate(connection, overlap)
        log.info(
            "signing key rotated",
            action="signing_key_rotated",
            kid=key.kid,
            overlap_s=overlap.total_seconds(),
            admin=auth.current_admin().name,
        )
        await self._tokens.look()  # so that this server at least signs with it from now on
        return pb.RotateSigningKeyResponse(signing_key=_to_message(key))


def _to_message(key: store.ListedKey) -> pb.SigningKey:
    return pb.SigningKey(
        kid=key.kid,
        create_time=to_timestamp(key.create_time),
        retire_time=to_timestamp(key.retire_time),
    )
