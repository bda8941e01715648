"""The neuron: what the federation sees of the processor and can order from it.

    neuron run examples.python_processor:neuron

Settings beside the SDK's own: PROCESSOR_HOST (127.0.0.1) and PROCESSOR_PORT (8000) for the HTTP
API, and DATABASE_URL, which is watched as a dependency if it is set.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import asdict
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec

from neuron_sdk import ApiEndpoint, CommandContext, CommandFailed, DependencyState, Neuron, checks

from .processing import Normalize, ProcessingError, Request
from .processor import Processor
from .sources import read_pages
from .web import PATH, WebServer

HOST = os.environ.get("PROCESSOR_HOST", "127.0.0.1")
PORT = int(os.environ.get("PROCESSOR_PORT", "8000"))
DATABASE_URL = os.environ.get("DATABASE_URL", "")

PLENTY_OF_SPACE = 1024**3  # bytes
TOO_LITTLE_SPACE = 64 * 1024**2

neuron = Neuron(
    os.environ.get("NEURON_ID", "python-processor-001"),
    type=os.environ.get("NEURON_TYPE", "data-processor"),
    version="1.0.0",
    base_url=f"http://{HOST}:{PORT}",
    api_endpoints=[ApiEndpoint(PATH, "POST", "Normalizes, aggregates or filters records")],
    capabilities=["data_processing", "normalize", "aggregate", "filter"],
    labels={"example": "python-processor"},
)
processor = Processor(neuron)


# ---- commands


@neuron.command("run_task")
async def run_task(
    ctx: CommandContext,
    input_source: Annotated[str, msgspec.Meta(min_length=1, max_length=256)],
    limit: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 100,
) -> dict[str, Any]:
    """Normalizes the first records of a source, page by page."""
    ctx.log.info("reading", input_source=input_source, limit=limit)
    done = 0
    async for page in read_pages(input_source, limit):
        # Calculating would block the event loop, so a thread does it. Every await is a place
        # where the command can be cancelled.
        result = await asyncio.to_thread(processor.run, Normalize(records=page, fields=["price"]))
        done += result.input_records
        await ctx.progress(done / limit, f"{done} of {limit} records")
    neuron.event("task_finished", f"{done} records of {input_source}", records=done)
    return {"input_source": input_source, "processed_records": done}


@neuron.command("process_batch")
def process_batch(
    ctx: CommandContext,
    requests: Annotated[list[Request], msgspec.Meta(min_length=1, max_length=100)],
    include_records: bool = False,
) -> dict[str, Any] | None:
    """Carries out many requests, each as POST /data/process takes it."""
    # No coroutine: the SDK runs it in a thread of its own, so it may calculate as long as it likes.
    results: list[dict[str, Any]] = []
    for index, request in enumerate(requests):
        if ctx.cancelled:
            return None  # given up: the command ends as CANCELLED
        try:
            result = processor.run(request)
        except ProcessingError as error:
            raise CommandFailed("CANNOT_PROCESS", str(error), {"index": index}) from None
        results.append(msgspec.to_builtins(result))
        if not include_records:
            del results[-1]["records"]
        ctx.progress_sync((index + 1) / len(requests), f"{index + 1} of {len(requests)} requests")
    return {"results": results}


@neuron.command("get_statistics")
async def get_statistics() -> dict[str, Any]:
    """Tells what the processor has done since it started."""
    return asdict(processor.statistics())


@neuron.command("clear_cache")
async def clear_cache() -> dict[str, int]:
    """Forgets all cached results."""
    removed = processor.clear_cache()
    neuron.event("cache_cleared", f"{removed} results forgotten", removed=removed)
    return {"removed": removed}


# ---- what the service needs


@neuron.dependency("federation", required=False)
async def federation_answers() -> None:
    """The service works without the federation, so this one is not required."""
    await _accepts_connections(f"grpc://{neuron.settings().target}", 50_051)


@neuron.dependency("disk_space", interval=60)
def disk_space() -> DependencyState:
    """Room for the neuron's own state and for whatever shares its disk."""
    free = shutil.disk_usage(neuron.settings().state_dir).free
    if free < TOO_LITTLE_SPACE:
        raise OSError(f"only {free} bytes free")
    return DependencyState.UP if free >= PLENTY_OF_SPACE else DependencyState.DEGRADED


if DATABASE_URL:

    @neuron.dependency("database")
    async def database_answers() -> None:
        """Stands for a real query, which would need a driver."""
        await _accepts_connections(DATABASE_URL, 5432)


async def _accepts_connections(url: str, default_port: int) -> None:
    address = urlsplit(url)
    if not address.hostname:
        raise ValueError("the URL names no host")
    await checks.tcp(address.hostname, address.port or default_port)()


# ---- the service's own work


@neuron.worker
async def web() -> None:
    """Serves the HTTP API until the neuron stops. If the port is taken, the SDK tries again."""
    server = WebServer(HOST, PORT, processor.answer)
    server.start()
    neuron.event("web_started", f"POST {PATH} on port {server.port}", port=server.port)
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.to_thread(server.stop)
