"""Neurons put straight into the store, for tests that begin where registration ends."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta

from sqlalchemy import func, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server.domain.audit import Entry
from federation_server.domain.heartbeat import Heartbeat
from federation_server.domain.neuron import (
    DEFAULT_ALERT_THRESHOLDS,
    Json,
    JsonObject,
    Lifecycle,
    Presence,
)
from federation_server.store import sessions
from federation_server.store.database import Database, current_time, driver
from federation_server.store.ledger import issuing
from federation_server.store.ledger.commands import CommandRecord, NewCommand
from federation_server.store.pipeline import pipeline
from federation_server.store.schema import neuron_states, neurons
from federation_server.store.sessions import NewSession, OpenedSession

GENERATION = 1


async def put_neuron(
    connection: AsyncConnection,
    neuron_id: str,
    *,
    type: str = "worker",  # noqa: A002 - the contract's word
    command_types: Sequence[JsonObject] = ({"type": "run"},),
    labels: Mapping[str, str] | None = None,
    max_concurrent_commands: int = 4,
    heartbeat_timeout: timedelta = timedelta(seconds=120),
) -> None:
    """A registered neuron that never came."""
    thresholds: dict[str, Json] = dict(DEFAULT_ALERT_THRESHOLDS)
    thresholds["heartbeat_timeout_s"] = heartbeat_timeout.total_seconds()
    await connection.execute(
        insert(neurons).values(
            neuron_id=neuron_id,
            token_generation=GENERATION,
            name=neuron_id,
            type=type,
            language="python",
            version="1",
            base_url="",
            healthcheck_endpoint="",
            api_endpoints=[],
            capabilities=[],
            dependencies=[],
            command_types=list(command_types),
            resource_requirements={},
            deployment={},
            alert_thresholds=thresholds,
            auto_restart={},
            labels=dict(labels or {}),
            metadata={},
            max_concurrent_commands=max_concurrent_commands,
            overridden_fields=[],
            lifecycle=Lifecycle.ACTIVE,
            lifecycle_reason="",
            create_time=func.now(),
            update_time=func.now(),
        )
    )
    await connection.execute(
        insert(neuron_states).values(
            neuron_id=neuron_id,
            presence=Presence.OFFLINE,
            presence_time=func.now(),
            presence_reason="registered",
            heartbeat_timeout=heartbeat_timeout,
            session_epoch=0,
            session_open=False,
            instance_id="",
            sdk_name="",
            sdk_version="",
            server_id="",
            peer="",
            requests_total=0,
            failed_requests_total=0,
            response_ms_total=0.0,
            uptime_s_total=0.0,
            counted_instance_id="",
            counted_requests=0,
            counted_failed_requests=0,
            counted_response_ms=0.0,
            counted_uptime_s=0.0,
            counted_before=[],
        )
    )


async def open_session(
    database: Database,
    neuron_id: str,
    *,
    server_id: str = "server-1",
    spool_id: str = "spool-1",
    running: Sequence[tuple[str, int]] = (),
    backlog: int = 0,
) -> OpenedSession:
    """A new session of the neuron, superseding the one before."""
    opened = await open_or_not(
        database,
        new_session(neuron_id, spool_id=spool_id, running=running, backlog=backlog),
        server_id=server_id,
    )
    assert opened is not None
    return opened


def new_session(
    neuron_id: str,
    *,
    generation: int = GENERATION,
    spool_id: str = "spool-1",
    running: Sequence[tuple[str, int]] = (),
    backlog: int = 0,
) -> NewSession:
    return NewSession(
        neuron_id=neuron_id,
        generation=generation,
        session_id=str(uuid.uuid4()),
        instance_id="instance-1",
        sdk_name="test",
        sdk_version="1",
        spool_id=spool_id,
        peer="ipv4:127.0.0.1:1",
        backlog_sequence=backlog,
        running=running,
    )


async def open_or_not(
    database: Database, new: NewSession, *, server_id: str = "server-1"
) -> OpenedSession | None:
    """That session; None if the neuron may not hold one."""
    async with database.begin() as connection, pipeline(await driver(connection)) as send:
        (opened,) = await sessions.open_later(send, server_id, [new])()
    assert not isinstance(opened, sessions.Busy)
    return opened


def heartbeat(
    *,
    requests: int | None = 10,
    failed_requests: int | None = 1,
    response_ms_sum: float | None = 100.0,
    uptime_s: float | None = 5.0,
    health_score: float | None = 90.0,
) -> Heartbeat:
    """A heartbeat whose other fields are plausible and of no interest."""
    return Heartbeat(
        heartbeat_time=None,
        uptime_s=uptime_s,
        health_score=health_score,
        activity="ACTIVE",
        cpu_percent=12.5,
        memory_percent=40.0,
        memory_used_bytes=1_000,
        disk_percent=50.0,
        disk_used_bytes=2_000,
        network_received_bytes=3_000,
        network_sent_bytes=4_000,
        requests_per_second=2.0,
        mean_response_ms=10.0,
        p50_response_ms=9.0,
        p95_response_ms=20.0,
        p99_response_ms=30.0,
        active_connections=3,
        queue_size=7,
        error_rate_percent=10.0,
        requests=requests,
        failed_requests=failed_requests,
        response_ms_sum=response_ms_sum,
        pid=42,
        threads=5,
        rss_bytes=6_000,
        open_files=8,
        process_cpu_percent=1.5,
        spool_pending=0,
        spool_pending_bytes=0,
        spool_dropped=0,
        spool_dropped_reports=None,
        spool_dropped_updates=None,
        spool_dropped_error_reports=None,
        spool_shortened_results=None,
        spool_in_memory=False,
        running_commands=0,
        host='{"hostname":"h"}',
        dependencies='[{"name":"postgresql","state":"UP"}]',
        versions='{"service":"1"}',
    )


async def put_command(database: Database, new: NewCommand) -> CommandRecord | None:
    """Puts a command into the ledger; None if its issuer has used its request_id before."""
    async with database.begin() as connection:
        now = await current_time(connection)
        async with pipeline(await driver(connection)) as send:
            (record,) = await issuing.insert_later(send, [(new, now, Entry())])()
    return record
