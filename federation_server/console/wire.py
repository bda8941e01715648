"""Python's times as the contract's; an absent one stays absent."""

from __future__ import annotations

from datetime import datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp


def duration(length: timedelta | None) -> Duration | None:
    """A length of time."""
    if length is None:
        return None
    message = Duration()
    message.FromTimedelta(length)
    return message


def timestamp(at: datetime | None) -> Timestamp | None:
    """A moment; it has a zone."""
    if at is None:
        return None
    message = Timestamp()
    message.FromDatetime(at)
    return message
