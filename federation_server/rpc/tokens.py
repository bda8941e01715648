"""Neuron tokens: JWTs that this federation signs and verifies.

A token says which neuron shows it, and of which generation it is; whether that neuron still
exists and may take part, and whether that generation is still good, only the database knows
(`rpc/auth.py` asks it).
Only HS256 is ever used: what a token's own header says of its algorithm is never believed.

Signing keys change while servers run, by an admin's call to any of them. Each server reads them
every few seconds, and at once when a token names one that it does not know: so what another server
has signed with a key of this moment is good here too. However many tokens name unknown keys, and
whoever shows them, the database is asked once a second at most; each waits for an answer from
after it came.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import psycopg
import structlog
from sqlalchemy import exc as sql

from federation_server.domain.access import IssuedToken, NeuronIdentity, TokenLifetime
from federation_server.rpc import errors
from federation_server.store.access import (
    SigningKey,
    current_signing_keys,
    load_signing_keys,
)
from federation_server.store.database import Database, first_line

log = structlog.get_logger(__name__)

ALGORITHM = "HS256"
ISSUER = "federation"
AUDIENCE = "federation/neuron"

LEEWAY = timedelta(seconds=10)
"""How far a server's clock may be ahead of the database's, which issued the token."""

MAX_AHEAD = timedelta(minutes=10)
"""A token that says it was issued later than this is not believed: no clock of ours is that far
ahead."""

OVERLAP_SLACK = timedelta(minutes=5)
"""How much longer than a token's life the keys before a new one stay: servers may sign with them
for some seconds more, and clocks differ."""

RELOAD_INTERVAL_S = 3.0
"""How long a key can be unknown here that no token has named, or be good that has retired."""

RELOAD_PAUSE_S = 1.0
"""The least time between two looks for keys."""

LOOK_TIMEOUT_S = 3.0
"""How long a token with an unknown key may wait for a look."""

_AT_ONCE = datetime.min.replace(tzinfo=UTC)

MAX_LENGTH = 4096
"""No token of ours comes near it; what is longer is not even parsed."""


class _UnknownKey(jwt.InvalidTokenError):
    """The token names a key that is not known here."""


class _Look:
    """One look for keys, and those who wait for it."""

    def __init__(self) -> None:
        self.over = asyncio.Event()
        self.failed = False


class Tokens:
    """Issues and verifies neuron tokens."""

    def __init__(
        self,
        keys: Sequence[SigningKey],
        lifetime: TokenLifetime,
        *,
        read: Callable[[], Awaitable[Sequence[SigningKey]]] | None = None,
    ) -> None:
        """The first of the keys signs, all of them verify. `read` gives those of the moment;
        without it they stay as they are.
        """
        self._take(keys)
        self._lifetime = lifetime
        self._read = read
        self._next = _Look()
        self._wanted = asyncio.Event()

    @classmethod
    async def load(cls, database: Database, lifetime: TokenLifetime) -> Tokens:
        """With the keys of that database, of which it makes the first."""
        async with database.begin() as connection:
            keys = await load_signing_keys(connection)

        async def read() -> Sequence[SigningKey]:
            async with database.begin() as connection:
                return await current_signing_keys(connection)

        return cls(keys, lifetime, read=read)

    @property
    def default_overlap(self) -> timedelta:
        """How long a key has to stay so that no token which it signed is refused."""
        return self._lifetime.ttl + self._lifetime.renewal + OVERLAP_SLACK

    async def run(self) -> None:
        """Keeps up with the keys until it is cancelled."""
        assert self._read is not None
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(RELOAD_INTERVAL_S):
                    await self._wanted.wait()
            # Who comes from now on waits for the next look: this one may not see what he has seen.
            look, self._next = self._next, _Look()
            self._wanted.clear()
            try:
                self._take(await self._read())
            except (psycopg.Error, sql.SQLAlchemyError) as error:
                look.failed = True
                log.warning(
                    "signing keys not read", action="signing_keys_retry", reason=first_line(error)
                )
            look.over.set()
            await asyncio.sleep(RELOAD_PAUSE_S)

    async def look(self) -> bool:
        """Waits until the keys have been read once more; whether they were."""
        if self._read is None:
            return True
        look = self._next
        self._wanted.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                await look.over.wait()
        return look.over.is_set() and not look.failed

    def _take(self, keys: Sequence[SigningKey]) -> None:
        if not keys:
            raise RuntimeError("there is no signing key")
        self._signing = keys[0]
        self._keys = {key.kid: key for key in keys}

    def due_time(self, neuron: NeuronIdentity) -> datetime | None:
        """When who holds a token on a stream is to get the next one: in the middle of its life, or,
        if its key retires before, while that is good. None, if it has retired: others may know it,
        and who has come with such a token is to get nothing by it that would outlast it.
        """
        key = self._keys.get(neuron.kid)
        if key is None:
            return None
        if key is self._signing or key.retire_time is None:
            return neuron.refresh_time
        return neuron.refresh_time if neuron.refresh_time < key.retire_time else _AT_ONCE

    def issue(self, neuron_id: str, generation: int, now: datetime) -> IssuedToken:
        """A new token; `now` is the database's time."""
        expire_time = now + self._lifetime.ttl
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": neuron_id,
            "gen": generation,
            "iat": int(now.timestamp()),
            "exp": int(expire_time.timestamp()),
            "jti": secrets.token_hex(16),
        }
        key = self._signing
        token = jwt.encode(claims, key.secret, algorithm=ALGORITHM, headers={"kid": key.kid})
        refresh_time = self._lifetime.refresh_time(now)
        neuron = NeuronIdentity(neuron_id, generation, expire_time, refresh_time, key.kid)
        return IssuedToken(token, neuron)

    def verify(self, token: str, *, to_renew: bool = False) -> NeuronIdentity:
        """Who a token names, if it is one of ours and its time is not over, or, `to_renew`, not for
        long; by the keys that are known here.

        Raises:
            errors.Refused: CREDENTIAL_EXPIRED, or CREDENTIAL_INVALID for everything else.
        """
        try:
            return self._identity(token, to_renew=to_renew)
        except jwt.PyJWTError as error:
            raise _refused(error) from error

    async def identify(self, token: str, *, to_renew: bool = False) -> NeuronIdentity:
        """As `verify`, also by a key that this server has yet to learn of.

        Raises:
            errors.Refused: as `verify`; DATABASE_UNAVAILABLE if it could not be looked for.
        """
        try:
            return self._identity(token, to_renew=to_renew)
        except _UnknownKey:
            if not await self.look():
                raise errors.database_unavailable() from None
            return self.verify(token, to_renew=to_renew)
        except jwt.PyJWTError as error:
            raise _refused(error) from error

    def _identity(self, token: str, *, to_renew: bool) -> NeuronIdentity:
        kid, claims = self._decode(token, self._lifetime.renewal if to_renew else timedelta())
        return NeuronIdentity(
            neuron_id=claims["sub"],
            generation=claims["gen"],
            expire_time=datetime.fromtimestamp(claims["exp"], UTC),
            refresh_time=datetime.fromtimestamp((claims["iat"] + claims["exp"]) / 2, UTC),
            kid=kid,
        )

    def _decode(self, token: str, late: timedelta) -> tuple[str, dict[str, Any]]:
        if len(token) > MAX_LENGTH or not token.isascii():
            raise jwt.DecodeError("no token of ours")
        key = self._keys.get(jwt.get_unverified_header(token).get("kid", ""))
        if key is None:
            raise _UnknownKey
        claims: dict[str, Any] = jwt.decode(
            token,
            key.secret,
            algorithms=[ALGORITHM],
            audience=AUDIENCE,
            issuer=ISSUER,
            leeway=LEEWAY + late,
            # A server whose clock is behind the database's must not refuse a fresh token.
            options={
                "require": ["iss", "aud", "sub", "iat", "exp", "jti", "gen"],
                "verify_iat": False,
            },
        )
        if type(claims["gen"]) is not int or type(claims["iat"]) is not int:
            raise jwt.InvalidTokenError("gen or iat")
        if claims["iat"] > (datetime.now(UTC) + MAX_AHEAD).timestamp():
            raise jwt.ImmatureSignatureError("iat")
        return key.kid, claims


def _refused(error: jwt.PyJWTError) -> errors.Refused:
    if isinstance(error, jwt.ExpiredSignatureError):
        return errors.credential_expired()
    # Its class is logged where the call is refused, unless there are too many of them; its text may
    # quote the token.
    return errors.credential_invalid()
