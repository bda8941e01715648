"""The cluster on the disk: made once and whole, and what earlier runs have left in it.

The callers hold the lock on the data folder, so whatever process still works on the data outlived
the one that should have stopped it.
"""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from federation_server.store.embedded.errors import DataDirectoryUnusable
from federation_server.store.embedded.home import UNFINISHED, Account, Home, hand_over
from federation_server.store.embedded.programs import Programs
from federation_server.store.embedded.role import SUPERUSER

INITIAL_SETTINGS = {
    "max_connections": "100",
    "shared_buffers": "64MB",
    "max_wal_size": "512MB",
    "log_line_prefix": "%m [%p] ",
    # Each of these would keep idle processes for nothing we use.
    "io_method": "sync",
    "max_logical_replication_workers": "0",
}
"""Written to postgresql.conf with the cluster; from then on the owner may edit that file."""

SOCKET_LOCK = ".s.PGSQL.5432.lock"


def make_cluster(
    home: Home,
    programs: Programs,
    account: Account,
    run: Callable[[Sequence[str | Path]], None],
    *,
    durable: bool,
) -> None:
    """Make the cluster under another name, and rename it when it is whole (and on the disk).

    `run` runs a command as `account` and raises when it fails.
    """
    unfinished = home.cluster.with_name(f"data-{os.getpid()}{UNFINISHED}")
    unfinished.mkdir(mode=0o700)
    hand_over(unfinished, account)
    initdb: list[str | Path] = [programs.initdb, "-D", unfinished, "--no-sync", "--data-checksums"]
    encoding = ["--encoding=UTF8", "--locale=C"]
    collation = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    # Whoever can enter the socket's folder is the owner: there is nothing for a password to add.
    access = [f"--username={SUPERUSER}", "--auth-local=trust", "--auth-host=reject"]
    settings = [f"--set={name}={value}" for name, value in INITIAL_SETTINGS.items()]
    run([*initdb, *encoding, *collation, *access, *settings])
    if durable:
        run([programs.initdb, "-D", unfinished, "--sync-only"])
    unfinished.rename(home.cluster)


def check_version(home: Home, programs: Programs) -> None:
    """Raise DataDirectoryUnusable if another major version of PostgreSQL made the cluster."""
    theirs = (home.cluster / "PG_VERSION").read_text().strip()
    if theirs != programs.major_version:
        raise DataDirectoryUnusable(
            home.data_dir,
            f"its data is PostgreSQL {theirs}'s, and this is PostgreSQL {programs.major_version}",
            "dump it with the release that made it and restore it into an empty folder",
        )


def postmaster(home: Home) -> tuple[int | None, str]:
    """The postmaster's process id and state, as PostgreSQL writes them for its own pg_ctl."""
    lines = _lines_of(home.cluster / "postmaster.pid")
    return _process_in(lines), lines[7].strip() if len(lines) > 7 else ""


def retire_predecessor(home: Home) -> None:
    """Deal with what an earlier run, whose starter was killed, has left.

    A server that outlived its starter is asked to stop. A lock file that names some other program's
    process (ids begin at 1 again in each container) is removed, or PostgreSQL would believe it for
    ever. One that names no process is left to PostgreSQL, which sees through it.
    """
    for lock_file in (home.cluster / "postmaster.pid", home.socket_folder / SOCKET_LOCK):
        pid = _process_in(_lines_of(lock_file))
        if pid is None:
            continue
        try:
            process = psutil.Process(pid)
            if process.name() == "postgres" and Path(process.cwd()) == home.cluster:
                process.send_signal(signal.SIGINT)
            else:
                lock_file.unlink(missing_ok=True)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def _lines_of(lock_file: Path) -> list[str]:
    """A lock file of PostgreSQL's, which may come and go at any moment."""
    try:
        return lock_file.read_text().splitlines()
    except FileNotFoundError:
        return []


def _process_in(lines: list[str]) -> int | None:
    """The process id in the first line of a lock file (negative: no postmaster)."""
    return int(lines[0]) if lines and lines[0].isdigit() else None
