"""Who calls, and whether they may: the one gate that every call passes.

A credential travels in the metadata: `authorization: Bearer …` holds a neuron's token (a JWT) or
an API key, `x-admin-key: …` an API key. A handler learns by `current_neuron` or `current_admin`
whom it serves: grpc.aio runs interceptors and handler of a call in one task, so a context variable
reaches from here to there. `methods.METHODS` says for whom each RPC is.

Each neuron and each API key may call so often (`live/rates.py`). Connect also needs the server to
take it on (`live/admission.py`), as Register does, which asks itself. Who is told to come later has
cost no question to the database, and who shows no good token takes nobody's turn.

An address that shows one bad credential after the other is told to wait. That is told in place of
what is wrong with a bad credential, so a good one is let in always, from wherever it comes.

A stream that an admin has opened ends soon after its key does (`key_watch.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeAlias, TypeVar

import grpc.aio
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from federation.v1.errors_pb2 import ErrorReason
from federation_server.domain.access import (
    Admin,
    Caller,
    NeuronIdentity,
    Principal,
    Role,
    is_jwt,
    secret_hash,
)
from federation_server.domain.address import source_of
from federation_server.domain.neuron import Lifecycle
from federation_server.live.admission import Admission, Entry
from federation_server.live.key_uses import KeyUses
from federation_server.live.rates import Limit, Rates
from federation_server.rpc import errors
from federation_server.rpc.error_mapping import Nobody, Witness, refusal, refusing
from federation_server.rpc.key_watch import KeyWatch
from federation_server.rpc.methods import CONNECT, DEREGISTER, METHODS
from federation_server.rpc.tokens import Tokens
from federation_server.store.access import FoundKey, find_api_keys
from federation_server.store.database import Database
from federation_server.store.registration import Standing, find_standing, use_generation

log = structlog.get_logger(__name__)

Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]
T = TypeVar("T")

API_KEY_CACHE_S = 5.0
"""How long a key that was good is taken for good without a look into the database."""

API_KEY_CACHE_SIZE = 1024

FIRST_MESSAGE_S = 1.0
"""How long a stream that is refused may take for its first message."""

LOOKUP_TIMEOUT_S = 3.0
"""How long the database may take to say who calls."""

KEYS_AT_ONCE = 500
"""How many API keys one question is about."""

_principal: ContextVar[Principal | None] = ContextVar("principal", default=None)
_api_key: ContextVar[str] = ContextVar("api_key")
"""The secret that an admin has shown."""


def current_admin() -> Admin:
    """The admin that this call serves."""
    match _principal.get():
        case Admin() as admin:
            return admin
        case _:
            raise RuntimeError("this RPC is not one for admins")


def current_neuron() -> NeuronIdentity:
    """The neuron that this call serves."""
    match _principal.get():
        case NeuronIdentity() as neuron:
            return neuron
        case _:
            raise RuntimeError("this RPC is not one for neurons")


def current_principal() -> Principal | None:
    """Whom the call's credential names, also if the call is refused; None: nobody."""
    return _principal.get()


def neuron_token(metadata: Metadata | None) -> str | None:
    """The neuron token that a call carries, good or not; None if it carries none."""
    credential = _credential(metadata)
    return credential if credential is not None and is_jwt(credential) else None


def _credential(metadata: Metadata | None) -> str | None:
    """The secret that a call carries; empty for an `authorization` that is no Bearer."""
    found: dict[str, str] = {}
    for name, value in metadata or ():
        found.setdefault(name, value if isinstance(value, str) else "")
    scheme, _, bearer = found.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return bearer.strip()
    if "x-admin-key" in found:
        return found["x-admin-key"].strip()
    return "" if "authorization" in found else None


class Authentication(grpc.aio.ServerInterceptor):
    """Lets a call through to its handler if its caller may make it."""

    def __init__(
        self,
        database: Database,
        tokens: Tokens,
        admission: Admission,
        rates: Rates,
        key_uses: KeyUses,
        *,
        witness: Witness | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Asks `database` who a credential is, notes the use of API keys, and tells the witness who
        was refused; `clock` is in seconds.
        """
        self._database = database
        self._witness = witness or Nobody()
        self._admission = admission
        self._rates = rates
        self._tokens = tokens
        self._clock = clock
        self._keys = _KeyCache(clock)
        self._key_uses = key_uses
        self._key_watch = KeyWatch(self._still_good)
        self._lookups: set[asyncio.Task[Any]] = set()
        self._asked: dict[bytes, asyncio.Future[FoundKey | None]] = {}
        self._asking: asyncio.Task[None] | None = None

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Passes the call on, or puts a handler in the way that refuses it."""
        handler = await continuation(handler_call_details)
        if handler is None:  # no such RPC: grpc answers UNIMPLEMENTED
            return None
        method = handler_call_details.method
        heard_s = FIRST_MESSAGE_S if method == CONNECT else 0.0
        try:
            principal = await self._admit(method, handler_call_details.invocation_metadata)
            if isinstance(principal, Admin) and handler.response_streaming:
                self._hold_stream(principal)
                return self._key_watch.over(handler, method)
        except Exception as error:  # noqa: BLE001 - mapped and logged as a handler's would be
            return refusing(partial(self._told, method, error), heard_s=heard_s)
        return handler

    def _told(
        self,
        method: str,
        error: Exception,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> errors.Refused:
        """What a call is told that may not be made. Where it comes from is known only now that it
        is served: one bad credential after the other is told to wait, and fills no log.
        """
        bad = ErrorReason.ERROR_REASON_CREDENTIAL_INVALID
        if not (isinstance(error, errors.Refused) and error.reason == bad):
            refused = refusal(error, method)
            self._witness.refused(method, context, refused)
            return refused
        self._witness.refused(method, context, error)
        wait_s = self._rates.take(Limit.FAILED_CREDENTIAL_RATE, source_of(context.peer()))
        if wait_s:
            error = errors.rate_limited(Limit.FAILED_CREDENTIAL_RATE, wait_s)
        return refusal(error, method)

    def _hold_stream(self, admin: Admin) -> None:
        """Counts a stream of that admin's for as long as its call lasts."""
        if wait_s := self._rates.open_stream(admin.name):
            raise errors.rate_limited(Limit.ADMIN_STREAMS, wait_s)
        call = asyncio.current_task()
        assert call is not None
        call.add_done_callback(lambda _: self._rates.close_stream(admin.name))

    async def _admit(self, method: str, metadata: Metadata | None) -> Principal | None:
        """Who makes a call that may be made; the principal is named in any case."""
        _principal.set(None)
        caller = METHODS.get(method)
        if caller is Caller.ANYONE:
            return None
        if caller is None:
            log.error("RPC without a role", action="rpc_unlisted", method=method)
            raise errors.role_too_low("nobody")
        credential = _credential(metadata)
        if credential is None:
            raise errors.credential_missing()
        if not (credential and credential.isascii()):
            raise errors.credential_invalid()
        if is_jwt(credential):
            return await self._admit_neuron(method, caller, credential)
        admin = (await self._find_key(credential)).admin
        if wait_s := self._rates.take(Limit.ADMIN_CALL_RATE, admin.name):
            raise errors.rate_limited(Limit.ADMIN_CALL_RATE, wait_s)
        if caller is Caller.NEURON or admin.role < Role[caller]:
            raise errors.role_too_low(caller)
        _api_key.set(credential)
        return admin

    async def _admit_neuron(self, method: str, caller: Caller, token: str) -> NeuronIdentity:
        identity = await self._tokens.identify(token)
        _principal.set(identity)
        if wait_s := self._rates.take_neuron(identity):
            raise errors.rate_limited(Limit.NEURON_CALL_RATE, wait_s)
        if caller is not Caller.NEURON:
            raise errors.role_too_low(caller)
        if method == CONNECT:
            self._take_on()  # opening the session asks for its standing, and counts the call
        else:
            await self._check_standing(identity, method)
            self._rates.count_neuron(identity)
        return identity

    def _take_on(self) -> None:
        if wait_s := self._admission.admit(Entry.CONNECT):
            raise errors.server_busy(wait_s)

    async def _check_standing(self, identity: NeuronIdentity, method: str) -> None:
        neuron_id = identity.neuron_id

        async def use(connection: AsyncConnection) -> Standing | None:
            standing = await find_standing(connection, neuron_id)
            if standing is not None and standing.generation < identity.generation:
                await use_generation(connection, neuron_id, identity.generation)
            return standing

        standing = await self._ask(self._database.begin_for_neurons, use)
        if standing is None:
            raise errors.credential_invalid()
        deactivated = standing.lifecycle is Lifecycle.DEACTIVATED
        if deactivated and method == DEREGISTER:
            return  # its first call has revoked the token; to repeat it is harmless
        if standing.generation > identity.generation:
            raise errors.credential_invalid()
        if deactivated:
            raise errors.neuron_deactivated(neuron_id)
        if standing.lifecycle is Lifecycle.PENDING:
            raise errors.neuron_pending(neuron_id)

    async def _still_good(self) -> float:
        """For how many seconds more the key that this call has shown is taken for good.

        Raises:
            errors.Refused: it is good no more.
        """
        secret = _api_key.get()
        await self._find_key(secret)
        return self._keys.until(secret) - self._clock()

    async def _find_key(self, secret: str) -> FoundKey:
        found = self._keys.get(secret)
        if found is None:
            found = await self._look_up(secret)
            if found is None:
                raise errors.credential_invalid()
        _principal.set(found.admin)
        if found.expired:
            raise errors.credential_expired()
        self._key_uses.note(found.admin.name)
        return found

    async def _look_up(self, secret: str) -> FoundKey | None:
        """The key in the store. One question is under way at a time, about all keys that wait: so
        however many unknown ones come, they cost the database little and a good one no long wait.
        """
        digest = secret_hash(secret)
        answer = self._asked.get(digest)
        if answer is None:
            answer = self._asked[digest] = asyncio.Future()
            answer.add_done_callback(_fetched)
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask_for_keys(), name="API keys")
        return await asyncio.shield(answer)

    async def _ask_for_keys(self) -> None:
        """Answers all who wait for a key."""
        asked: dict[bytes, asyncio.Future[FoundKey | None]] = {}
        try:
            while self._asked:
                asked = {digest: self._asked[digest] for digest in [*self._asked][:KEYS_AT_ONCE]}
                for digest in asked:  # who comes from now on asks anew
                    del self._asked[digest]
                # What is asked now may change before it is heard.
                until = self._clock() + API_KEY_CACHE_S
                found = await self._ask(
                    self._database.begin, partial(find_api_keys, secret_hashes=[*asked])
                )
                for digest, answer in asked.items():
                    if digest in found:
                        self._keys.put(digest, found[digest], until)
                    answer.set_result(found.get(digest))
        except Exception as error:  # noqa: BLE001 - whoever waits fails with it
            for answer in (*asked.values(), *self._asked.values()):
                if not answer.done():
                    answer.set_exception(error)
            self._asked.clear()
        finally:
            self._asking = None

    async def _ask(
        self,
        begin: Callable[[], AbstractAsyncContextManager[AsyncConnection]],
        question: Callable[[AsyncConnection], Awaitable[T]],
    ) -> T:
        """The database's answer, or UNAVAILABLE in time; `begin` is the way to it.

        The question is a task of its own, because a driver that is cancelled waits for the server
        to agree, which one that hangs never does.
        """

        async def answer() -> T:
            async with begin() as connection:
                return await question(connection)

        task = asyncio.create_task(answer(), name="authentication")
        self._lookups.add(task)
        task.add_done_callback(self._looked_up)
        done, _ = await asyncio.wait({task}, timeout=LOOKUP_TIMEOUT_S)
        if not done:
            raise errors.database_unavailable()
        return task.result()

    def _looked_up(self, task: asyncio.Task[Any]) -> None:
        self._lookups.discard(task)
        _fetched(task)


def _fetched(task: asyncio.Future[Any]) -> None:
    """A caller that has gone does not fetch what a task ended with."""
    if not task.cancelled():
        task.exception()


class _KeyCache:
    """The API keys that were good a moment ago, by the hash of their secrets."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._found: dict[bytes, tuple[float, FoundKey]] = {}

    def get(self, secret: str) -> FoundKey | None:
        until, found = self._found.get(secret_hash(secret), (0.0, None))
        return found if self._clock() < until else None

    def until(self, secret: str) -> float:
        """Until when it is kept; a time that is past if it is not."""
        return self._found.get(secret_hash(secret), (0.0, None))[0]

    def put(self, digest: bytes, found: FoundKey, until: float) -> None:
        # The newest goes to the end, so that the first is the oldest.
        self._found.pop(digest, None)
        if len(self._found) >= API_KEY_CACHE_SIZE:
            del self._found[next(iter(self._found))]
        self._found[digest] = (until, found)
