"""The neuron's credential: gets one at each start, keeps it in STATE_DIR/token, renews it.

The token file (0600) is what proves at the next start that this is the same neuron. The first use
of a token ends the one before; so one that cannot be kept is not used while the one that is kept
is good: a process that dies on a full disk must not take the neuron's identity along.

STATE_DIR/request holds the request_id of a Register that may enroll, until its token is kept.
Should the answer be lost, or this process die, the next call is known to be the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
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
KEEP_AGAIN_S = 60.0
"""When another token is asked for after one that could not be kept."""
_UNUSABLE = frozenset(
    {"CREDENTIAL_EXPIRED", "CREDENTIAL_INVALID", "NEURON_NOT_FOUND", "NOT_THIS_NEURON"}
)

_log = get_logger(__name__)


class SecretFile:
    """One line in STATE_DIR that only the neuron may read (0600)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def read(self) -> str:
        """What it holds; "" if there is nothing."""
        try:
            secret = self._path.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return ""
        except (OSError, ValueError) as error:
            _log.warning(
                "a file in STATE_DIR cannot be read",
                action="token.unreadable",
                file=str(self._path),
                error=str(error),
            )
            return ""
        return secret if secret.isprintable() else ""

    def write(self, secret: str) -> None:
        """Keep it; in one step, so that a crash leaves the old one or the new one, and one of the
        machine the new one, once this has returned.

        Raises:
            OSError: the old one is there.
        """
        fresh = self._path.with_suffix(".new")
        with self._lock:  # a thread that was given up may still be at it
            with contextlib.suppress(FileNotFoundError):
                fresh.unlink()
            handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(secret + "\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._path)
            with contextlib.suppress(OSError):  # not every file system can do that for a folder
                _sync(self._path.parent)

    def remove(self) -> None:
        """Forget it."""
        with self._lock, contextlib.suppress(OSError):
            self._path.unlink()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Registration:
    """Registers one neuron and holds its token. Belongs to the control loop."""

    def __init__(
        self,
        description: NeuronDescription,
        enrollment_token: str,
        *,
        token: SecretFile,
        request_id: SecretFile,
    ) -> None:
        self._description = description
        self._enrollment_token = enrollment_token
        self._token_file = token
        self._request_file = request_id
        self._token = ""
        self._unkept = ""
        """A newer token than the one in the file, which could not be kept; "" if there is none."""
        self._refresh_at = 0.0
        self.pending = ""
        """Why the federation's answer to Connect may take hours, for people; "" if it does not."""
        self._request_id = ""

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
        own = self._unkept or await offload(self._token_file.read)
        if not self._request_id:
            may_enroll = bool(self._enrollment_token or not own)
            self._request_id = await offload(lambda: self._next_request_id(noted=may_enroll))
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
            own = ""
            response = await self._register(stub, own)
        if await self._keep(response.token, before=own):
            await offload(self._request_file.remove)
        self._request_id = ""
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
        (`renewed`); ends when it cannot be renewed.

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
            await self.renewed(response.token)
            backoff = Backoff(first_s=5.0, most_s=300.0)

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

    async def renewed(self, token: pb.NeuronToken) -> None:
        """The federation has sent a new token in the place of the one before."""
        if await self._keep(token, before=self._token):
            _log.info("token renewed", action="token.renewed")

    async def _keep(self, token: pb.NeuronToken, *, before: str) -> bool:
        """Take a new token in the place of the one before, if it can be kept. If not, the one
        before is used on, for as long as it is good; "" if there is none. Returns whether it is
        kept.
        """
        # refresh_time is the middle of the token's life, so the way from there to its end is the
        # way from now to there: this needs no clock that agrees with the federation's. A little
        # later, because on a stream the federation itself sends a new one at that time.
        half_life = token.expire_time.seconds - token.refresh_time.seconds
        jitter = random.uniform(1.1, 1.2)  # noqa: S311 - not a secret
        refresh_s = max(half_life, MIN_REFRESH_S) * jitter
        # Written first: once it has been used, the one before is no longer good.
        kept = await offload(lambda: self._write(token.token))
        if kept:
            self._token, self._unkept = token.token, ""
        else:
            self._token, self._unkept = before or token.token, token.token
            refresh_s = min(refresh_s, KEEP_AGAIN_S * jitter)
        self._refresh_at = asyncio.get_running_loop().time() + refresh_s
        return kept

    def _write(self, token: str) -> bool:
        try:
            self._token_file.write(token)
        except OSError as error:
            _log.warning(
                "a new token cannot be kept in STATE_DIR: it will be tried again; a process that "
                "starts meanwhile may need an enrollment token that allows re-enrollment",
                action="token.unwritable",
                error=str(error),
            )
            return False
        return True

    def _next_request_id(self, *, noted: bool) -> str:
        """That of a Register whose token was not kept, or a new one; `noted` in STATE_DIR."""
        fresh = uuid.uuid4().hex
        if not noted:
            return fresh
        before = self._request_file.read()
        if len(before) == len(fresh) and before.isalnum():
            return before
        try:
            self._request_file.write(fresh)
        except OSError as error:
            _log.warning(
                "it cannot be noted in STATE_DIR that this neuron enrolls: if the answer is lost, "
                "it will need an enrollment token that allows re-enrollment",
                action="request.unwritable",
                error=str(error),
            )
        return fresh


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
