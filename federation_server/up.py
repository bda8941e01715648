"""`federation up`, `serve` and `migrate`: the processes around the server.

`up` brings everything along: an embedded PostgreSQL unless DATABASE_URL names another, the
schema, the first admin key, an enrollment token, the server, and a demo neuron as a process of
its own. What it starts ends with it, however it ends (`store/embedded/launch.py`).
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from federation_server import banner
from federation_server.app import App, StartError, certificates_of, stop_signal
from federation_server.console.trust import Trust
from federation_server.domain.access import Role, secret_hash
from federation_server.domain.audit import SERVER, Entry, fit
from federation_server.live.descriptors import raise_limit
from federation_server.live.metrics import Metrics
from federation_server.settings import Settings
from federation_server.store import access, audit, enrollment, partitions, schema_version
from federation_server.store import migrate as schema
from federation_server.store.database import (
    Database,
    DatabaseRefuses,
    DatabaseUrlError,
    parse_url,
    role_of,
)
from federation_server.store.embedded import EmbeddedPostgres, EmbeddedPostgresError
from federation_server.store.embedded.home import Account
from federation_server.store.embedded.process import Child, Watch, environment_of_others
from federation_server.store.enrollment import NewEnrollmentToken

log = structlog.get_logger(__name__)

MENDABLE = (
    StartError,
    schema_version.SchemaMismatch,
    schema.MayNotMigrate,
    DatabaseUrlError,
    DatabaseRefuses,
    EmbeddedPostgresError,
)
"""What keeps a server from starting and a person can mend: the message says how."""

DEMO_NEURON = "demo-neuron"
DEMO_TOKEN_TTL = timedelta(hours=24)
DEMO_STOP_WITHIN_S = 15.0
RESTART_INTERVAL_S = 1.0
MIGRATE_WITHIN_S = 60.0
"""How long `migrate` waits for PostgreSQL; a server waits as long as it takes."""

MIGRATION_URL = "FEDERATION_MIGRATION_URL"


async def up(settings: Settings, *, demo: bool) -> None:
    """Runs everything until a signal comes."""
    _check_port(settings)
    raise_limit()
    async with stop_signal() as stop, _postgres(settings, stop) as url:
        database = Database(url)
        await _until(stop, database.wait_until_ready())
        if stop.is_set():
            return
        if await schema_version.read(database) != schema_version.HEAD:
            await _upgrade(settings, url)
        key = await _seed_admin_key(settings, database)
        async with App(settings, database).running() as port:
            _spare_the_collector()
            settings = settings.model_copy(update={"port": port})
            token = await _enrollment_token(database)
            demo = demo and _lets_demo_in(settings)
            banner.show(
                settings,
                admin_key=key,
                lost_key="" if key else await _lost_key(settings, database),
                enrollment_token=token,
                demo=DEMO_NEURON if demo else None,
                trust=local_trust(settings),
            )
            keeper = asyncio.create_task(_keep_demo(settings, token)) if demo else None
            await stop.wait()
            if keeper is not None:
                keeper.cancel()
                await asyncio.gather(keeper, return_exceptions=True)


async def serve(settings: Settings) -> None:
    """Runs one server until a signal comes.

    Raises:
        StartError: DATABASE_URL is not set, or the port cannot be served as the settings say.
        SchemaMismatch: the schema is not this server's.
    """
    _check_port(settings)
    raise_limit()
    database = Database(_database_url(settings))
    async with stop_signal() as stop:
        await _until(stop, database.wait_until_ready())
        if stop.is_set():
            return
        await schema_version.check(database)
        key = await _seed_admin_key(settings, database)
        if key is not None:
            banner.show_admin_key(settings, key)
        async with App(settings, database).running():
            _spare_the_collector()
            await stop.wait()


def _check_port(settings: Settings) -> None:
    """Says what is wrong with the gRPC port's settings before anything else is started.

    Raises:
        StartError: it cannot be served as they say.
    """
    certificates_of(settings, Metrics())


def local_trust(settings: Settings) -> Trust:
    """What clients on this machine connect with: what its environment names, else they trust the
    server's own certificate.
    """
    if settings.tls is None:
        return Trust()
    named = Trust.from_environment()
    own = str(settings.tls.certificate.absolute())
    return Trust(named.ca_file or own, named.cert_file, named.key_file)


def _lets_demo_in(settings: Settings) -> bool:
    """Whether the demo neuron has a certificate, if it needs one; says so if not."""
    if settings.tls_client_ca_file is None or local_trust(settings).has_certificate:
        return True
    log.warning(
        "no demo neuron: clients need a certificate here; set FEDERATION_CLIENT_CERT_FILE and"
        " FEDERATION_CLIENT_KEY_FILE (`federation tls init --client demo` makes both)",
        action="demo_without_certificate",
    )
    return False


def _spare_the_collector() -> None:
    """What a server starts with stays as long as it does, and is most of what the garbage collector
    would look at again and again, for tens of milliseconds each time.
    """
    gc.collect()
    gc.freeze()


async def migrate(settings: Settings) -> None:
    """Brings the schema up to date; with no DATABASE_URL the embedded PostgreSQL's.

    Raises:
        DatabaseRefuses: PostgreSQL lets nobody in, or has not answered for a minute.
    """
    async with stop_signal() as stop, _postgres(settings, stop) as url:
        other = _migration_url(settings)
        database = Database(other, setting=MIGRATION_URL) if other else Database(url)
        await _until(stop, database.wait_until_ready(MIGRATE_WITHIN_S))
        if not stop.is_set():
            await _upgrade(settings, url)
            log.info("the schema is up to date", action="schema_upgraded")


async def _upgrade(settings: Settings, url: str) -> None:
    """Brings the schema of `url` up to date, which is its role's whoever does it."""
    migration_url = _migration_url(settings)
    if migration_url is None:
        await asyncio.to_thread(schema.upgrade, url)
    else:
        await asyncio.to_thread(schema.upgrade, migration_url, role=role_of(url))


def _migration_url(settings: Settings) -> str | None:
    if settings.migration_url is None:
        return None
    if settings.database_url is None:
        raise StartError(f"{MIGRATION_URL} is set and DATABASE_URL is not: set both, or neither")
    url = settings.migration_url.get_secret_value()
    parse_url(url, MIGRATION_URL)
    return url


def _database_url(settings: Settings) -> str:
    if settings.database_url is None:
        raise StartError(
            "DATABASE_URL is not set: set it to postgresql://USER:PASSWORD@HOST:PORT/DATABASE,"
            " or run `federation up`, which brings a PostgreSQL along"
        )
    return settings.database_url.get_secret_value()


async def _until(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Does the work, or gives it up when `stop` is set."""
    working = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    done, pending = await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()


@asynccontextmanager
async def _postgres(settings: Settings, stop: asyncio.Event) -> AsyncIterator[str]:
    """The URL of the PostgreSQL to use: the one that DATABASE_URL names, or an embedded one that
    runs within the block and is started again if it dies.
    """
    if settings.database_url is not None:
        yield settings.database_url.get_secret_value()
        return
    embedded = EmbeddedPostgres(settings.data_dir)
    url = await asyncio.to_thread(embedded.start)
    keeper = asyncio.create_task(_keep_postgres(embedded, stop), name="postgres keeper")
    try:
        yield url
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        await asyncio.to_thread(embedded.stop)


async def _keep_postgres(embedded: EmbeddedPostgres, stop: asyncio.Event) -> None:
    """Starts PostgreSQL again whenever it has died."""
    while not stop.is_set():
        status = await embedded.exited()
        log.error("PostgreSQL died, starting it again", action="postgres_died", status=status)
        await asyncio.sleep(RESTART_INTERVAL_S)
        try:
            await asyncio.to_thread(embedded.start)
        except EmbeddedPostgresError as error:
            log.error("PostgreSQL does not start", action="postgres_failed", reason=str(error))


_SEEDED_NAMES = {
    access.AdminKeySeed.GENERATED: access.GENERATED_KEY_NAME,
    access.AdminKeySeed.ADDED: access.CONFIGURED_KEY_NAME,
    access.AdminKeySeed.REPLACED: access.CONFIGURED_KEY_NAME,
}
"""The key that a start has made or changed."""


async def _record_seed(connection: AsyncConnection, seed: access.AdminKeySeed) -> None:
    """Puts into the audit log what a start does to the keys of role ADMIN."""
    made = Entry(
        actor=SERVER,
        object_type="api_key",
        object_id=_SEEDED_NAMES[seed],
        before={} if seed is access.AdminKeySeed.REPLACED else None,
        after={"role": Role.ADMIN.name, "how": seed.value.lower()},
    )
    await audit.record(connection, made)


async def _seed_admin_key(settings: Settings, database: Database) -> str | None:
    """Makes the first admin key, and keeps it where its owner alone can read it; gives it if it
    was made now.
    """
    configured = settings.admin_api_key.get_secret_value() if settings.admin_api_key else None
    async with await database.connect("start") as own:
        await partitions.ensure_ahead(own)  # the audit log's among them
    try:
        async with database.begin() as connection:
            seeded = await access.seed_admin_key(connection, configured)
            if seeded.seed is not access.AdminKeySeed.KEPT:
                await _record_seed(connection, seeded.seed)
            if seeded.secret is not None:
                # Within the transaction: a key that could not be kept must not exist.
                _write_secret(settings.admin_key_file, seeded.secret)
    except access.AdminKeyUnusable as error:
        raise StartError(str(error)) from None
    except OSError as error:
        raise StartError(
            f"the admin key cannot be kept in {settings.admin_key_file} ({error.strerror}):"
            " make the folder writable, name another with FEDERATION_DATA_DIR,"
            " or set ADMIN_API_KEY"
        ) from None
    return seeded.secret


async def _lost_key(settings: Settings, database: Database) -> str:
    """Why the file of the admin key is of no use; "" if it is of use, or of none by right."""
    if settings.admin_api_key is not None:
        return ""
    try:
        kept = secret_hash(settings.admin_key_file.read_text("ascii", "replace").strip())
    except OSError as error:
        return f"not to be read ({error.strerror})"
    async with database.begin() as connection:
        found = (await access.find_api_keys(connection, [kept])).get(kept)
    if found is None:
        return "none that this federation knows (any more)"
    return "expired" if found.expired else ""


def _write_secret(path: Path, secret: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():  # of another database, perhaps: not ours to lose
        path.replace(path.with_suffix(".key.old"))
    with open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(secret + "\n")


async def _enrollment_token(database: Database) -> str:
    """A fresh token for the demo neuron and for whoever reads the banner."""
    wanted = NewEnrollmentToken(
        creator="federation up",
        description="made at the start",
        ttl=DEMO_TOKEN_TTL,
        allow_reenrollment=True,
    )
    async with database.begin() as connection:
        created = await enrollment.create(connection, wanted)
        made = Entry(
            actor=SERVER,
            object_type="enrollment_token",
            object_id=created.token.enrollment_token_id,
            after=fit(created.token.audited),
        )
        await audit.record(connection, made)
    return created.secret


async def _keep_demo(settings: Settings, token: str) -> None:
    """Runs the demo neuron, and starts it again when it ends."""
    while True:
        child = _start_demo(settings, token)  # at once: a stop must not come in between
        try:
            status = await asyncio.wrap_future(child.exit)
        finally:
            await asyncio.shield(asyncio.to_thread(_stop_demo, child))
        log.warning("the demo neuron ended", action="demo_ended", status=status)
        await asyncio.sleep(RESTART_INTERVAL_S)


def _start_demo(settings: Settings, token: str) -> Child:
    return Child(
        [sys.executable, "-m", "neuron_sdk.cli", "run", "neuron_sdk.demo:neuron"],
        account=Account(os.geteuid(), os.getegid()),
        watch=Watch.best(),
        output=sys.stderr.fileno(),
        environment=_demo_environment(settings, token),
    )


def _demo_environment(settings: Settings, token: str) -> Mapping[str, str]:
    return environment_of_others() | {
        **local_trust(settings).environment(),
        "FEDERATION_URL": settings.local_url,
        "NEURON_ID": DEMO_NEURON,
        "ENROLLMENT_TOKEN": token,
        "STATE_DIR": str(settings.data_dir / DEMO_NEURON),
        "HEARTBEAT_INTERVAL": "5",
        "ANALYTICS_INTERVAL": "15",
        "METRICS_PORT": "0",
        "LOG_LEVEL": "WARNING",
    }


def _stop_demo(child: Child) -> None:
    """SIGTERM, and SIGKILL for one that does not listen."""
    child.signal(signal.SIGTERM)
    try:
        child.wait(DEMO_STOP_WITHIN_S)
    except TimeoutError:
        child.signal(signal.SIGKILL)
        child.wait()
