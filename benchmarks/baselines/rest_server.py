"""The usual alternative: jobs in a table, a REST API before it, workers that poll.

    uvicorn benchmarks.baselines.rest_server:app

One statement is one transaction. A worker claims what waits for it and posts each result; whoever
issued a job asks for it until it is done. No token, no history, no timers, one state column.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool
from pydantic import BaseModel

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    job_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    worker text NOT NULL,
    data jsonb NOT NULL,
    state text NOT NULL DEFAULT 'QUEUED',
    response jsonb,
    create_time timestamptz NOT NULL DEFAULT now(),
    start_time timestamptz,
    end_time timestamptz
);
CREATE INDEX IF NOT EXISTS jobs_waiting ON jobs (worker, job_id) WHERE state = 'QUEUED';
"""

ISSUE = "INSERT INTO jobs (worker, data) VALUES (%s, %s) RETURNING job_id"

CLAIM = """
UPDATE jobs SET state = 'RUNNING', start_time = now()
WHERE job_id IN (
    SELECT job_id FROM jobs WHERE worker = %s AND state = 'QUEUED'
    ORDER BY job_id LIMIT 16 FOR UPDATE SKIP LOCKED
)
RETURNING job_id, data
"""

FINISH = "UPDATE jobs SET state = 'DONE', response = %s, end_time = now() WHERE job_id = %s"

LOOK = "SELECT state, response FROM jobs WHERE job_id = %s"

pool = AsyncConnectionPool(
    os.environ["DSN"], min_size=10, max_size=10, open=False, kwargs={"autocommit": True}
)


class NewJob(BaseModel):
    """A job to be done by one worker."""

    worker: str
    data: dict[str, Any]


class Result(BaseModel):
    """What a worker answers."""

    response: dict[str, Any]


async def rows(query: str, *values: object) -> list[tuple[Any, ...]]:
    """Runs one statement in a transaction of its own."""
    async with pool.connection() as connection:
        cursor = await connection.execute(query.encode(), values)
        return await cursor.fetchall() if cursor.description else []


async def issue(job: NewJob) -> dict[str, int]:
    """Puts a job into the table."""
    return {"job_id": (await rows(ISSUE, job.worker, Jsonb(job.data)))[0][0]}


async def claim(worker: str) -> list[dict[str, Any]]:
    """What waits for that worker; it is the worker's now."""
    return [{"job_id": number, "data": data} for number, data in await rows(CLAIM, worker)]


async def finish(job_id: int, result: Result) -> None:
    """Takes a job's result."""
    await rows(FINISH, Jsonb(result.response), job_id)


async def look(job_id: int) -> dict[str, Any]:
    """How a job stands."""
    state, response = (await rows(LOOK, job_id))[0]
    return {"state": state, "response": response}


@asynccontextmanager
async def lifespan(_: object) -> AsyncIterator[None]:
    """Opens the pool and makes the table."""
    await pool.open(wait=True)
    async with pool.connection() as connection:
        await connection.execute(SCHEMA.encode())
    yield
    await pool.close()


app = FastAPI(lifespan=lifespan)
app.add_api_route("/jobs", issue, methods=["POST"])
app.add_api_route("/workers/{worker}/claim", claim, methods=["POST"])
app.add_api_route("/jobs/{job_id}/result", finish, methods=["POST"])
app.add_api_route("/jobs/{job_id}", look, methods=["GET"])
