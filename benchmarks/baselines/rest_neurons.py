"""Many neurons in one process that POST their heartbeats to `rest_heartbeats.py`.

    python -m benchmarks.baselines.rest_neurons URL --heartbeat FILE --count 1000 --interval 5

Each has a connection of its own, which it keeps, and one request under way at the most. It prints
`ready` and begins; a line on standard input is answered with its counts as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp


async def beat(
    session: Any, path: str, heartbeat: dict[str, Any], interval_s: float, counts: Counter[str]
) -> None:
    """One neuron."""
    loop = asyncio.get_running_loop()
    due = loop.time() + random.uniform(0, interval_s)
    requests = heartbeat["application"]["requests"]
    while True:
        await asyncio.sleep(max(0.0, due - loop.time()))
        due = max(due + interval_s, loop.time())
        requests += 1
        application = heartbeat["application"] | {"requests": requests}
        try:
            async with session.post(path, json=heartbeat | {"application": application}) as answer:
                answer.raise_for_status()
            counts["heartbeats"] += 1
        except (aiohttp.ClientError, TimeoutError):
            counts["failed"] += 1


async def main(arguments: argparse.Namespace, heartbeat: dict[str, Any]) -> None:
    """Runs the neurons until standard input ends."""
    counts: Counter[str] = Counter(heartbeats=0, failed=0)
    tasks = []
    sessions = []
    for number in range(arguments.first, arguments.first + arguments.count):
        connector = aiohttp.TCPConnector(limit=1, keepalive_timeout=75)
        session = aiohttp.ClientSession(arguments.url, connector=connector)
        sessions.append(session)
        path = f"/neurons/bench-{number:05d}/heartbeats"
        work = beat(session, path, heartbeat, arguments.interval, counts)
        tasks.append(asyncio.create_task(work))
    print("ready", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(counts), flush=True)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for session in sessions:
        await session.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--heartbeat", required=True, help="a JSON file")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between heartbeats")
    arguments = parser.parse_args()
    asyncio.run(main(arguments, json.loads(Path(arguments.heartbeat).read_text())))
