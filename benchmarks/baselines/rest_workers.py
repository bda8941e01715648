"""Many workers in one process that poll `rest_server.py` each second.

    python -m benchmarks.baselines.rest_workers URL --count 1000

A worker that has got something asks again at once; else it waits for its next second.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from typing import Any

import aiohttp

POLL_S = 1.0


async def work(session: Any, name: str) -> None:
    """One worker."""
    loop = asyncio.get_running_loop()
    due = loop.time() + random.uniform(0, POLL_S)
    while True:
        await asyncio.sleep(max(0.0, due - loop.time()))
        async with session.post(f"/workers/{name}/claim") as answer:
            jobs = await answer.json()
        for job in jobs:
            result = {"response": {"n": job["data"]["n"]}}
            async with session.post(f"/jobs/{job['job_id']}/result", json=result) as answer:
                answer.raise_for_status()
        if not jobs:
            due = max(due + POLL_S, loop.time())


async def main() -> None:
    """Runs the workers until it is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--count", type=int, default=1)
    arguments = parser.parse_args()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=60)
    async with (
        aiohttp.ClientSession(arguments.url, connector=connector, timeout=timeout) as session,
        asyncio.TaskGroup() as group,
    ):
        print("ready", flush=True)
        for number in range(arguments.count):
            group.create_task(work(session, f"bench-{number:05d}"))


if __name__ == "__main__":
    asyncio.run(main())
