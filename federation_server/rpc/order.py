"""What is to be issued, whoever says it: a request's spec, or a command that is issued anew."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta

from google.protobuf.message import Message

from federation.v1 import command_pb2
from federation.v1 import command_service_pb2 as pb
from federation_server.domain import json_schema
from federation_server.domain.command import (
    DEFAULT_BACKOFF,
    DEFAULT_EXPIRY,
    DEFAULT_PRIORITY,
    Execution,
)
from federation_server.domain.neuron import JsonObject
from federation_server.domain.violation import Violation
from federation_server.rpc import errors
from federation_server.rpc.convert import from_struct, optional_span, optional_time
from federation_server.store.ledger.commands import CommandRecord, NewCommand, is_control

MOST_AHEAD = timedelta(days=366)
"""How far ahead a not_before_time may lie; an expire_time twice as far, less a day."""


@dataclass(frozen=True, slots=True)
class Order:
    """What to do, how and when; for one neuron or many."""

    content: bytes
    """A hash of all that was asked for: a repeated request must ask for the same."""
    type: str
    data: JsonObject
    priority: int
    not_before_time: datetime | None
    expire_time: datetime | None
    expiry: timedelta
    """How long it may wait if there is no expire_time."""
    accept_timeout: timedelta | None
    run_timeout: timedelta | None
    progress_timeout: timedelta | None
    execution: Execution
    max_attempts: int
    retry_backoff: timedelta
    allow_unadvertised: bool
    retry_of_command_id: str | None = None

    @classmethod
    def of_spec(cls, spec: pb.CommandSpec, within: Message | None = None) -> Order:
        """What a checked spec says; `within` is the message that holds all that was asked for,
        where that is more than the spec.
        """
        asked = (spec if within is None else within).SerializeToString(deterministic=True)
        once = spec.execution == command_pb2.Execution.EXECUTION_AT_MOST_ONCE
        return cls(
            content=hashlib.sha256(asked).digest(),
            type=spec.type,
            data=from_struct(spec.data),
            priority=spec.priority if spec.HasField("priority") else DEFAULT_PRIORITY,
            not_before_time=optional_time(spec, "not_before_time"),
            expire_time=optional_time(spec, "expire_time"),
            expiry=DEFAULT_EXPIRY,
            accept_timeout=optional_span(spec, "accept_timeout"),
            run_timeout=optional_span(spec, "run_timeout"),
            progress_timeout=optional_span(spec, "progress_timeout"),
            execution=Execution.AT_MOST_ONCE if once else Execution.AT_LEAST_ONCE,
            max_attempts=spec.max_attempts or 1,
            retry_backoff=optional_span(spec, "retry_backoff") or DEFAULT_BACKOFF,
            allow_unadvertised=spec.allow_unadvertised,
        )

    @classmethod
    def again(cls, old: CommandRecord) -> Order:
        """What a command that has ended was issued for."""
        return cls(
            content=hashlib.sha256(f"retry {old.command_id}".encode()).digest(),
            type=old.type,
            data=old.data,
            priority=old.priority,
            not_before_time=None,
            expire_time=None,
            expiry=old.expire_time - max(old.create_time, old.not_before_time or old.create_time),
            accept_timeout=old.accept_timeout,
            run_timeout=old.run_timeout,
            progress_timeout=old.progress_timeout,
            execution=old.execution,
            max_attempts=old.max_attempts,
            retry_backoff=old.retry_backoff,
            allow_unadvertised=old.allow_unadvertised,
            retry_of_command_id=old.command_id,
        )

    def check_times(self, now: datetime) -> None:
        """Returns if the times can be kept.

        Raises:
            errors.Refused: INVALID_ARGUMENT, with every time that cannot.
        """
        first = max(now, self.not_before_time or now)
        expire = self.expire_time
        faults = []
        if self.not_before_time and self.not_before_time > now + MOST_AHEAD:
            faults.append(("command.not_before_time", "must be at most 366 days ahead"))
        if expire and expire <= first:
            faults.append(("command.expire_time", "must be later than now and not_before_time"))
        if expire and expire > now + 2 * MOST_AHEAD - timedelta(days=1):
            faults.append(("command.expire_time", "must be at most 731 days ahead"))
        if faults:
            raise errors.invalid_fields([Violation(*fault) for fault in faults])

    def check_data(self, neuron_id: str, advertised: JsonObject | None) -> None:
        """Returns if the neuron, which advertises the type so, can take the order.

        Raises:
            errors.Refused: it does not advertise the type, or the data does not fit its schema.
        """
        if self.allow_unadvertised:
            return
        if advertised is None:
            raise errors.command_type_not_advertised(neuron_id, self.type)
        if faults := self.violations(advertised):
            raise errors.invalid_fields(faults)

    def violations(self, advertised: JsonObject) -> list[Violation]:
        """Every part of the data that does not fit the advertised type's schema."""
        schema = advertised.get("data_schema")
        if not isinstance(schema, dict):
            return []
        return json_schema.violations(schema, self.data, "command.data")

    def command(
        self,
        neuron_id: str,
        advertised: JsonObject | None,
        *,
        issuer: str,
        request_id: str | None,
        now: datetime,
    ) -> NewCommand:
        """The command for one neuron, which advertises the type so."""
        return NewCommand(
            neuron_id=neuron_id,
            issuer=issuer,
            request_id=request_id or None,
            request_hash=self.content,
            type=self.type,
            data=self.data,
            control=is_control(advertised),
            priority=self.priority,
            not_before_time=self.not_before_time,
            expire_time=self.expire_time or max(now, self.not_before_time or now) + self.expiry,
            accept_timeout=self.accept_timeout,
            run_timeout=self.run_timeout,
            progress_timeout=self.progress_timeout,
            execution=self.execution,
            max_attempts=self.max_attempts,
            retry_backoff=self.retry_backoff,
            allow_unadvertised=self.allow_unadvertised,
            retry_of_command_id=self.retry_of_command_id,
        )
