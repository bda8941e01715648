"""A small disk that can be filled, and a PostgreSQL that keeps a part of its data on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg

from federation_server.store.embedded import SUPERUSER
from tests.support.faults import Postgres
from tests.support.postgres import libpq

BLOCK = bytes(64 * 1024)


class SmallDisk:
    """A file system of its own, in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Leaves no room on it, for whoever writes meanwhile as well."""
        with suppress(OSError), self._ballast.open("ab", buffering=0) as ballast:
            while ballast.write(BLOCK):  # a last piece may be written in part
                pass

    def free(self) -> None:
        """Gives back what `fill` took."""
        self._ballast.unlink()


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[SmallDisk]:
    """Mounts one at that folder for the block.

    Raises:
        OSError: this system has no such file system, or mounting is not allowed here.
    """
    if sys.platform != "linux":
        raise OSError("there is no tmpfs here")
    folder.mkdir()
    options = f"size={megabytes}m,mode=0711"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip())
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def mountable() -> bool:
    """Whether a small disk can be had here: it takes Linux, and root."""
    with TemporaryDirectory() as folder, suppress(OSError), small_disk(Path(folder) / "d", 1):
        return True
    return False


def move_tables(postgres: Postgres, disk: SmallDisk) -> None:
    """Puts every table and index of the federation on the disk, and leaves the WAL where it is."""
    place = disk.folder / "tables"
    cluster = Path(postgres.ask("SHOW data_directory"))
    place.mkdir(mode=0o700)
    os.chown(place, cluster.stat().st_uid, cluster.stat().st_gid)
    admin = libpq(postgres.embedded.url("postgres", user=SUPERUSER))
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"CREATE TABLESPACE small LOCATION '{place}'".encode())
        connection.execute(b"ALTER DATABASE federation SET TABLESPACE small")


def move_wal(postgres: Postgres, disk: SmallDisk) -> None:
    """Puts the WAL on the disk, and leaves the tables where they are."""
    wal = Path(postgres.ask("SHOW data_directory")) / "pg_wal"
    postgres.embedded.stop()
    subprocess.run(["cp", "-a", str(wal), str(disk.folder / "wal")], check=True)
    wal.rename(wal.with_name("pg_wal.before"))
    wal.symlink_to(disk.folder / "wal")
    postgres.start()
