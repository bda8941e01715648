"""Neuron tokens: JWTs that this federation signs and verifies.

A token says which neuron shows it, and of which generation it is; whether that neuron still
exists and may take part, and whether that generation is still good, only the database knows
(`rpc/auth.py` asks it).
Only HS256 is ever used: what a token's own header says of its algorithm is never believed.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt
import structlog

from federation_server.domain.access import IssuedToken, NeuronIdentity, TokenLifetime
from federation_server.rpc import errors
from federation_server.store.access import SigningKey, load_signing_keys
from federation_server.store.database import Database

log = structlog.get_logger(__name__)

ALGORITHM = "HS256"
ISSUER = "federation"
AUDIENCE = "federation/neuron"

LEEWAY = timedelta(seconds=10)
"""How far a server's clock may be ahead of the database's, which issued the token."""

MAX_LENGTH = 4096
"""No token of ours comes near it; what is longer is not even parsed."""


class Tokens:
    """Issues and verifies neuron tokens with a fixed set of keys."""

    def __init__(self, keys: Sequence[SigningKey], lifetime: TokenLifetime) -> None:
        """The first of the keys signs, all of them verify."""
        self._signing = keys[0]
        self._secrets = {key.kid: key.secret for key in keys}
        self._lifetime = lifetime

    @classmethod
    async def load(cls, database: Database, lifetime: TokenLifetime) -> Tokens:
        """With the keys of that database, of which it makes the first."""
        async with database.begin() as connection:
            keys = await load_signing_keys(connection)
        return cls(keys, lifetime)

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
        neuron = NeuronIdentity(neuron_id, generation, expire_time, refresh_time)
        return IssuedToken(token, neuron)

    def verify(self, token: str, *, to_renew: bool = False) -> NeuronIdentity:
        """Who a token names, if it is one of ours and its time is not over; `to_renew` it may have
        been over for a while.

        Raises:
            errors.Refused: CREDENTIAL_EXPIRED, or CREDENTIAL_INVALID for everything else.
        """
        try:
            claims = self._decode(token, self._lifetime.renewal if to_renew else timedelta())
        except jwt.ExpiredSignatureError:
            raise errors.credential_expired() from None
        except jwt.PyJWTError as error:
            # The error's class says enough; its text may quote the token.
            log.info(
                "neuron token refused",
                action="token_refused",
                reason=type(error).__name__,
            )
            raise errors.credential_invalid() from None
        return NeuronIdentity(
            neuron_id=claims["sub"],
            generation=claims["gen"],
            expire_time=datetime.fromtimestamp(claims["exp"], UTC),
            refresh_time=datetime.fromtimestamp((claims["iat"] + claims["exp"]) / 2, UTC),
        )

    def _decode(self, token: str, late: timedelta) -> dict[str, Any]:
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
            leeway=LEEWAY + late,
            # A server whose clock is behind the database's must not refuse a fresh token.
            options={
                "require": ["iss", "aud", "sub", "iat", "exp", "jti", "gen"],
                "verify_iat": False,
            },
        )
        if type(claims["gen"]) is not int:
            raise jwt.InvalidTokenError("gen")
        return claims
