"""What an entry of the audit log is, and what of a change goes into it.

A change is told by the fields that differ, as they were and as they are. What is a secret, by its
key or its looks, is left out, and so is a value that is too large: the log says who did what, and
the object itself has the rest.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any
from urllib.parse import unquote

import orjson

from federation_server.domain.neuron import JsonObject
from federation_server.domain.text import REDACTED, without_secrets

STRANGER = "stranger"
"""The actor of a call whose credential names nobody."""

SERVER = "server"
"""The actor of what a server does of itself when it starts."""


class Outcome(StrEnum):
    """How a call ended: gRPC's codes."""

    OK = "OK"
    CANCELLED = "CANCELLED"
    UNKNOWN = "UNKNOWN"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    DATA_LOSS = "DATA_LOSS"
    UNAUTHENTICATED = "UNAUTHENTICATED"


MOST_BYTES = 2048
"""The size as JSON beyond which a value is left out and its size said."""

MOST_ID_LENGTH = 128
"""Ids that were refused may be of any length."""

_SECRET = re.compile(
    r"secret|passw|passphrase|authorization|credential|cookie|private_?key|api_?key|admin_?key"
    r"|(token|jwt|pwd)$",
    re.IGNORECASE,
)
"""Keys of secrets."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Who did what, or tried to; the fields are those of the table, and of the contract."""

    actor: str = STRANGER
    role: str = ""
    api_key_id: str = ""
    peer: str = ""
    method: str = ""
    object_type: str = ""
    object_id: str = ""
    neuron_id: str = ""
    before: JsonObject | None = None
    after: JsonObject | None = None
    outcome: str = Outcome.OK
    reason: str = ""
    count: int = 1
    request_id: str = ""
    call_id: str = ""
    server_id: str = ""

    def together(self, other: Entry) -> Entry:
        """One entry for both: the later one, without what they do not have in common. The counts
        are the caller's.
        """
        differs = [name for name in _OWN if getattr(self, name) != getattr(other, name)]
        without: dict[str, Any] = {name: _NOT_COMMON.get(name, "") for name in differs}
        return replace(other, **without)


_OWN = (
    "actor",
    "role",
    "api_key_id",
    "peer",
    "method",
    "object_type",
    "object_id",
    "neuron_id",
    "request_id",
    "call_id",
)
"""What entries of the same outcome may differ in."""

_NOT_COMMON = {"actor": STRANGER}


def differences(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> tuple[JsonObject | None, JsonObject | None]:
    """The fields that differ, before and after, fit for the log, where they may look the same.
    None: there was no object, or there is none any more. Two empty objects: nothing has changed.
    """
    if before is None or after is None:
        return fit(_said(before)), fit(_said(after))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return (
        fit({name: before[name] for name in names if name in before}),
        fit({name: after[name] for name in names if name in after}),
    )


def _said(values: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Of a whole object what it has; most fields of most are empty."""
    return None if values is None else {name: value for name, value in values.items() if value}


def fit(values: Mapping[str, Any] | None) -> Any:
    """The values without secrets, each within its bound."""
    if values is None:
        return None
    return {name: _redacted(name, _bounded(value)) for name, value in values.items()}


def _bounded(value: Any) -> Any:
    size = len(orjson.dumps(value))
    return value if size <= MOST_BYTES else {"omitted_bytes": size}


def _redacted(name: str, value: Any) -> Any:
    if value and not isinstance(value, bool) and _SECRET.search(name):
        return REDACTED
    match value:
        case Mapping():
            return {key: _redacted(key, each) for key, each in value.items()}
        case list() | tuple():
            return [_redacted(name, each) for each in value]
        case str():
            return without_secrets(value)
    return value


def fit_id(text: str) -> str:
    """An id that was asked for, whether or not it can be one: it may be a secret, in a place where
    its name was asked for.
    """
    return without_secrets(text[: 8 * MOST_ID_LENGTH].replace("\0", ""))[:MOST_ID_LENGTH]


def address(peer: str) -> str:
    """The address of a gRPC peer, without the port: "ipv4:10.0.0.7:5123" is 10.0.0.7."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in {"ipv4", "ipv6"}:
        return kind
    return rest.rpartition(":")[0].strip("[]")


def neighbourhood(peer: str) -> str:
    """Whom an address is grouped with: of IPv6 its /64, which one host has all to itself."""
    try:
        found = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return peer
    if found.version == 4:
        return peer
    return str(ipaddress.ip_network((found, 64), strict=False))
