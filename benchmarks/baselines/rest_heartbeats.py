"""The usual alternative for heartbeats: a POST for each, and a row for each.

    uvicorn benchmarks.baselines.rest_heartbeats:app

FastAPI, its own validation, an asynchronous SQLAlchemy session for each request. No token is
checked, no neuron's state is kept beside its heartbeats, and nobody is marked OFFLINE.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy import BigInteger, DateTime, Index, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class System(BaseModel):
    """What the host does."""

    cpu_percent: float
    memory_percent: float
    memory_used_bytes: int
    disk_percent: float
    disk_used_bytes: int
    network_received_bytes: int
    network_sent_bytes: int


class Application(BaseModel):
    """What the service does."""

    requests_per_second: float
    mean_response_ms: float
    p50_response_ms: float
    p95_response_ms: float
    p99_response_ms: float
    active_connections: int
    queue_size: int
    error_rate_percent: float
    requests: int
    failed_requests: int
    response_ms_sum: float


class Process(BaseModel):
    """What its process holds."""

    pid: int
    threads: int
    rss_bytes: int
    open_files: int
    cpu_percent: float


class Heartbeat(BaseModel):
    """The federation's heartbeat, in JSON."""

    heartbeat_time: datetime
    uptime_s: float
    health_score: float
    activity: str
    system: System
    application: Application
    process: Process
    versions: dict[str, str]
    dependencies: list[dict[str, Any]]


class Base(DeclarativeBase):
    """Every table."""

    type_annotation_map = {int: BigInteger, datetime: DateTime(timezone=True)}  # noqa: RUF012


class Row(Base):
    """A heartbeat that was received."""

    __tablename__ = "heartbeats"
    __table_args__ = (Index("heartbeats_of_neuron", "neuron_id", "receive_time"),)

    heartbeat_id: Mapped[int] = mapped_column(primary_key=True)
    neuron_id: Mapped[str]
    receive_time: Mapped[datetime] = mapped_column(server_default=func.now())
    heartbeat_time: Mapped[datetime]
    uptime_s: Mapped[float]
    health_score: Mapped[float]
    activity: Mapped[str]
    cpu_percent: Mapped[float]
    memory_percent: Mapped[float]
    memory_used_bytes: Mapped[int]
    disk_percent: Mapped[float]
    disk_used_bytes: Mapped[int]
    network_received_bytes: Mapped[int]
    network_sent_bytes: Mapped[int]
    requests_per_second: Mapped[float]
    mean_response_ms: Mapped[float]
    p50_response_ms: Mapped[float]
    p95_response_ms: Mapped[float]
    p99_response_ms: Mapped[float]
    active_connections: Mapped[int]
    queue_size: Mapped[int]
    error_rate_percent: Mapped[float]
    requests: Mapped[int]
    failed_requests: Mapped[int]
    response_ms_sum: Mapped[float]
    pid: Mapped[int]
    threads: Mapped[int]
    rss_bytes: Mapped[int]
    open_files: Mapped[int]
    process_cpu_percent: Mapped[float]
    versions: Mapped[dict[str, Any]] = mapped_column(JSONB)
    dependencies: Mapped[list[Any]] = mapped_column(JSONB)


engine = create_async_engine(os.environ["SQLALCHEMY_URL"], pool_size=10, max_overflow=0)
sessions = async_sessionmaker(engine, expire_on_commit=False)


async def receive(neuron_id: str, heartbeat: Heartbeat) -> None:
    """Stores a heartbeat, in a transaction of its own."""
    flat = heartbeat.model_dump(exclude={"system", "application", "process"})
    flat |= heartbeat.system.model_dump() | heartbeat.application.model_dump()
    process = heartbeat.process.model_dump()
    process["process_cpu_percent"] = process.pop("cpu_percent")
    async with sessions() as session:
        session.add(Row(neuron_id=neuron_id, **flat, **process))
        await session.commit()


@asynccontextmanager
async def lifespan(_: object) -> AsyncIterator[None]:
    """Makes the table."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)
app.add_api_route("/neurons/{neuron_id}/heartbeats", receive, methods=["POST"], status_code=204)
