"""Neuron tokens: JWTs that this federation signs and verifies.

A token says which neuron shows it, and of which generation it is; whether that neuron still
exists, may take part and is of that generation, only the database knows (`rpc/auth.py` asks it).
Only HS256 is ever used: what a token's own header says of its algorithm is never believed.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt

from federation_server.domain.access import NeuronIdentity, TokenLifetime
from federation_server.rpc import errors
from federation_server.store.access import SigningKey, load_signing_keys
from federation_server.store.database import Database

ALGORITHM = "HS256"
ISSUER = "federation"
AUDIENCE = "federation/neuron"

LEEWAY = timedelta(seconds=10)
"""How far a server's clock may be ahead of the database's, which issued the token."""

MAX_LENGTH = 4096
"""No token of ours comes near it; what is longer is not even parsed."""


@dataclass(frozen=True, slots=True, repr=False)
class IssuedToken:
    """A neuron's new credential."""

    token: str
    expire_time: datetime
    refresh_time: datetime


class Tokens:
    """Issues and verifies neuron tokens with a fixed set of keys."""

    def __init__(self, keys: Sequence[SigningKey], lifetime: TokenLifetime) -> None:
        """The first of the keys signs, all of them verify."""
        self._signing = keys[0]
        self._secrets = {key.kid: key.secret for key in keys}
        self._lifetime = lifetime

    @classmethod
    async def load(cls, database: Database, *, ttl: timedelta) -> Tokens:
        """With the keys of that database, of which it makes the first."""
        async with database.begin() as connection:
            keys = await load_signing_keys(connection)
        return cls(keys, TokenLifetime(ttl))

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
        return IssuedToken(token, expire_time, self._lifetime.refresh_time(now))

    def verify(self, token: str) -> NeuronIdentity:
        """Who a token names, if it is one of ours and its time is not over.

        Raises:
            errors.Refused: CREDENTIAL_EXPIRED, or CREDENTIAL_INVALID for everything else.
        """
        try:
            claims = self._decode(token)
        except jwt.ExpiredSignatureError:
            raise errors.credential_expired() from None
        except jwt.PyJWTError as error:
            # Its class is logged where the call is refused, unless there are too many of them; its
            # text may quote the token.
            raise errors.credential_invalid() from error
        return NeuronIdentity(
            neuron_id=claims["sub"],
            generation=claims["gen"],
            expire_time=datetime.fromtimestamp(claims["exp"], UTC),
        )

    def _decode(self, token: str) -> dict[str, Any]:
        if len(token) > MAX_LENGTH or not token.isascii():
            raise jwt.DecodeError("no token of ours")
        secret = self._secrets.get(jwt.get_unverified_header(token).get("kid", ""))
        if secret is None:
            raise jwt.InvalidTokenError("unknown kid")
        claims: dict[str, Any] = jwt.decode(
            token,
            secret,
            algorithms=[ALGORITHM],
            audience=AUDIENCE,
            issuer=ISSUER,
            leeway=LEEWAY,
            # A server whose clock is behind the database's must not refuse a fresh token.
            options={
                "require": ["iss", "aud", "sub", "iat", "exp", "jti", "gen"],
                "verify_iat": False,
            },
        )
        if type(claims["gen"]) is not int:
            raise jwt.InvalidTokenError("gen")
        return claims
