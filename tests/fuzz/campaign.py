"""A campaign of hostile requests against one server, and what must hold at its end.

    python -m tests.fuzz.campaign --seconds 600 --seed 7

In rounds: some requests to every RPC and some streams, each round with a seed of its own that
follows from the campaign's. Afterwards the server must be as well as before: health SERVING, its
log without an error, its memory as after the first round, no stream kept, a neuron and its
command served, and every command in the ledger with a history that the rules allow.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.request import urlopen

import orjson
import psutil
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st

from federation.v1 import neuron_pb2
from tests.fuzz.messages import wire
from tests.fuzz.target import NEURON, Target, is_ours, methods
from tests.support.evidence import impossible, read_accounts
from tests.support.faults import Postgres, doomed_postgres, serving
from tests.support.plain_neuron import plain_neuron
from tests.support.postgres import passable_folder
from tests.support.processes import FederationProcess, free_port
from tests.support.waiting import eventually_sync

EXAMPLES = 25
"""Requests to each RPC in a round, and streams."""

WARM_UP = 1
"""Rounds until caches and pools are as large as they become."""

GROWTH_BYTES = 64 << 20
"""How much more memory the server may hold than after those: what malloc keeps of the largest
messages that were under way, and no more however long it lasts."""

Say = Callable[[str], object]


def fuzz(seconds: float, chosen: int, say: Say) -> None:
    """Runs a campaign.

    Raises:
        AssertionError: the server failed, stuck or grew; with the example that hypothesis has made
            small.
    """
    say(f"make fuzz ARGS='--seconds {seconds:g} --seed {chosen}'")
    metrics_port = free_port()
    with doomed_postgres() as postgres, passable_folder() as folder:
        options = {"FEDERATION_METRICS_PORT": str(metrics_port), "FEDERATION_LOG_FORMAT": "json"}
        with serving(postgres, folder, **options) as server:
            _rounds(server, seconds, chosen, say)
            _is_well(server, postgres, metrics_port)
            assert server.stop() == 0, server.output[-5000:]
            _check_log(server.output)


def _rounds(server: FederationProcess, seconds: float, chosen: int, say: Say) -> None:
    chance = random.Random(chosen)  # noqa: S311 - it must come again
    process = psutil.Process(server.process.pid)
    target = Target(server.address)
    ends = time.monotonic() + seconds
    number, warm = 0, 0
    try:
        while number <= WARM_UP or time.monotonic() < ends:
            for method in methods():
                if method.client_streaming and is_ours(method):
                    _streams(target, method, chance.getrandbits(32))
                else:
                    _requests(target, method, chance.getrandbits(32))
                if number > WARM_UP and time.monotonic() > ends:
                    break
            number += 1
            if number == WARM_UP:
                warm = process.memory_info().rss
        grown = process.memory_info().rss - warm
        total = sum(target.answers.values())
        fine = {each.partition(" ")[0] for each in target.answers if each.endswith(" OK")}
        say(f"{number} rounds, {total} calls, {grown / 1e6:+.1f} MB after the first")
        say(", ".join(f"{count} {name}" for name, count in sorted(target.answers.items())))
        assert grown < GROWTH_BYTES, f"the server's memory grew by {grown / 1e6:.0f} MB"
        never = {method.name for method in methods() if is_ours(method)} - fine
        assert not never, f"no request got past the checks of {never}"
    finally:
        target.close()


def _requests(target: Target, method: MethodDescriptor, chosen: int) -> None:
    base = target.base(method)

    @_example(chosen)
    @given(wire(base, target.known))
    def sent(data: bytes) -> None:
        note(_readable(base, data))
        target.unary(method, data)

    sent()


def _streams(target: Target, method: MethodDescriptor, chosen: int) -> None:
    hello, *others = target.stream_bases(method)
    said = st.sampled_from([hello, *others]).flatmap(lambda base: wire(base, target.known))
    begun = st.one_of(st.just(hello.SerializeToString()), wire(hello, target.known))
    streams = st.one_of(
        st.tuples(begun, st.lists(said, max_size=12)).map(lambda parts: [parts[0], *parts[1]]),
        st.lists(said, max_size=3),
        st.lists(st.binary(max_size=64), max_size=3),
    )

    @_example(chosen)
    @given(streams, st.booleans())
    def sent(messages: list[bytes], cancels: bool) -> None:
        for data in messages:
            note(_readable(hello, data))
        target.stream(messages, cancels=cancels)

    sent()


def _example(chosen: int) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """So many examples, the same ones for the same number."""

    def decorate(function: Callable[..., None]) -> Callable[[], None]:
        configured: Any = settings(
            max_examples=EXAMPLES,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )(seed(chosen)(function))
        decorated: Callable[[], None] = configured
        return decorated

    return decorate


def _readable(kind: Message, data: bytes) -> str:
    message = type(kind)()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return "no message"
    return f"{message}"[:2000]


def _is_well(server: FederationProcess, postgres: Postgres, metrics_port: int) -> None:
    target = Target(server.address)
    try:
        health: Any = HealthStub(target.channel)
        answer = health.Check(HealthCheckRequest(), timeout=5)
        assert answer.status == HealthCheckResponse.SERVING
        eventually_sync(lambda: _streams_open(metrics_port) == 0, describe="no stream is kept")
        description = neuron_pb2.NeuronDescription(
            neuron_id=f"{NEURON}-after",
            type="worker",
            command_types=[neuron_pb2.CommandType(type="run")],
        )
        secret = target.known["enrollment_token"][0]
        with plain_neuron(server.address, secret, description, {"run": lambda *_: {"done": True}}):
            command_id = target.issue(description.neuron_id)
            eventually_sync(
                lambda: target.has_succeeded(command_id), describe="a command is carried out"
            )
    finally:
        target.close()
    accounts = read_accounts(postgres.url).values()
    wrong = [f"{what}: {each.told([])}" for each in accounts for what in impossible(each)]
    assert not wrong, "\n".join(wrong)


def _streams_open(metrics_port: int) -> float:
    with urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=5) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith("federation_streams "):
                return float(line.split()[1])
    raise AssertionError("no metric of that name")


def _check_log(output: str) -> None:
    """Every line is one event, and none an error's."""
    for line in output.splitlines():
        try:
            event = orjson.loads(line)
        except orjson.JSONDecodeError:
            raise AssertionError(f"not one event: {line!r}") from None
        assert event["level"] not in {"error", "critical"}, line


def main() -> None:
    """The command line: `make fuzz`."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (default: 600)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()

    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    fuzz(options.seconds, options.seed, say)


if __name__ == "__main__":
    main()
