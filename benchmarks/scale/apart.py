"""A server beside its PostgreSQL, so that one can end or stand still and the other does not."""

from __future__ import annotations

import dataclasses
import secrets
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg

from benchmarks.processes import Served, free_ports, start
from benchmarks.scale.returning import METRIC
from federation_server.store.embedded import EmbeddedPostgres

_BOOKS = """
SELECT count(*), coalesce(sum(value), 0), count(DISTINCT (series_id, value))
FROM metric_points JOIN metric_series USING (series_id) WHERE name = %s
"""


@dataclass(frozen=True, slots=True)
class Books:
    """What PostgreSQL has of the neurons' counters."""

    points: int
    sum: int
    distinct: int
    """Points whose value is the only one of its kind in its neuron's series."""

    def compared(self, reports: int, sent_sum: int) -> dict[str, object]:
        """With what the neurons have made."""
        return {
            "reports made": reports,
            "reports lost": reports - self.distinct,
            "reports doubled": self.points - self.distinct,
            "sum sent": sent_sum,
            "sum stored": self.sum,
        }


class Apart:
    """The two, and what can be done to each."""

    def __init__(self, folder: Path) -> None:
        """Starts both."""
        self._folder = folder
        self._ports = free_ports()
        self._key = secrets.token_urlsafe(32)
        self._postgres = EmbeddedPostgres(folder / "postgres")
        self._server: subprocess.Popen[str] | None = None
        self._postgres.start()
        self.served = self.start()

    def start(self) -> Served:
        """Starts the server, at the same ports each time."""
        self._server, served = start(
            self._folder,
            self._ports,
            {"DATABASE_URL": self._postgres.url(), "ADMIN_API_KEY": self._key},
        )
        self.served = dataclasses.replace(served, database=psutil.Process(self._postgres.pid))
        return self.served

    def end(self, how: signal.Signals) -> None:
        """Ends the server by a signal, and waits until it is gone."""
        assert self._server is not None
        self._server.send_signal(how)
        self._server.wait(60)

    @contextmanager
    def postgres_standing_still(self) -> Iterator[None]:
        """Stops every process of PostgreSQL within the block, by SIGSTOP."""
        master = psutil.Process(self._postgres.pid)
        stopped = [master]
        master.suspend()  # the first, so that it starts no other
        try:
            for child in master.children(recursive=True):
                child.suspend()
                stopped.append(child)
            yield
        finally:
            for process in reversed(stopped):
                process.resume()

    def books(self) -> Books:
        """Counts and adds up what is stored."""
        with psycopg.connect(self._postgres.dsn()) as connection:
            row = connection.execute(_BOOKS, (METRIC,)).fetchone()
        assert row is not None
        return Books(row[0], int(row[1]), row[2])

    def close(self) -> None:
        """Ends both."""
        if self._server is not None and self._server.poll() is None:
            self.end(signal.SIGTERM)
        self._postgres.stop()


@contextmanager
def apart() -> Iterator[Apart]:
    """A server and a PostgreSQL on no data."""
    with tempfile.TemporaryDirectory(prefix="fed-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as another user where we are root
        both = Apart(folder)
        try:
            yield both
        finally:
            both.close()
