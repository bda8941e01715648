"""The neuron's credential: gets one at each start, keeps it in STATE_DIR/token, renews it.

The token file (0600) is what proves at the next start that this is the same neuron.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio

from federation.v1 import neuron_pb2
from federation.v1 import session_service_pb2 as pb
from neuron_sdk.backoff import Backoff
from neuron_sdk.channel import RpcFailure, read_failure
from neuron_sdk.convert import description_message
from neuron_sdk.description import NeuronDescription
from neuron_sdk.logs import get_logger
from neuron_sdk.offload import offload

if TYPE_CHECKING:  # a name of the stubs' types only
    from federation.v1.session_service_pb2_grpc import SessionServiceAsyncStub

RPC_TIMEOUT_S = 20.0
MIN_REFRESH_S = 1.0
_UNUSABLE = frozenset(
    {"CREDENTIAL_EXPIRED", "CREDENTIAL_INVALID", "NEURON_NOT_FOUND", "NOT_THIS_NEURON"}
)

_log = get_logger(__name__)


class TokenFile:
    """The stored token of one neuron."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> str:
        """The token; "" if there is none."""
        try:
            token = self._path.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return ""
        except (OSError, ValueError) as error:
            _log.warning("the token cannot be read", action="token.unreadable", error=str(error))
            return ""
        return token if token.isprintable() else ""

    def write(self, token: str) -> None:
        """Keep the token; in one step, so that a crash leaves the old one or the new one."""
        fresh = self._path.with_suffix(".new")
        try:
            with contextlib.suppress(FileNotFoundError):
                fresh.unlink()
            handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(token + "\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._path)
        except OSError as error:
            _log.warning(
                "the token cannot be kept: the next start will need an enrollment token",
                action="token.unwritable",
                file=str(self._path),
                error=str(error),
            )


class Registration:
    """Registers one neuron and holds its token. Belongs to the control loop."""

    def __init__(
        self, description: NeuronDescription, enrollment_token: str, tokens: TokenFile
    ) -> None:
        self._description = description
        self._enrollment_token = enrollment_token
        self._tokens = tokens
        self._token = ""
        self._refresh_at = 0.0
        self.pending = ""
        """Why the federation's answer to Connect may take hours, for people; "" if it does not."""
        self._request_id = uuid.uuid4().hex

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The credential for every call but Register."""
        return _bearer(self._token)

    @property
    def has_token(self) -> bool:
        """Whether this process has registered."""
        return bool(self._token)

    def forget(self) -> None:
        """The token is not taken any more: register again."""
        self._token = ""

    async def ensure(self, stub: SessionServiceAsyncStub) -> None:
        """Register, unless this process has a token already.

        Raises:
            RpcFailure: the federation refused, or was not reached.
        """
        if self._token:
            return
        own = await offload(self._tokens.read)
        try:
            response = await self._register(stub, own)
        except RpcFailure as failure:
            if not own or not self._enrollment_token or failure.reason not in _UNUSABLE:
                raise
            _log.warning(
                "the stored token is not taken; enrolling again",
                action="registration.token_refused",
                reason=failure.reason,
            )
            response = await self._register(stub, "")
        self._request_id = uuid.uuid4().hex
        await self.keep(response.token)
        self.pending = _pending(response)
        if self.pending:
            _log.warning(self.pending, action="registration.pending")
        _log.info(
            "registered",
            action="registration.done",
            neuron_id=self._description.neuron_id,
            new=response.created,
        )

    async def keep_fresh(self, stub: SessionServiceAsyncStub) -> None:
        """Renew the token each time its middle has passed and the federation has sent no new one
        (`keep`); ends when it cannot be renewed.

        Raises:
            RpcFailure: the token is not taken any more.
        """
        loop = asyncio.get_running_loop()
        backoff = Backoff(first_s=5.0, most_s=300.0)
        while True:
            left = self._refresh_at - loop.time()
            if left > 0.0:
                await asyncio.sleep(left)
                continue  # meanwhile the federation may have sent a new one
            try:
                response = await stub.RefreshToken(
                    pb.RefreshTokenRequest(), metadata=self.metadata, timeout=RPC_TIMEOUT_S
                )
            except grpc.aio.AioRpcError as error:
                failure = read_failure(error)
                if failure.code in ("UNAUTHENTICATED", "FAILED_PRECONDITION"):
                    raise failure from None
                _log.warning("token not renewed", action="token.late", error=str(failure))
                await asyncio.sleep(backoff.next_s(loop.time(), at_least=failure.retry_after))
                continue
            await self.keep(response.token)
            backoff = Backoff(first_s=5.0, most_s=300.0)
            _log.info("token renewed", action="token.renewed")

    async def _register(self, stub: SessionServiceAsyncStub, own: str) -> pb.RegisterResponse:
        request = pb.RegisterRequest(
            description=description_message(self._description),
            enrollment_token=self._enrollment_token,
            request_id=self._request_id,
        )
        try:
            return await stub.Register(
                request, metadata=_bearer(own) if own else None, timeout=RPC_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise read_failure(error) from None

    async def keep(self, token: pb.NeuronToken) -> None:
        """Take a new token in the place of the one before."""
        # Written first: once it has been used, the one before is no longer good.
        await offload(lambda: self._tokens.write(token.token))
        self._token = token.token
        # refresh_time is the middle of the token's life, so the way from there to its end is the
        # way from now to there: this needs no clock that agrees with the federation's. A little
        # later, because on a stream the federation itself sends a new one at that time.
        half_life = token.expire_time.seconds - token.refresh_time.seconds
        jitter = random.uniform(1.1, 1.2)  # noqa: S311 - not a secret
        self._refresh_at = (
            asyncio.get_running_loop().time() + max(half_life, MIN_REFRESH_S) * jitter
        )


def _pending(response: pb.RegisterResponse) -> str:
    neuron = response.neuron
    if neuron.lifecycle != neuron_pb2.LIFECYCLE_PENDING:
        return ""
    return (
        "this neuron waits for an admin's approval: "
        f"federation neurons approve {neuron.neuron_id} --code {neuron.approval_code}"
    )


def _bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)
