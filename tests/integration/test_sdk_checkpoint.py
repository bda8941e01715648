"""Checkpoints: kept before the handler goes on, never lost to newer progress, and handed on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neuron_sdk import CommandContext, CommandInterrupted
from neuron_sdk.testing import FinalState
from tests.support.sdk_neuron import Bench, N, be_quick, code
from tests.support.waiting import eventually_sync
from tests.unit import sdk_isolated_handlers as isolated

_quick = pytest.fixture(autouse=True)(be_quick)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Bench(tmp_path) as bench:
        yield bench


def rows(ctx: CommandContext) -> int:
    """Where to go on."""
    return 0 if ctx.checkpoint is None else int(ctx.checkpoint["rows"])


async def coroutine(ctx: CommandContext) -> dict[str, Any]:
    begun = rows(ctx)
    await ctx.progress(0.1, "read", checkpoint={"rows": begun + 10})
    await ctx.progress(0.2, "told")
    if ctx.attempt < ctx.max_attempts:
        raise RuntimeError("lost the source")
    return {"begun": begun, "attempts": ctx.max_attempts}


def in_thread(ctx: CommandContext) -> dict[str, Any]:
    begun = rows(ctx)
    ctx.progress(0.1, "read", checkpoint={"rows": begun + 10})
    ctx.progress_sync(0.2, "told")
    if ctx.attempt < ctx.max_attempts:
        raise RuntimeError("lost the source")
    return {"begun": begun, "attempts": ctx.max_attempts}


@pytest.mark.parametrize("kind", ["coroutine", "thread", "process", "process coroutine"])
def test_each_attempt_goes_on_from_the_checkpoint_of_the_one_before(
    bench: Bench, kind: str
) -> None:
    neuron = bench.neuron()
    match kind:
        case "coroutine":
            neuron.command("task")(coroutine)
        case "thread":
            neuron.command("task")(in_thread)
        case "process":
            neuron.command("task", isolation="process")(isolated.go_on)
        case _:
            neuron.command("task", isolation="process")(isolated.go_on_async)
    bench.start(neuron)
    command_id = bench.federation.issue(N, "task", max_attempts=3)
    outcome = bench.federation.outcome(command_id, within=30)
    assert outcome.response == {"begun": 20, "attempts": 3}


def test_newer_progress_never_replaces_a_checkpoint(bench: Bench) -> None:
    neuron = bench.neuron()

    @neuron.command()
    async def task(ctx: CommandContext) -> None:
        for number in range(200):
            await ctx.progress(
                number / 200, checkpoint={"number": number} if number < 100 else None
            )
        raise RuntimeError("too bad")

    bench.start(neuron)
    command_id = bench.federation.issue(N, "task")
    bench.federation.outcome(command_id)
    noted = [
        int(u.progressed.checkpoint["number"])  # type: ignore[arg-type]
        for u in bench.federation.updates_of(command_id)
        if u.progressed.HasField("checkpoint")
    ]
    assert noted == sorted(noted)
    assert noted[-1] == 99


def test_a_checkpoint_that_nobody_waits_for_is_kept_all_the_same(bench: Bench) -> None:
    neuron = bench.neuron()

    @neuron.command()
    async def task(ctx: CommandContext) -> None:
        ctx.progress(0.5, checkpoint={"rows": 1})
        ctx.progress(0.6)

    bench.start(neuron)
    command_id = bench.federation.issue(N, "task")
    bench.federation.outcome(command_id)
    (_, *middle, _) = bench.federation.updates_of(command_id)
    noted = [u.progressed.checkpoint for u in middle if u.progressed.HasField("checkpoint")]
    assert [each["rows"] for each in noted] == [1]


def nested(levels: int) -> dict[str, Any]:
    return {"x": nested(levels - 1)} if levels > 1 else {}


@pytest.mark.parametrize(
    ("checkpoint", "says"),
    [
        ({"x": "y" * 70_000}, "at most 65536"),
        (nested(17), "nested too deep"),
        ({"x": object()}, "has no JSON form"),
        (["a"], "give a dict"),
    ],
    ids=["large", "deep", "no json", "no dict"],
)
@pytest.mark.parametrize("kind", ["coroutine", "thread"])
def test_a_checkpoint_that_cannot_be_kept_raises_in_the_handler(
    bench: Bench, checkpoint: Any, says: str, kind: str
) -> None:
    neuron = bench.neuron()

    async def in_loop(ctx: CommandContext) -> str:
        await ctx.progress(0.5, checkpoint=nested(16))
        try:
            await ctx.progress(0.5, checkpoint=checkpoint)
        except ValueError as error:
            return str(error)
        return ""

    def in_a_thread(ctx: CommandContext) -> str:
        try:
            ctx.progress_sync(0.5, checkpoint=checkpoint)
        except ValueError as error:
            return str(error)
        return ""

    if kind == "coroutine":
        neuron.command("task")(in_loop)
    else:
        neuron.command("task")(in_a_thread)
    bench.start(neuron)
    outcome = bench.federation.outcome(bench.federation.issue(N, "task"))
    assert outcome.response is not None
    assert "checkpoint" in outcome.response["result"]
    assert says in outcome.response["result"]


def test_no_checkpoint_is_taken_once_the_command_has_ended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuron_sdk.ending.KILLED_S", 0.3)
    release, seen = threading.Event(), list[str]()
    neuron = bench.neuron()

    @neuron.command()
    def deaf(ctx: CommandContext) -> None:
        for _ in range(3):
            try:
                release.wait(30)
            except CommandInterrupted:
                time.sleep(0)
        try:
            ctx.progress_sync(0.9, checkpoint={"late": True})
        except CommandInterrupted as error:
            seen.append(str(error))

    bench.start(neuron)
    command_id = bench.federation.issue(N, "deaf", run_timeout=0.05)
    assert bench.federation.outcome(command_id).state is FinalState.TIMED_OUT
    release.set()
    eventually_sync(lambda: seen)
    assert "has ended" in seen[0]
    kinds = bench.kinds(command_id)
    assert kinds[-1] == "finished"


def test_the_fake_tries_again_only_what_failed_and_as_often_as_allowed(bench: Bench) -> None:
    attempts: list[int] = []
    neuron = bench.neuron()

    @neuron.command()
    async def task(ctx: CommandContext) -> None:
        attempts.append(ctx.attempt)
        await asyncio.sleep(0)
        raise RuntimeError("again")

    bench.start(neuron)
    outcome = bench.federation.outcome(bench.federation.issue(N, "task", max_attempts=2))
    assert code(outcome) == "HANDLER_RAISED"
    assert attempts == [1, 2]
    refused = bench.federation.issue(N, "task", {"unknown": 1}, max_attempts=2)
    assert bench.federation.outcome(refused).state is FinalState.REJECTED
    assert attempts == [1, 2]
