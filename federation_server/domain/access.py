"""Who may do what: roles, principals, and how secrets are made and compared.

A secret is shown once, when it is made; what is kept is its SHA-256. The secrets are 256 random
bits, so that a slow password hash would add cost and no safety.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum, StrEnum
from typing import Any, TypeAlias

API_KEY_PREFIX = "fak_"
ENROLLMENT_TOKEN_PREFIX = "fet_"  # noqa: S105 - a prefix, not a secret


class Role(IntEnum):
    """What an admin may do; each role may do all that the ones below it may."""

    VIEWER = 1
    """Sees the fleet, its commands and its metrics."""
    OPERATOR = 2
    """Commands and steers neurons."""
    ADMIN = 3
    """Decides who takes part."""


class EnrollmentMode(StrEnum):
    """Who may join the fleet."""

    TOKEN = "token"  # noqa: S105 - a mode, not a secret
    """Who has an enrollment token."""
    APPROVE = "approve"
    """Anybody else as well, once an admin has approved it."""
    OPEN = "open"
    """Anybody."""


class Caller(StrEnum):
    """Who an RPC is for."""

    ANYONE = "ANYONE"
    """No credential is needed to call it; it may check one of its own."""
    NEURON = "NEURON"
    """A neuron, with its token."""
    VIEWER = "VIEWER"
    """An API key of role VIEWER or above."""
    OPERATOR = "OPERATOR"
    """An API key of role OPERATOR or above."""
    ADMIN = "ADMIN"
    """An API key of role ADMIN."""


@dataclass(frozen=True, slots=True)
class Admin:
    """Somebody with an API key."""

    name: str
    role: Role
    api_key_id: str = ""
    """Of the key, whose name may be another key's later on."""

    @property
    def actor(self) -> str:
        """How histories name this principal."""
        return f"admin:{self.name}"


@dataclass(frozen=True, slots=True)
class NeuronIdentity:
    """A neuron that has shown its token."""

    neuron_id: str
    generation: int
    """Its token is good while no newer one has been used, and none has been revoked since."""
    expire_time: datetime
    refresh_time: datetime
    kid: str
    """The key that has signed it."""

    @property
    def actor(self) -> str:
        """How histories name this principal."""
        return f"neuron:{self.neuron_id}"


Principal: TypeAlias = Admin | NeuronIdentity


@dataclass(frozen=True, slots=True)
class EnrollmentToken:
    """An enrollment token without its secret; see the contract's message of that name."""

    enrollment_token_id: str
    description: str
    creator: str
    create_time: datetime
    expire_time: datetime
    revoke_time: datetime | None
    max_uses: int
    uses: int
    neuron_type: str
    neuron_id_pattern: str
    labels: Mapping[str, str]
    allow_reenrollment: bool

    @property
    def used_up(self) -> bool:
        """It has enrolled as many as it can; only a request that it has counted may come again."""
        return 0 < self.max_uses <= self.uses

    @property
    def audited(self) -> dict[str, Any]:
        """What the audit log says of it when it is made."""
        return {
            "description": self.description,
            "expire_time": self.expire_time,
            "max_uses": self.max_uses,
            "neuron_type": self.neuron_type,
            "neuron_id_pattern": self.neuron_id_pattern,
            "labels": dict(self.labels),
            "allow_reenrollment": self.allow_reenrollment,
        }

    def refuses(
        self, *, now: datetime, neuron_id: str, neuron_type: str, labels: Mapping[str, str]
    ) -> str | None:
        """Why the token does not enroll that neuron, or None if it does (unless it is used up).

        The reason is for the server's log: a stranger learns only that it was refused.
        """
        if self.revoke_time is not None:
            return "revoked"
        if now >= self.expire_time:
            return "expired"
        if self.neuron_type and neuron_type != self.neuron_type:
            return "pinned to another type"
        if self.neuron_id_pattern and not matches(self.neuron_id_pattern, neuron_id):
            return "pinned to other ids"
        if any(labels.get(key) != value for key, value in self.labels.items()):
            return "pinned to other labels"
        return None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key without its secret; see the contract's message of that name."""

    name: str
    role: Role
    description: str
    creator: str
    create_time: datetime
    expire_time: datetime | None
    revoke_time: datetime | None
    last_use_time: datetime | None
    old_secret_expire_time: datetime | None

    def works(self, now: datetime) -> bool:
        """It is neither revoked nor expired."""
        return self.revoke_time is None and (self.expire_time is None or now < self.expire_time)


def is_last_resort(name: str, keys: Iterable[ApiKey], now: datetime) -> bool:
    """Whether that key is the only one with which the federation can be administered for good.

    That is the only ADMIN key that works and never expires; where none is of that kind, the only
    ADMIN key that works.
    """
    working = [key for key in keys if key.role is Role.ADMIN and key.works(now)]
    lasting = [key for key in working if key.expire_time is None]
    return [key.name for key in lasting or working] == [name]


def matches(pattern: str, text: str) -> bool:
    """Whether `text` is `pattern`, where each `*` of it stands for any text.

    By hand, because a regular expression of many `*` takes seconds, or for ever, for a text that
    somebody has made to that end; and who registers chooses it.
    """
    first, *others = pattern.split("*")
    if not others:
        return text == pattern
    *between, last = others
    end = len(text) - len(last)
    if len(first) > end or not (text.startswith(first) and text.endswith(last)):
        return False
    at = len(first)
    for part in between:  # the first place for each leaves the most room for those behind it
        found = text.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


def approval_code(neuron_id: str, create_time: datetime) -> str:
    """What a neuron that waits for its approval and its admins compare: "ABCD-EFGH". No secret, but
    another one for whoever takes the same id at another time.
    """
    digest = hashlib.sha256(f"{neuron_id} {create_time.timestamp():.6f}".encode()).digest()
    code = base64.b32encode(digest)[:8].decode()
    return f"{code[:4]}-{code[4:]}"


def same_code(code: str, said: str) -> bool:
    """Whether somebody has said that code, in whatever letters."""
    return said.strip().replace("-", "").upper() == code.replace("-", "")


def is_jwt(credential: str) -> bool:
    """Whether it has a JWT's form, as neurons' tokens; anything else can only be an API key."""
    return credential.startswith("eyJ") and credential.count(".") == 2


def new_secret(prefix: str) -> str:
    """A fresh secret of 256 random bits."""
    return prefix + secrets.token_urlsafe(32)


def secret_hash(secret: str) -> bytes:
    """What is kept of a secret, and looked up: 32 bytes."""
    return hashlib.sha256(secret.encode()).digest()


@dataclass(frozen=True, slots=True, repr=False)
class IssuedToken:
    """A neuron's new credential."""

    token: str
    neuron: NeuronIdentity
    """Whom it names."""


@dataclass(frozen=True, slots=True)
class TokenLifetime:
    """How long neuron tokens live; they are renewed in the middle of their life."""

    ttl: timedelta = timedelta(hours=24)
    renewal: timedelta = timedelta(days=30)
    """How long after that a token is good for one thing: to register its neuron again."""

    def refresh_time(self, issue_time: datetime) -> datetime:
        """When a token issued at `issue_time` should be renewed."""
        return issue_time + self.ttl / 2
