"""The REST client in `commands.py`: posts a job, and asks for it until it is done."""

from __future__ import annotations

import asyncio

import aiohttp

from benchmarks import client


async def main() -> None:
    """Runs one client."""
    parser = client.parser(__doc__)
    parser.add_argument("url")
    parser.add_argument("--workers", type=int, default=1, help="each job goes to the next of them")
    parser.add_argument("--look", type=float, default=0.05, help="seconds between two questions")
    arguments = parser.parse_args()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(
        arguments.url, connector=connector, timeout=timeout
    ) as session:

        async def job(number: int) -> None:
            new = {"worker": f"bench-{number % arguments.workers:05d}", "data": {"n": number}}
            async with session.post("/jobs", json=new) as answer:
                job_id = (await answer.json())["job_id"]
            while True:
                await asyncio.sleep(arguments.look)
                async with session.get(f"/jobs/{job_id}") as answer:
                    seen = await answer.json()
                if seen["state"] == "DONE":
                    break
            if seen["response"] != {"n": number}:
                raise RuntimeError(f"job {number} ended as {seen}")

        await client.closed_loop(job, arguments)


if __name__ == "__main__":
    asyncio.run(main())
