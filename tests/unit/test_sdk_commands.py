"""What becomes of a command: a handler's answer, error, time and place, with no server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from neuron_sdk import CommandContext, CommandFailed, Neuron
from neuron_sdk.testing import FinalState, Progress, run_command, run_command_sync
from tests.unit import sdk_isolated_handlers as isolated


@pytest.fixture
def neuron() -> Neuron:
    return Neuron("n-1", type="worker")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuron_sdk.ending.ASKED_S", 0.3)
    monkeypatch.setattr("neuron_sdk.ending.INTERRUPTED_S", 1.0)
    monkeypatch.setattr("neuron_sdk.ending.KILLED_S", 3.0)


def test_the_design_s_handler_works_without_a_server(neuron: Neuron) -> None:
    @neuron.command("run_task")
    async def run_task(ctx: CommandContext, input_source: str, limit: int = 100) -> dict[str, Any]:
        for done in range(limit):
            await ctx.progress(done / limit, f"{done} rows")
        return {"processed_records": limit, "source": input_source}

    outcome = run_command_sync(neuron, "run_task", {"input_source": "s3"})
    assert outcome.state is FinalState.SUCCEEDED
    assert outcome.response == {"processed_records": 100, "source": "s3"}
    assert outcome.error is None
    assert outcome.run_duration is not None


async def test_a_function_runs_in_a_thread_and_a_coroutine_in_the_loop(neuron: Neuron) -> None:
    loop_thread = threading.get_ident()

    @neuron.command()
    def in_thread() -> bool:
        return threading.get_ident() == loop_thread

    @neuron.command()
    async def in_loop() -> bool:
        return threading.get_ident() == loop_thread

    assert (await run_command(neuron, "in_thread")).response == {"result": False}
    assert (await run_command(neuron, "in_loop")).response == {"result": True}


async def test_whole_numbers_arrive_as_int_and_others_as_float(neuron: Neuron) -> None:
    @neuron.command()
    async def kinds(a: int, b: float, c: Any) -> list[str]:
        return [type(value).__name__ for value in (a, b, c)]

    outcome = await run_command(neuron, "kinds", {"a": 5.0, "b": 2, "c": 1.5})
    assert outcome.response == {"result": ["int", "float", "float"]}


async def test_data_that_does_not_fit_is_rejected_by_field(neuron: Neuron) -> None:
    @neuron.command()
    async def task(limit: int) -> None: ...

    outcome = await run_command(neuron, "task", {"limit": "many"})
    assert outcome.state is FinalState.REJECTED
    assert outcome.error is not None
    assert outcome.error.code == "INVALID_DATA"
    assert outcome.error.message == "limit: expected int, got str"
    assert outcome.error.details == {
        "violations": [{"field": "limit", "description": "expected int, got str"}]
    }


async def test_an_unknown_command_is_rejected(neuron: Neuron) -> None:
    outcome = await run_command(neuron, "nothing")
    assert outcome.state is FinalState.REJECTED
    assert outcome.error is not None
    assert outcome.error.code == "UNKNOWN_COMMAND"


class BrokenText(Exception):
    def __str__(self) -> str:
        raise ValueError


def _raise(error: BaseException) -> Callable[[], Any]:
    def handler() -> Any:
        raise error

    return handler


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (CommandFailed("NO_SOURCE", "not there"), "NO_SOURCE", "not there"),
        (KeyError("x"), "HANDLER_RAISED", "KeyError: 'x'"),
        (SystemExit(3), "HANDLER_RAISED", "SystemExit: 3"),
        (KeyboardInterrupt(), "HANDLER_RAISED", "KeyboardInterrupt"),
        (BrokenText(), "HANDLER_RAISED", "BrokenText: (its message raised ValueError)"),
        (asyncio.CancelledError(), "HANDLER_RAISED", "CancelledError"),
        (CommandFailed("", "x" * 9000), "FAILED", "x" * 8191 + "…"),
    ],
    ids=["said", "raised", "exit", "keyboard", "broken", "cancelled", "long"],
)
@pytest.mark.parametrize("kind", ["thread", "loop"])
async def test_whatever_a_handler_raises_becomes_its_outcome(
    neuron: Neuron, error: BaseException, code: str, message: str, kind: str
) -> None:
    handler = _raise(error)

    async def coroutine() -> Any:
        return handler()

    neuron.command("task")(coroutine if kind == "loop" else handler)
    outcome = await run_command(neuron, "task")
    assert outcome.state is FinalState.FAILED
    assert outcome.error is not None
    assert outcome.error.code == code
    assert outcome.error.message.startswith(message)
    assert "Traceback" not in outcome.error.message


async def test_details_travel_and_those_that_cannot_say_so(neuron: Neuron) -> None:
    neuron.command("good")(_raise(CommandFailed("A", "b", {"rows": [1, 2**60]})))
    neuron.command("bad")(_raise(CommandFailed("A", "b", {"x": "y" * 70_000})))
    good = (await run_command(neuron, "good")).error
    bad = (await run_command(neuron, "bad")).error
    assert good is not None
    assert good.details == {"rows": [1, str(2**60)]}
    assert bad is not None
    assert bad.details is not None
    assert "left_out" in bad.details


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (object(), "INVALID_RESPONSE"),
        ({"x": float("nan")}, "INVALID_RESPONSE"),
        ("x" * (2**20 + 1), "RESPONSE_TOO_LARGE"),
    ],
    ids=["object", "nan", "large"],
)
async def test_an_answer_that_cannot_be_sent_fails_the_command(
    neuron: Neuron, answer: Any, code: str
) -> None:
    neuron.command("task")(lambda: answer)
    outcome = await run_command(neuron, "task")
    assert outcome.state is FinalState.FAILED
    assert outcome.error is not None
    assert outcome.error.code == code


async def test_log_lines_travel_with_the_result(neuron: Neuron) -> None:
    @neuron.command()
    def task(ctx: CommandContext) -> None:
        ctx.log.info("first", rows=1)
        try:
            raise ValueError("inner")
        except ValueError:
            ctx.log.exception("second")

    tail = (await run_command(neuron, "task")).log_tail
    assert tail.splitlines()[0].endswith("INFO first rows=1")
    assert tail.splitlines()[1].endswith("ERROR second")
    assert "Traceback" not in tail


async def test_the_context_names_the_command(neuron: Neuron) -> None:
    @neuron.command()
    async def task(ctx: CommandContext) -> list[Any]:
        return [ctx.command_id, ctx.attempt, ctx.type, ctx.cancelled]

    outcome = await run_command(neuron, "task", command_id="c-9", attempt=3)
    assert outcome.response == {"result": ["c-9", 3, "task", False]}


async def test_progress_can_be_told_from_threads_with_either_call(neuron: Neuron) -> None:
    told: list[Progress] = []
    go_on = threading.Event()

    def tell(progress: Progress) -> None:
        told.append(progress)
        go_on.set()

    @neuron.command()
    def task(ctx: CommandContext) -> None:
        ctx.progress(0.5, "half")
        go_on.wait(5)

    await run_command(neuron, "task", on_progress=tell)
    assert told == [Progress(0.5, "half")]


# ---- attempts, checkpoints, cancelling


async def test_a_handler_s_next_attempt_can_be_tried_with_a_checkpoint(neuron: Neuron) -> None:
    @neuron.command()
    async def task(ctx: CommandContext) -> list[Any]:
        return [ctx.attempt, ctx.max_attempts, ctx.checkpoint]

    first = await run_command(neuron, "task", max_attempts=3)
    assert first.response == {"result": [1, 3, None]}
    again = await run_command(neuron, "task", attempt=2, max_attempts=3, checkpoint={"row": 7})
    assert again.response == {"result": [2, 3, {"row": 7}]}


async def test_a_handler_can_be_cancelled_when_it_has_come_far_enough(neuron: Neuron) -> None:
    seen: list[str] = []
    cancel = asyncio.Event()

    @neuron.command()
    async def task(ctx: CommandContext) -> None:
        await ctx.progress(0.5, "half", checkpoint={"row": 7})
        try:
            await asyncio.sleep(60)
        finally:
            seen.append(ctx.cancel_reason)

    outcome = await run_command(
        neuron, "task", cancel=cancel, cancel_reason="enough", on_progress=lambda _: cancel.set()
    )
    assert outcome.state is FinalState.CANCELLED
    assert seen == ["enough"]


async def test_a_command_that_is_cancelled_at_once_does_not_run(neuron: Neuron) -> None:
    ran: list[int] = []
    cancel = asyncio.Event()
    cancel.set()
    neuron.command("task")(lambda: ran.append(1))
    assert (await run_command(neuron, "task", cancel=cancel)).state is FinalState.CANCELLED
    assert ran == []


# ---- time


async def test_a_coroutine_that_takes_too_long_is_cancelled(neuron: Neuron) -> None:
    seen: list[str] = []

    @neuron.command()
    async def task(ctx: CommandContext) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            seen.append(f"cleaned up, cancelled={ctx.cancelled}")

    outcome = await run_command(neuron, "task", run_timeout=0.05)
    assert outcome.state is FinalState.TIMED_OUT
    assert outcome.error is not None
    assert outcome.error.code == "TIMED_OUT"
    assert seen == ["cleaned up, cancelled=True"]


async def test_a_function_that_looks_at_cancelled_may_end_itself(neuron: Neuron) -> None:
    @neuron.command()
    def task(ctx: CommandContext) -> str:
        while not ctx.cancelled:
            time.sleep(0.005)
        return "ended by itself"

    outcome = await run_command(neuron, "task", run_timeout=0.05)
    assert outcome.state is FinalState.TIMED_OUT
    assert outcome.response is None


async def test_a_function_that_does_not_look_is_interrupted(neuron: Neuron) -> None:
    seen: list[str] = []

    @neuron.command()
    def task() -> None:
        try:
            while True:
                with suppress(Exception):
                    time.sleep(0.005)
        finally:
            seen.append("cleaned up")

    outcome = await run_command(neuron, "task", run_timeout=0.05)
    assert outcome.state is FinalState.TIMED_OUT
    assert seen == ["cleaned up"]


async def test_a_handler_that_cannot_be_ended_is_timed_out_all_the_same(neuron: Neuron) -> None:
    release = threading.Event()

    @neuron.command()
    def task() -> None:
        release.wait(30)

    try:
        outcome = await run_command(neuron, "task", run_timeout=0.05)
    finally:
        release.set()
    assert outcome.state is FinalState.TIMED_OUT
    assert outcome.error is not None
    assert "still runs" in outcome.error.message


# ---- in a process


async def test_an_isolated_handler_runs_in_another_process(neuron: Neuron) -> None:
    told: list[Progress] = []
    neuron.command(isolation="process")(isolated.add)
    outcome = await run_command(neuron, "add", {"a": 1, "b": 2}, on_progress=told.append)
    assert outcome.response is not None
    assert outcome.response["sum"] == 3
    assert outcome.response["pid"] != psutil.Process().pid
    assert f"added by='{outcome.response['pid']}'" in outcome.log_tail
    neuron.command(isolation="process")(isolated.add_async)
    assert (await run_command(neuron, "add_async", {"a": 1, "b": 2})).response == {"result": 3}


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("fail_as_said", "NO_LUCK", "not today"),
        ("fail_by_surprise", "HANDLER_RAISED", "RuntimeError: boom"),
        ("exit_early", "HANDLER_RAISED", "SystemExit: 3"),
        ("die", "PROCESS_ENDED", "SIGSEGV"),
    ],
)
async def test_whatever_happens_in_the_process_becomes_the_outcome(
    neuron: Neuron, name: str, code: str, message: str
) -> None:
    neuron.command(isolation="process")(getattr(isolated, name))
    outcome = await run_command(neuron, name)
    assert outcome.state is FinalState.FAILED
    assert outcome.error is not None
    assert outcome.error.code == code
    assert message in outcome.error.message


async def test_an_isolated_handler_that_hangs_is_ended(neuron: Neuron, tmp_path: Path) -> None:
    cancel, marker = asyncio.Event(), tmp_path / "pid"
    neuron.command(isolation="process")(isolated.hang)
    outcome = await run_command(
        neuron, "hang", {"marker": str(marker)}, cancel=cancel, on_progress=lambda _: cancel.set()
    )
    assert outcome.state is FinalState.CANCELLED
    assert not psutil.pid_exists(int(marker.read_text()))


async def test_an_isolated_coroutine_may_clean_up(
    neuron: Neuron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuron_sdk.ending.ASKED_S", 20.0)
    cancel, marker = asyncio.Event(), tmp_path / "said"
    neuron.command(isolation="process")(isolated.wait_for_cancel)
    outcome = await run_command(
        neuron,
        "wait_for_cancel",
        {"marker": str(marker)},
        cancel=cancel,
        cancel_reason="enough",
        on_progress=lambda _: cancel.set(),
    )
    assert outcome.state is FinalState.CANCELLED
    assert marker.read_text() == "cleaned up: enough"


async def test_an_isolated_handler_is_timed_out_also_while_its_process_starts(
    neuron: Neuron, tmp_path: Path
) -> None:
    marker = tmp_path / "pid"
    neuron.command(isolation="process")(isolated.hang)
    outcome = await run_command(neuron, "hang", {"marker": str(marker)}, run_timeout=0.5)
    assert outcome.state is FinalState.TIMED_OUT
    assert outcome.error is not None
    assert "still runs" not in outcome.error.message


# ---- built in, not running


async def test_a_built_in_command_says_that_nothing_runs(neuron: Neuron) -> None:
    outcome = await run_command(neuron, "pause")
    assert outcome.error is not None
    assert outcome.error.code == "NOT_RUNNING"


async def test_a_replaced_built_in_is_the_service_s(neuron: Neuron) -> None:
    neuron.command("pause", replace=True)(lambda: "mine")
    assert (await run_command(neuron, "pause")).response == {"result": "mine"}
