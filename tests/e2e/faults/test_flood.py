"""More than anybody should send, or at the same moment: nobody else waits, and nothing is left."""

from __future__ import annotations

import asyncio
import resource
import time
from collections import Counter
from contextlib import AsyncExitStack, ExitStack, suppress
from itertools import count
from multiprocessing import get_context

import grpc
import grpc.aio
import psutil
from grpc_health.v1.health_pb2 import HealthCheckResponse

from federation.v1 import fleet_service_pb2, heartbeat_pb2, neuron_pb2
from federation.v1 import session_service_pb2 as pb
from federation_server.live.descriptors import ENOUGH, LOOK_INTERVAL_S
from federation_server.logs import ALIKE_S, MOST_ALIKE
from federation_server.store.database import NEURONS_POOL_SIZE
from tests.support.calls import shown
from tests.support.faults import Postgres, calling, is_health, is_online, issue, report, serving
from tests.support.federation import BareNeuron, Served, connected, running
from tests.support.plain_neuron import now
from tests.support.postgres import passable_folder
from tests.support.processes import FederationProcess
from tests.support.waiting import eventually

FLOOD = 100_000
CUTS = 2_000
CALLS = 3_000
REGISTRATIONS = 300
"""More than are served at a time."""
PROMPT_S = 5.0
"""Within what an operator is answered, on a machine that a flood has for itself else."""

ALONE = [("grpc.use_local_subchannel_pool", 1)]


def flood(address: str, token: str) -> None:
    """Sends heartbeats as fast as it can."""

    async def send() -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            neuron = BareNeuron(Served(address, channel), token)
            await neuron.hello()
            beat = pb.NeuronMessage(heartbeat=heartbeat_pb2.Heartbeat(health_score=50.0))
            for _ in range(FLOOD):
                await neuron.call.write(beat)

    asyncio.run(send())


async def test_100_000_heartbeats_at_once_keep_nobody_else_waiting(
    served: Served, server: FederationProcess
) -> None:
    token = await served.register("flood")
    memory = psutil.Process(server.process.pid).memory_info
    before = memory().rss
    flooding = get_context("spawn").Process(target=flood, args=(served.address, token))
    async with connected(served, "calm") as calm:
        flooding.start()
        try:
            await eventually(lambda: is_online(served, "flood"), describe="the flood has begun")
            for sequence in range(1, 31):
                await calm.send(sequence=sequence, send_time=now(), analytics_report=report("calm"))
                await calm.acked(sequence)
                await asyncio.sleep(0.1)
        finally:
            flooding.kill()
            flooding.join()
    assert memory().rss - before < 64 * 1024 * 1024


def storm(address: str, token: str) -> None:
    """Guesses enrollment tokens, API keys and neuron tokens, and opens streams and leaves them, as
    fast as it can, obeying nobody.
    """

    async def one(served: Served, number: int) -> None:
        for turn in count():
            name = f"storm-{number}-{turn}"
            description = neuron_pb2.NeuronDescription(neuron_id=name, type="worker")
            register = pb.RegisterRequest(description=description, enrollment_token=f"fet_{name}")
            get = fleet_service_pb2.GetNeuronRequest(neuron_id=name)
            stale = (("authorization", f"Bearer {token}x"),)
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await served.session.Register(register)
            with suppress(grpc.aio.AioRpcError):
                await served.fleet.GetNeuron(get, metadata=(("x-admin-key", f"fak_{name}"),))
            with suppress(grpc.aio.AioRpcError):
                await served.session.RefreshToken(pb.RefreshTokenRequest(), metadata=stale)
            served.session.Connect(metadata=(("authorization", f"Bearer {token}"),))

    async def rage() -> None:
        async with AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(grpc.aio.insecure_channel(address, options=ALONE))
                for _ in range(10)
            ]
            await asyncio.gather(
                *(one(Served(address, channels[number % 10]), number) for number in range(100))
            )

    asyncio.run(rage())


async def test_a_flood_of_neurons_and_guesses_keeps_no_operator_out(doomed: Postgres) -> None:
    # As a server is by default: the other tests' one lets in whoever comes.
    settings = {"FEDERATION_ADMISSION_RATE": "400", "FEDERATION_ADMISSION_BURST": "2000"}
    with passable_folder() as folder, serving(doomed, folder, **settings) as server:
        async with calling(server) as served, connected(served, "ordered") as ordered:
            tokens = [await served.register(name) for name in ("stormer", "flooder")]
            spawn = get_context("spawn").Process
            processes = [
                spawn(target=target, args=(server.address, token))
                for target, token in zip((storm, flood), tokens, strict=True)
            ]
            for process in processes:
                process.start()
            try:
                await eventually(
                    lambda: '"rate_limited"' in server.output,
                    within=30,
                    describe="the storm has begun",
                )
                await eventually(lambda: is_online(served, "flooder"), describe="so has the flood")
                began = time.monotonic()
                for _ in range(20):
                    async with asyncio.timeout(PROMPT_S):
                        await shown(served, "ordered")
                    async with asyncio.timeout(PROMPT_S):
                        command = await issue(served, "ordered")
                    async with asyncio.timeout(PROMPT_S):
                        while not (message := await ordered.receive()).HasField("command"):
                            pass  # an acknowledgement
                        assert message.command.command_id == command.command_id
                        assert await is_health(served, HealthCheckResponse.SERVING)
                    await ordered.finish(message.command, "SUCCEEDED")
                windows = (time.monotonic() - began) // ALIKE_S + 30 / ALIKE_S
                assert server.output.count('"CREDENTIAL_INVALID"') <= 2 * MOST_ALIKE * windows
            finally:
                for process in processes:
                    process.kill()
                    process.join()


async def test_a_server_takes_what_connections_it_may_and_says_when_few_are_left(
    doomed: Postgres,
) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with passable_folder() as folder, ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
        try:  # which is what it starts with; its hard limit is the usual one
            server = stack.enter_context(serving(doomed, folder))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        process = psutil.Process(server.process.pid)
        assert process.rlimit(psutil.RLIMIT_NOFILE)[0] == min(before[1], ENOUGH)
        async with AsyncExitStack() as channels:
            for _ in range(150):
                channel = grpc.aio.insecure_channel(server.address, options=ALONE)
                await channels.enter_async_context(channel)
                assert await is_health(Served(server.address, channel), HealthCheckResponse.SERVING)
            process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds() + 5, before[1]))
            await eventually(
                lambda: '"descriptors_few"' in server.output,
                within=LOOK_INTERVAL_S + PROMPT_S,
                describe="it says that few are left",
            )


async def test_registrations_that_wait_in_the_database_keep_no_operator_waiting_and_no_neuron(
    database_url: str,
) -> None:
    async with running(database_url) as federation:
        token = await federation.register("n")
        secret = await federation.enrollment_token()
        async with await federation.app.database.connect("test") as connection:
            await connection.execute(b"BEGIN")
            await connection.execute(b"LOCK TABLE enrollment_tokens IN ACCESS EXCLUSIVE MODE")
            registering = [
                asyncio.ensure_future(
                    federation.session.Register(
                        pb.RegisterRequest(
                            description=neuron_pb2.NeuronDescription(
                                neuron_id=f"n{number}", type="worker"
                            ),
                            enrollment_token=secret,
                        )
                    )
                )
                for number in range(REGISTRATIONS)
            ]

            async def wait() -> bool:
                await connection.execute(b"SELECT pg_stat_clear_snapshot()")
                waiting = await connection.execute(
                    b"SELECT count(*) FROM pg_stat_activity WHERE application_name = 'federation'"
                    b" AND datname = current_database() AND wait_event_type = 'Lock'"
                )
                return await waiting.fetchone() == (NEURONS_POOL_SIZE,)

            await eventually(wait, describe="registrations have all the connections they may")
            await eventually(
                lambda: any(call.done() for call in registering),
                describe="no more of them are taken on",
            )
            async with asyncio.timeout(PROMPT_S):
                neuron = BareNeuron(federation, token)
                await neuron.hello()
            neuron.call.cancel()
            async with asyncio.timeout(PROMPT_S):
                await shown(federation, "n")
                await issue(federation, "n")
            await connection.execute(b"COMMIT")
        await asyncio.gather(*registering, return_exceptions=True)


async def test_a_neuron_that_never_reads_is_sent_home_all_the_same(database_url: str) -> None:
    async with running(database_url) as federation:
        token = await federation.register("deaf")
        async with grpc.aio.insecure_channel(
            federation.address,
            options=[("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)],
        ) as channel:
            deaf = BareNeuron(Served(federation.address, channel), token)
            await deaf.hello()
            bad = heartbeat_pb2.Heartbeat(
                dependencies=[heartbeat_pb2.DependencyStatus(name="x" * 500)] * 100
            )

            async def talk() -> None:
                for _ in range(2000):
                    await deaf.send(heartbeat=bad)

            talking = asyncio.create_task(talk())
            session = federation.app.sessions.get("deaf")
            assert session is not None
            await eventually(lambda: session.crowded, within=20, describe="nobody reads")
            await federation.fleet.DeactivateNeuron(
                fleet_service_pb2.DeactivateNeuronRequest(neuron_id="deaf"),
                metadata=federation.admin,
            )
            await eventually(
                lambda: not len(federation.app.sessions), within=8, describe="its stream has ended"
            )
            talking.cancel()
            deaf.call.cancel()
            await asyncio.gather(talking, return_exceptions=True)


async def test_of_3000_calls_that_wait_for_a_server_that_stood_still_each_has_its_answer(
    served: Served, server: FederationProcess
) -> None:
    process = psutil.Process(server.process.pid)
    process.suspend()
    try:
        calls = [
            asyncio.ensure_future(
                served.fleet.GetNeuron(fleet_service_pb2.GetNeuronRequest(neuron_id="any"))
            )
            for _ in range(CALLS)
        ]
        await asyncio.sleep(0)  # they are sent
    finally:
        process.resume()
    ended = await asyncio.gather(*calls, return_exceptions=True)
    codes = Counter(each.code() for each in ended if isinstance(each, grpc.aio.AioRpcError))
    assert codes == {grpc.StatusCode.UNAUTHENTICATED: CALLS}


async def test_streams_opened_and_cut_at_once_leave_no_session_behind(
    served: Served, server: FederationProcess, doomed: Postgres
) -> None:
    tokens = [await served.register(f"cut-{number}") for number in range(8)]

    async def open_and_cut(number: int) -> None:
        neuron = BareNeuron(served, tokens[number % len(tokens)])
        with suppress(grpc.aio.AioRpcError, asyncio.CancelledError, asyncio.InvalidStateError):
            await neuron.send(
                hello=pb.Hello(instance_id="i", spool_id="s", next_sequence=1, first_sequence=1)
            )
            await asyncio.sleep(number % 50 / 1000)
        neuron.call.cancel()

    async with connected(served, "stays") as stays:
        for begin in range(0, CUTS, 500):
            await asyncio.gather(*(open_and_cut(number) for number in range(begin, begin + 500)))

        async def closed() -> bool:
            query = (
                "SELECT count(*) FROM neuron_states WHERE session_open AND neuron_id LIKE 'cut-%'"
            )
            return bool(await asyncio.to_thread(doomed.ask, query) == 0)

        await eventually(closed, within=20, describe="every session is closed")
        await stays.send(sequence=1, send_time=now(), analytics_report=report("stays"))
        await stays.acked(1)


async def test_one_request_id_from_two_callers_at_once_issues_once(served: Served) -> None:
    await served.register("asked-twice")
    made = await asyncio.gather(
        *(issue(served, "asked-twice", request_id="the-same") for _ in range(10))
    )
    assert len({command.command_id for command in made}) == 1


async def test_whichever_comes_first_no_deactivated_neuron_keeps_a_stream(
    served: Served, doomed: Postgres
) -> None:
    token = await served.register("racer")
    for turn in range(15):
        neuron = BareNeuron(served, token)

        async def deactivate(delay_s: float) -> None:
            await asyncio.sleep(delay_s)
            request = fleet_service_pb2.DeactivateNeuronRequest(neuron_id="racer")
            await served.fleet.DeactivateNeuron(request, metadata=served.admin)

        async def connect(neuron: BareNeuron) -> None:
            with suppress(grpc.aio.AioRpcError, AssertionError, asyncio.InvalidStateError):
                await neuron.hello()

        async def command() -> None:
            with suppress(grpc.aio.AioRpcError):  # it came too late
                await issue(served, "racer")

        await asyncio.gather(connect(neuron), deactivate(turn / 1000), command())
        ended, why = await neuron.end()  # UNAVAILABLE where the two met in the database
        assert ended in {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAVAILABLE}, why
        assert not (await shown(served, "racer")).session.open
        await served.fleet.ActivateNeuron(
            fleet_service_pb2.ActivateNeuronRequest(neuron_id="racer"), metadata=served.admin
        )
