"""The systems that `commands.py` compares, each started with what it needs and stopped again.

The federation is `federation up` as it comes, and the real SDK's neuron. Celery and the REST server
run in .venv-bench; Redis is `redis-server` from PATH, on its own defaults or told to write each
command to the disk; the REST server's PostgreSQL is the federation's embedded one, set up alike.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks import fleet
from benchmarks.processes import ROOT, Served, cpu_s, federation, free_ports, started
from federation_server.store.embedded import SUPERUSER, EmbeddedPostgres

PYTHON = ROOT / ".venv-bench" / "bin" / "python"

ALWAYS = ("--appendonly", "yes", "--appendfsync", "always", "--save", "")


@dataclass(frozen=True, slots=True)
class Contender:
    """A system that is ready for jobs."""

    client: Sequence[str]
    """The command of its client, without the options that all clients have."""
    server_cpu_s: Callable[[], float]
    """Processor time of its server and its database so far."""
    worker_cpu_s: Callable[[], float]
    """Processor time of what does the jobs so far."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """The client's."""


def why_no_celery() -> str:
    """Why Celery cannot be measured here; empty if it can."""
    if shutil.which("redis-server") is None:
        return "there is no redis-server on PATH (Debian: apt install redis-server)"
    return why_no_rest()


def why_no_rest() -> str:
    """Why the REST server cannot be measured here; empty if it can."""
    return "" if PYTHON.exists() else "there is no .venv-bench (make bench makes it)"


def federation_contender(
    served: Served,
    neurons: int,
    worker_cpu_s: Callable[[], float],
    *,
    client: str = "federation_client",
) -> Contender:
    """The federation, its jobs spread over so many of the swarm's neurons; 0: over the real one."""
    return Contender(
        [sys.executable, "-m", f"benchmarks.{client}", served.address, str(neurons)],
        lambda: served.cpu_s() + served.database_cpu_s(),
        worker_cpu_s,
        {"ADMIN_API_KEY": served.admin_key},
    )


@contextmanager
def neuron_and_federation() -> Iterator[tuple[Served, psutil.Process]]:
    """`federation up`, and one real neuron connected to it."""
    with (
        _folder() as folder,
        federation(FEDERATION_LOG_LEVEL="INFO") as served,
        started(
            [sys.executable, "-m", "benchmarks.neuron"],
            folder / "log",
            ready="session.opened",
            FEDERATION_URL=served.address,
            ENROLLMENT_TOKEN=asyncio.run(fleet.enrollment_token(served)),
            STATE_DIR=str(folder / "state"),
            METRICS_PORT="0",
        ) as neuron,
    ):
        yield served, neuron


@contextmanager
def celery(*, durable: bool) -> Iterator[Contender]:
    """Celery with Redis: both as they come; or nothing is lost with a worker or with the power."""
    port, _ = free_ports()
    environment = {"REDIS_URL": f"redis://127.0.0.1:{port}/0", "DURABLE": "1" if durable else ""}
    redis = ["redis-server", "--port", str(port), "--bind", "127.0.0.1"]
    app = "benchmarks.baselines.celery_app"
    with (
        _folder() as folder,
        started(
            [*redis, "--dir", str(folder), *(ALWAYS if durable else ())],
            folder / "redis.log",
            ready="Ready to accept connections",
        ) as server,
        started(
            [str(PYTHON), "-m", "celery", "-A", app, "worker"],
            folder / "celery.log",
            **environment,
        ) as worker,
    ):
        yield Contender(
            [str(PYTHON), "-m", "benchmarks.baselines.celery_client"],
            lambda: cpu_s(server),
            lambda: cpu_s(worker),
            environment,
        )


@contextmanager
def uvicorn(app: str, *options: str) -> Iterator[tuple[str, psutil.Process, EmbeddedPostgres]]:
    """An application of baselines/ on uvicorn; gives its URL, its process and its PostgreSQL."""
    port, _ = free_ports()
    server = [str(PYTHON), "-m", "uvicorn", f"benchmarks.baselines.{app}:app"]
    with _folder() as folder:
        postgres = EmbeddedPostgres(folder)
        postgres.start()
        try:
            with started(
                [*server, "--port", str(port), "--no-access-log", *options],
                folder / "rest.log",
                ready="Uvicorn running",
                DSN=postgres.dsn("postgres", user=SUPERUSER),
                SQLALCHEMY_URL=postgres.url("postgres", user=SUPERUSER),
            ) as process:
                yield f"http://127.0.0.1:{port}", process, postgres
        finally:
            postgres.stop()


@contextmanager
def rest_server() -> Iterator[tuple[str, Callable[[], float]]]:
    """FastAPI on uvicorn and PostgreSQL; gives its URL and the processor time of both."""
    with uvicorn("rest_server") as (url, server, postgres):
        database = psutil.Process(postgres.pid)
        yield url, lambda: cpu_s(server) + cpu_s(database)


@contextmanager
def rest(url: str, server_cpu_s: Callable[[], float], workers: int) -> Iterator[Contender]:
    """That many polling workers on a REST server."""
    module = "benchmarks.baselines"
    with (
        _folder() as folder,
        started(
            [str(PYTHON), "-m", f"{module}.rest_workers", url, "--count", str(workers)],
            folder / "log",
            ready="ready",
        ) as process,
    ):
        client = [str(PYTHON), "-m", f"{module}.rest_client", url, "--workers", str(workers)]
        yield Contender(client, server_cpu_s, lambda: cpu_s(process))


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder that PostgreSQL's user may pass through."""
    with tempfile.TemporaryDirectory(prefix="fed-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
