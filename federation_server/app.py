"""The composition root: builds a server, starts it, drains it, stops it.

Everything that runs is a named task of one TaskGroup: if one dies the server stops, because a
server without its writer or its sweeper only looks alive. The order of the end is the reverse of
the beginning: no new calls, streams sent home, what is read written, then the tasks, then the
database.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import grpc.aio
import structlog

from federation_server import __version__
from federation_server.domain.access import EnrollmentMode, TokenLifetime
from federation_server.domain.command import IN_FLIGHT_STATES
from federation_server.domain.neuron import Presence
from federation_server.live.admission import Admission
from federation_server.live.approvals import Approvals
from federation_server.live.certificates import Certificates, CertificateUnusable
from federation_server.live.descriptors import Descriptors
from federation_server.live.dispatcher import Dispatcher
from federation_server.live.doubt import SelfDoubt
from federation_server.live.housekeeping import Housekeeping
from federation_server.live.issuer import Issuer
from federation_server.live.key_uses import KeyUses
from federation_server.live.lease import Lease
from federation_server.live.metrics import Metrics
from federation_server.live.metrics_port import MetricsPort
from federation_server.live.notifier import Notifier
from federation_server.live.opener import Opener
from federation_server.live.pacing import Pacing
from federation_server.live.rates import Limit, Rates
from federation_server.live.refusals import Refusals
from federation_server.live.rollup import Rollup
from federation_server.live.rotation import TokenRotation
from federation_server.live.session import Sessions
from federation_server.live.session import Settings as SessionSettings
from federation_server.live.silence import Silence
from federation_server.live.sweeper import Sweeper
from federation_server.live.watchers import CommandWatchers
from federation_server.live.writer import Writer
from federation_server.rpc.access import AccessServicer
from federation_server.rpc.analytics import AnalyticsServicer
from federation_server.rpc.audit import Witness
from federation_server.rpc.auth import Authentication
from federation_server.rpc.command import CommandServicer
from federation_server.rpc.command_batch import CommandParts
from federation_server.rpc.deadlines import Deadlines
from federation_server.rpc.error_mapping import ErrorMapping
from federation_server.rpc.fleet import FleetServicer
from federation_server.rpc.neuron_changes import SessionEnding
from federation_server.rpc.registration import Registration
from federation_server.rpc.server import Health, build_server
from federation_server.rpc.session import SessionServicer
from federation_server.rpc.stream import StreamParts
from federation_server.rpc.tls import server_credentials
from federation_server.rpc.tokens import Tokens
from federation_server.settings import Settings
from federation_server.store import partitions, schema_version
from federation_server.store.database import Database
from federation_server.store.ingest import ClosedItem
from federation_server.store.ledger.changes import ChangedCommand
from federation_server.store.ledger.following import News
from federation_server.store.sessions import NewSession

log = structlog.get_logger(__name__)


LAST_FLUSH_S = 2.0
"""How long the writer may take at the end of a drain that has used up its time."""


class StartError(RuntimeError):
    """The server cannot start; the message says why and what to do."""


def certificates_of(settings: Settings, metrics: Metrics) -> Certificates | None:
    """What the gRPC port speaks TLS with; None for plaintext, which is for this machine alone.

    Raises:
        StartError: the certificate cannot be used, or plaintext would be served beyond loopback.
    """
    if settings.tls is not None:
        try:
            return Certificates(settings.tls, metrics)
        except CertificateUnusable as error:
            raise StartError(str(error)) from None
    if settings.loopback or settings.insecure:
        return None
    raise StartError(
        f"FEDERATION_HOST={settings.host} would serve plaintext beyond this machine:"
        " set FEDERATION_TLS_CERT_FILE and FEDERATION_TLS_KEY_FILE"
        " (`federation tls init` makes both), use 127.0.0.1,"
        " or say --insecure where something in front speaks TLS"
    )


class App:
    """One server process."""

    def __init__(self, settings: Settings, database: Database) -> None:
        """Builds everything and starts nothing.

        Raises:
            StartError: the gRPC port cannot be served as the settings say.
        """
        self.settings = settings
        self.database = database
        self.server_id = uuid.uuid4().hex
        self.sessions = Sessions()
        self.metrics = Metrics()
        self.certificates = certificates_of(settings, self.metrics)
        self.admission = Admission(
            self.metrics, rate=settings.admission_rate, burst=settings.admission_burst
        )
        self.rates = Rates(
            self.metrics, {limit: getattr(settings, limit.value.lower()) for limit in Limit}
        )
        self.session_settings = SessionSettings(
            settings.heartbeat_interval, settings.analytics_interval
        )
        self.pacing = Pacing(
            self.sessions, self.metrics, self.session_settings, rate=settings.heartbeat_rate
        )
        self.silence = Silence(
            self.sessions, self.metrics, self.pacing, silent_after=settings.silent_stream_after
        )
        self.watchers = CommandWatchers(database)
        self.dispatcher = Dispatcher(database, self.server_id, self.sessions, self.metrics)
        self.issuer = Issuer(database, self.server_id, self.dispatcher, self.metrics)
        self.writer = Writer(
            database,
            self.metrics,
            flush_interval=settings.flush_interval,
            oldest_point=settings.late_reports,
            changed=self._commands_changed,
            followed=self.watchers.followed,
        )
        self.opener = Opener(database, self.server_id, unwanted=self._close_unwanted)
        self.approvals = Approvals(database)
        self.health = Health()
        self.doubt = SelfDoubt(
            self.metrics,
            patience=settings.presence_patience,
            flush_lag=self.writer.lag,
            on_change=self.health.presence_changed,
        )
        self.notifier = Notifier(
            database,
            self.server_id,
            self.sessions,
            dispatch=self.dispatcher.wake,
            missed=self.dispatcher.wake_all,
        )
        self.sweeper = Sweeper(
            database,
            self.server_id,
            self.metrics,
            self.watchers,
            doubt=self.doubt,
            changed=self._commands_changed,
            offline_after=settings.offline_after,
            mass_offline_after=settings.mass_offline_after,
            patience=settings.presence_patience,
            lost_after=settings.command_lost_after,
        )
        self.rollup = Rollup(database, self.metrics)
        self.housekeeping = Housekeeping(
            database, settings.retention, pending=settings.pending_retention
        )
        self.key_uses = KeyUses(database)
        self.refusals = Refusals(database)
        self.descriptors = Descriptors(self.metrics)
        self._server: grpc.aio.Server | None = None
        self.lease = Lease(
            database,
            self.server_id,
            __version__,
            self.sessions,
            self.metrics,
            pacing=self.pacing,
            doubt=self.doubt,
            on_change=self.health.database_changed,
            reopen=self.writer.reopen,
        )

    def _commands_changed(
        self,
        changes: Sequence[ChangedCommand],
        news: Mapping[str, News | None] = MappingProxyType({}),
    ) -> None:
        """What follows from a committed change of commands: who follows them is told what is new,
        or looks; places are free.
        """
        self.watchers.tell(news)
        self.watchers.wake(change.command_id for change in changes if change.command_id not in news)
        for change in changes:
            if change.seconds is not None:
                self.metrics.commands_ended.labels(state=change.state.value).inc()
                self.metrics.command_seconds.observe(change.seconds)
                if change.batch_id is not None:
                    self.dispatcher.wake_batch(change.batch_id)
                    self.watchers.ended_in(change.batch_id)
            if change.to_cancel:
                self.dispatcher.wake(change.neuron_id)
            elif change.state not in IN_FLIGHT_STATES:
                self.dispatcher.freed(change.neuron_id)

    def _close_unwanted(self, new: NewSession, epoch: int) -> None:
        """Closes a session whose stream had ended when it was opened."""
        self.writer.close(ClosedItem(new.neuron_id, epoch, Presence.SUSPECT, "stream lost"))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[int]:
        """Serves within the block; gives the port. At the end it drains and stops.

        Raises:
            StartError: a port cannot be bound.
            SchemaMismatch: the schema is not this server's.
        """
        await self._check_schema()
        await self.health.start()
        lifetime = TokenLifetime(self.settings.token_ttl, self.settings.token_renewal)
        tokens = await Tokens.load(self.database, lifetime)
        server = self._build_server(tokens)
        rotation = TokenRotation(self.database, self.sessions, tokens)
        port = self._bind(server)
        metrics_port = self._serve_metrics()
        self.doubt.start()
        await self.lease.renew()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(work(), name=work.__qualname__)
                    for work in (*self._works(), rotation.run, tokens.run)
                ]
                await server.start()
                self._server = server
                log.info(
                    "serving",
                    action="server_started",
                    port=port,
                    server_id=self.server_id,
                    tls=self.certificates is not None,
                )
                try:
                    yield port
                finally:
                    await self.drain()
                    for task in tasks:
                        task.cancel()
        finally:
            await self.lease.leave()
            metrics_port.close()
            await self.database.close()
            log.info("stopped", action="server_stopped")

    def _works(self) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        """What runs as long as the server serves."""
        works = [
            self.writer.run,
            self.opener.run,
            self.dispatcher.run,
            self.issuer.run,
            self.watchers.run,
            self.notifier.run,
            self.doubt.run,
            self.sweeper.run,
            self.rollup.run,
            self.housekeeping.run,
            self.approvals.run,
            self.pacing.run,
            self.silence.run,
            self.key_uses.run,
            self.refusals.run,
            self.descriptors.run,
            self.lease.run,
        ]
        return works if self.certificates is None else [*works, self.certificates.run]

    def _serve_metrics(self) -> MetricsPort:
        host, port = self.settings.metrics_host, self.settings.metrics_port
        try:
            return MetricsPort(host, port, self.metrics.registry)
        except OSError as error:
            raise StartError(
                f"the metrics port {host}:{port} cannot be bound ({error.strerror}):"
                " choose another with FEDERATION_METRICS_PORT"
            ) from None

    async def _check_schema(self) -> None:
        await schema_version.check(self.database)
        async with await self.database.connect("start") as connection:
            await partitions.ensure_ahead(connection)
        if await self.database.is_superuser():
            log.warning(
                "the server's role is a superuser of PostgreSQL: give DATABASE_URL one that owns"
                " its schema alone, see docs/security.md",
                action="database_superuser",
            )

    def _build_server(self, tokens: Tokens) -> grpc.aio.Server:
        parts = StreamParts(
            database=self.database,
            writer=self.writer,
            sessions=self.sessions,
            opener=self.opener,
            approvals=self.approvals,
            dispatcher=self.dispatcher,
            metrics=self.metrics,
            admission=self.admission,
            rates=self.rates,
            message_rate=self.settings.neuron_message_rate,
            pacing=self.pacing,
            settings=self.session_settings,
            server_id=self.server_id,
            server_version=__version__,
            changed=self._commands_changed,
        )
        ending = SessionEnding(self.sessions, self.server_id)
        witness = Witness(self.refusals, self.server_id)
        return build_server(
            [
                Deadlines(self.metrics),
                ErrorMapping(witness),
                Authentication(
                    self.database,
                    tokens,
                    self.admission,
                    self.rates,
                    self.key_uses,
                    witness=witness,
                ),
            ],
            self.health,
            session=SessionServicer(
                Registration(self.database, tokens, EnrollmentMode(self.settings.enrollment)), parts
            ),
            fleet=FleetServicer(self.database, ending),
            command=CommandServicer(
                CommandParts(
                    database=self.database,
                    dispatcher=self.dispatcher,
                    issuer=self.issuer,
                    watchers=self.watchers,
                    metrics=self.metrics,
                    server_id=self.server_id,
                    changed=self._commands_changed,
                )
            ),
            analytics=AnalyticsServicer(self.database, self.settings.retention),
            access=AccessServicer(self.database, ending, tokens),
        )

    def _bind(self, server: grpc.aio.Server) -> int:
        settings = self.settings
        if settings.enrollment == "open" and not (settings.loopback or settings.open_to_anyone):
            raise StartError(
                f"FEDERATION_ENROLLMENT=open on FEDERATION_HOST={settings.host} would let anybody"
                " join who reaches it: use approve, or say FEDERATION_OPEN_TO_ANYONE=true"
            )
        try:
            if self.certificates is None:
                return server.add_insecure_port(self.settings.address)
            credentials = server_credentials(self.certificates)
            return server.add_secure_port(self.settings.address, credentials)
        except RuntimeError:
            raise StartError(
                f"{settings.address} cannot be bound ({_why_not_bound(settings)}):"
                " stop what listens there (is a federation running already?)"
                " or choose another with --port or FEDERATION_PORT"
            ) from None

    async def drain(self) -> None:
        """Sends the streams home, spread over half the drain's time, and writes what they sent.

        Nothing is served any more; a second call does nothing.
        """
        server, self._server = self._server, None
        if server is None:
            return
        log.info("draining", action="server_draining", streams=len(self.sessions))
        await self.health.draining()
        limit_s = self.settings.drain_timeout.total_seconds()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit_s
        stop = asyncio.create_task(server.stop(grace=limit_s), name="grpc stop")
        self.sessions.send_home(self.settings.drain_timeout / 2)
        self.watchers.close()
        self.approvals.close()
        await stop
        await self.refusals.finish()
        left_s = max(LAST_FLUSH_S, deadline - loop.time())
        if not await self.writer.stop(within=timedelta(seconds=left_s)):
            self.database.abandon()


@asynccontextmanager
async def stop_signal() -> AsyncIterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set; a second signal ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield stop
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _why_not_bound(settings: Settings) -> str:
    """What the system says of the address; gRPC does not pass it on."""
    host = settings.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, settings.port), family=family):
            return "it was taken a moment ago"
    except OSError as error:
        return error.strerror or str(error)
