"""A spool of the SDK's without a neuron around it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from neuron_sdk.spool import Attempt, Spool, SpooledMessage

T = TypeVar("T")
MIB = 2**20


def done(future: Future[T]) -> T:
    return future.result(10)


def interrupted(of: Attempt) -> bytes:
    return b"interrupted " + of.command_id.encode()


def not_started(of: Attempt) -> bytes:
    return b"not started " + of.command_id.encode()


def shortened(finish: bytes) -> bytes:
    return b"short " + finish[:3]


def open_spool(
    path: Path, *, max_bytes: int = 64 * MIB, now: Callable[[], float] = lambda: 1e9
) -> Spool:
    return Spool(
        path,
        max_bytes=max_bytes,
        interrupted=interrupted,
        not_started=not_started,
        shortened=shortened,
        now=now,
    )


def waiting(spool: Spool, after: int = 0) -> list[SpooledMessage]:
    return done(spool.read_after(after, max_count=100_000, max_bytes=1024 * MIB))


def payloads(spool: Spool) -> list[bytes]:
    return [message.payload for message in waiting(spool)]
