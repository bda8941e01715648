"""AccessService: the API keys."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import grpc.aio
import structlog

from federation.v1 import access_service_pb2 as pb
from federation.v1 import access_service_pb2_grpc as pb_grpc
from federation_server.domain.access import ApiKey, Role
from federation_server.rpc import auth, errors, limits
from federation_server.rpc.convert import from_timestamp, optional_span, to_timestamp
from federation_server.store import api_keys as store
from federation_server.store.database import Database

log = structlog.get_logger(__name__)


class ApiKeys(pb_grpc.AccessServiceServicer):
    """Makes, lists, rotates, expires and revokes API keys."""

    _database: Database

    async def CreateApiKey(
        self,
        request: pb.CreateApiKeyRequest,
        context: grpc.aio.ServicerContext[pb.CreateApiKeyRequest, pb.CreateApiKeyResponse],
    ) -> pb.CreateApiKeyResponse:
        """See the contract."""
        limits.check(request)
        admin = auth.current_admin()
        new = store.NewApiKey(
            name=request.name,
            role=Role(request.role),
            creator=admin.name,
            description=request.description,
            ttl=optional_span(request, "ttl"),
            request_id=request.request_id or None,
            request_hash=hashlib.sha256(request.SerializeToString(deterministic=True)).digest(),
        )
        with _refusals(request.name):
            async with self._database.begin() as connection:
                created = await store.create(connection, new)
        if created.request_hash != new.request_hash:
            raise errors.request_id_reused(request.request_id)
        if created.secret:
            log.info(
                "API key created",
                action="api_key_created",
                name=created.key.name,
                role=created.key.role.name,
                creator=admin.name,
            )
        return pb.CreateApiKeyResponse(api_key=_to_message(created.key), secret=created.secret)

    async def ListApiKeys(
        self,
        request: pb.ListApiKeysRequest,
        context: grpc.aio.ServicerContext[pb.ListApiKeysRequest, pb.ListApiKeysResponse],
    ) -> pb.ListApiKeysResponse:
        """See the contract."""
        limits.check(request)
        async with self._database.begin() as connection:
            keys, next_page_token = await store.list_keys(
                connection, page_size=request.page_size, page_token=request.page_token
            )
        return pb.ListApiKeysResponse(
            api_keys=[_to_message(key) for key in keys], next_page_token=next_page_token
        )

    async def RotateApiKey(
        self,
        request: pb.RotateApiKeyRequest,
        context: grpc.aio.ServicerContext[pb.RotateApiKeyRequest, pb.RotateApiKeyResponse],
    ) -> pb.RotateApiKeyResponse:
        """See the contract."""
        limits.check(request)
        overlap = optional_span(request, "overlap")
        if overlap is None:
            overlap = store.DEFAULT_OVERLAP
        with _refusals(request.name):
            async with self._database.begin() as connection:
                key, secret = await store.rotate(connection, request.name, overlap)
        log.info(
            "API key rotated",
            action="api_key_rotated",
            name=key.name,
            overlap_s=overlap.total_seconds(),
            admin=auth.current_admin().name,
        )
        return pb.RotateApiKeyResponse(api_key=_to_message(key), secret=secret)

    async def ExpireApiKey(
        self,
        request: pb.ExpireApiKeyRequest,
        context: grpc.aio.ServicerContext[pb.ExpireApiKeyRequest, pb.ExpireApiKeyResponse],
    ) -> pb.ExpireApiKeyResponse:
        """See the contract."""
        limits.check(request)
        expire_time = from_timestamp(request.expire_time)
        with _refusals(request.name):
            async with self._database.begin() as connection:
                key = await store.expire(connection, request.name, expire_time)
        log.info(
            "API key will expire",
            action="api_key_expires",
            name=key.name,
            expire_time=expire_time.isoformat(),
            admin=auth.current_admin().name,
        )
        return pb.ExpireApiKeyResponse(api_key=_to_message(key))

    async def RevokeApiKey(
        self,
        request: pb.RevokeApiKeyRequest,
        context: grpc.aio.ServicerContext[pb.RevokeApiKeyRequest, pb.RevokeApiKeyResponse],
    ) -> pb.RevokeApiKeyResponse:
        """See the contract."""
        limits.check(request)
        with _refusals(request.name):
            async with self._database.begin() as connection:
                key = await store.revoke(connection, request.name)
        log.info(
            "API key revoked",
            action="api_key_revoked",
            name=key.name,
            admin=auth.current_admin().name,
        )
        return pb.RevokeApiKeyResponse(api_key=_to_message(key))


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """What the store refuses, in the contract's words."""
    try:
        yield
    except store.NameTaken:
        raise errors.api_key_name_taken(name) from None
    except store.KeyNotFound as error:
        raise errors.api_key_not_found(name, revoked=error.revoked) from None
    except store.LastAdminKey:
        raise errors.last_admin_key(name) from None


def _to_message(key: ApiKey) -> pb.ApiKey:
    return pb.ApiKey(
        name=key.name,
        role=pb.Role.ValueType(key.role),
        description=key.description,
        creator=key.creator,
        create_time=to_timestamp(key.create_time),
        expire_time=to_timestamp(key.expire_time),
        revoke_time=to_timestamp(key.revoke_time),
        last_use_time=to_timestamp(key.last_use_time),
        old_secret_expire_time=to_timestamp(key.old_secret_expire_time),
    )
