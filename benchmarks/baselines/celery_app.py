"""Celery's side of the same job: a task that does nothing, on a Redis that REDIS_URL names.

Celery's defaults, unless DURABLE is set: then a task is acknowledged when it has run, as in the
federation, and is not lost with its worker.
"""

from __future__ import annotations

import os

from celery import Celery

URL = os.environ["REDIS_URL"]
DURABLE = bool(os.environ.get("DURABLE"))

app = Celery("bench", broker=URL, backend=URL)
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_acks_late=DURABLE,
    task_reject_on_worker_lost=DURABLE,
)


def bench(n: int) -> dict[str, int]:
    """Gives back its number."""
    return {"n": n}


task = app.task(name="bench")(bench)
