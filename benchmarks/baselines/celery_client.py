"""Celery's client in `commands.py`: `delay` and `get`, one after the other or all at once.

With `--in-flight` above 1 every job is sent first and the results are taken as they come, which is
Celery's own way (`group`) and its fastest; the milliseconds of each are not taken then.
"""

from __future__ import annotations

import time

from celery.result import ResultSet

from benchmarks import client
from benchmarks.baselines.celery_app import task

TIMEOUT_S = 60.0


def one_by_one(jobs: int) -> list[float]:
    """Each job when the result of the one before has been seen."""
    taken_ms = []
    for number in range(jobs):
        began = time.perf_counter()
        answer = task.delay(number).get(timeout=TIMEOUT_S)
        taken_ms.append((time.perf_counter() - began) * 1000)
        if answer != {"n": number}:
            raise RuntimeError(f"job {number} ended as {answer}")
    return taken_ms


def all_at_once(jobs: int) -> None:
    """Every job, and then every result."""
    sent = ResultSet([task.delay(number) for number in range(jobs)])
    answers = sent.join_native(timeout=TIMEOUT_S)
    if answers != [{"n": number} for number in range(jobs)]:
        raise RuntimeError("a job did not give its number back")


def main() -> None:
    """Runs one client."""
    arguments = client.parser(__doc__).parse_args()
    one_by_one(arguments.warm_up)
    print("go", flush=True)
    began = time.perf_counter()
    taken_ms: list[float] = []
    if arguments.in_flight == 1:
        taken_ms = one_by_one(arguments.jobs)
    else:
        all_at_once(arguments.jobs)
    client.report(arguments.jobs, time.perf_counter() - began, taken_ms)


if __name__ == "__main__":
    main()
