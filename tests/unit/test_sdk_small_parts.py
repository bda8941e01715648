"""Backoff, lanes, intervals, recovery, relay, reports: rules without a network."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any, TypeVar

import grpc
import grpc.aio
import pytest
from google.rpc import status_pb2
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo

from neuron_sdk.backoff import Backoff
from neuron_sdk.channel import RpcFailure, read_failure
from neuron_sdk.context import CommandContext, Progress
from neuron_sdk.convert import report_message
from neuron_sdk.intervals import Intervals, SessionIntervals
from neuron_sdk.lanes import Lane
from neuron_sdk.metrics import Metrics
from neuron_sdk.outcome import MAX_LOG_TAIL_BYTES
from neuron_sdk.points import Point
from neuron_sdk.recovery import gives_turn, recover
from neuron_sdk.relay import ProgressRelay
from neuron_sdk.reports import Reports, make_event

T = TypeVar("T")


def highest(low: float, high: float) -> float:
    return high


# ---- backoff


def test_waits_grow_to_their_limit() -> None:
    backoff = Backoff(first_s=0.5, most_s=60, uniform=highest)
    assert [backoff.next_s(0.0) for _ in range(9)] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]


def test_a_wait_may_be_anything_from_zero() -> None:
    seen: list[tuple[float, float]] = []

    def lowest(low: float, high: float) -> float:
        seen.append((low, high))
        return low

    assert Backoff(uniform=lowest).next_s(0.0) == 0.0
    assert seen == [(0.0, 0.5)]


def test_a_session_that_lasted_begins_the_waits_anew() -> None:
    backoff = Backoff(stable_s=10, uniform=highest)
    for _ in range(5):
        backoff.next_s(0.0)
    backoff.opened(100.0)
    assert backoff.next_s(105.0) == 16, "it lasted 5 s only"
    backoff.opened(200.0)
    assert backoff.next_s(211.0) == 0.5


def test_what_the_federation_asks_for_is_kept_and_spread() -> None:
    assert Backoff(uniform=lambda low, _: low).next_s(0.0, at_least=60) == 60
    assert Backoff(uniform=highest).next_s(0.0, at_least=60) == 66


def test_neurons_that_are_told_the_same_wait_do_not_come_back_together() -> None:
    waits = {Backoff().next_s(0.0, at_least=5) for _ in range(100)}
    assert len(waits) == 100
    assert all(5 <= wait <= 5.5 for wait in waits)


def test_a_turn_is_kept_and_spread_little_however_long_the_outage_before_was() -> None:
    backoff = Backoff(first_s=0.5, most_s=60, uniform=highest)
    for _ in range(6):
        backoff.next_s(0.0)
    assert backoff.turn_s(2.0) == 2.5
    assert backoff.turn_s(20.0) == 21.0
    assert Backoff(uniform=lambda low, _: low).turn_s(2.0) == 2.0
    assert backoff.next_s(0.0) == 32, "a turn is no failure"


# ---- lanes


def test_the_higher_priority_goes_first_then_the_older() -> None:
    lane: Lane[str] = Lane(9)
    lane.held = True
    for number, (name, priority) in enumerate([("a", 5), ("b", 9), ("c", 5), ("d", 0)]):
        lane.enter(name, priority, number)
    assert lane.take() is None
    lane.held = False
    assert [lane.take() for _ in range(5)] == ["b", "a", "c", "d", None]


def test_a_lane_has_no_more_places_than_it_has() -> None:
    lane: Lane[str] = Lane(1)
    lane.enter("a", 5, 1)
    lane.enter("b", 5, 2)
    assert (lane.take(), lane.take()) == ("a", None)
    lane.give_back()
    assert lane.take() == "b"


def test_who_leaves_the_queue_gets_no_place() -> None:
    lane: Lane[str] = Lane(1)
    lane.enter("a", 5, 1)
    lane.enter("b", 5, 2)
    assert lane.leave("a")
    assert not lane.leave("a")
    assert lane.waiting() == 1
    assert lane.take() == "b"
    assert not lane.leave("b"), "it has its place already"


# ---- intervals


async def test_the_federations_interval_wins_over_the_neurons_own() -> None:
    intervals = Intervals(60, 300)
    intervals.obey(SessionIntervals(heartbeat=5))
    assert (intervals.heartbeat, intervals.analytics) == (5, 300)
    intervals.set_own(heartbeat=20)
    assert intervals.heartbeat == 5
    intervals.obey(SessionIntervals())
    assert intervals.heartbeat == 20, "the last word holds, also where it says nothing"


async def test_the_least_interval_holds_whoever_has_set_a_shorter_one() -> None:
    intervals = Intervals(60, 300)
    intervals.obey(SessionIntervals(min_heartbeat=20))
    assert intervals.heartbeat == 60
    intervals.obey(SessionIntervals(min_heartbeat=90))
    assert intervals.heartbeat == 90
    intervals.obey(SessionIntervals(heartbeat=5, min_heartbeat=20))
    assert intervals.heartbeat == 20
    intervals.obey(SessionIntervals(heartbeat=5))
    assert intervals.heartbeat == 5


async def test_a_change_wakes_who_waits() -> None:
    intervals = Intervals(60, 300)
    waiting = asyncio.create_task(intervals.wait(asyncio.get_running_loop().time() + 60))
    await asyncio.sleep(0)
    intervals.obey(SessionIntervals(heartbeat=5))
    assert await waiting is False
    assert await intervals.wait(0.0) is True


# ---- recovery


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("NEURON_EXISTS", "NEURON_ID"),
        ("ENROLLMENT_REFUSED", "this ENROLLMENT_TOKEN is unknown"),
        ("INVALID_FIELD", "correct the fields"),
        ("CREDENTIAL_MISSING", "ENROLLMENT_TOKEN"),
        ("NEURON_DEACTIVATED", "activate"),
        ("SESSION_SUPERSEDED", "same neuron_id"),
    ],
)
def test_what_only_a_person_can_mend_is_tried_slowly_and_says_how(reason: str, remedy: str) -> None:
    plan = recover(reason, "ANY", enrollable=True, registering=True)
    assert plan.slow
    assert remedy in plan.remedy


@pytest.mark.parametrize("code", ["UNIMPLEMENTED", "OUT_OF_RANGE"])
def test_who_does_not_speak_the_contract_is_no_federation_and_is_tried_slowly(code: str) -> None:
    plan = recover("", code, enrollable=True, registering=False)
    assert plan.slow
    assert "FEDERATION_URL" in plan.remedy


@pytest.mark.parametrize("reason", ["SERVER_BUSY", "RATE_LIMITED"])
def test_a_busy_federation_gives_turns(reason: str) -> None:
    assert gives_turn(reason)
    assert not gives_turn("DATABASE_UNAVAILABLE")
    for registering in (True, False):
        plan = recover(reason, "RESOURCE_EXHAUSTED", enrollable=True, registering=registering)
        assert plan.turn
        assert not plan.slow
        assert not plan.register_again


def failure(**info: Any) -> RpcFailure:
    """What the SDK makes of a RESOURCE_EXHAUSTED with that ErrorInfo."""
    status = status_pb2.Status()
    for detail in (ErrorInfo(domain="federation", **info), RetryInfo(retry_delay={"seconds": 3})):
        status.details.add().Pack(detail)
    trailers = grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    return read_failure(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers))


def test_who_is_told_to_wait_for_bad_credentials_replaces_its_own() -> None:
    told = failure(reason="RATE_LIMITED", metadata={"limit": "FAILED_CREDENTIAL_RATE"})
    plan = recover(told.reason, told.code, enrollable=True, registering=False)
    assert (plan.register_again, plan.turn, told.retry_after) == (True, False, 3.0)
    told = failure(reason="RATE_LIMITED", metadata={"limit": "NEURON_CALL_RATE"})
    plan = recover(told.reason, told.code, enrollable=True, registering=False)
    assert (plan.register_again, plan.turn, told.retry_after) == (False, True, 3.0)


def test_what_passes_by_itself_is_tried_soon() -> None:
    plan = recover("DATABASE_UNAVAILABLE", "UNAVAILABLE", enrollable=True, registering=True)
    assert not plan.slow
    assert not plan.register_again


def test_a_token_that_has_expired_is_replaced_at_once() -> None:
    plan = recover("CREDENTIAL_EXPIRED", "UNAUTHENTICATED", enrollable=True, registering=False)
    assert plan.register_again
    assert not plan.slow


def test_a_token_that_was_revoked_is_replaced_slowly_because_its_new_owner_would_do_the_same() -> (
    None
):
    plan = recover("CREDENTIAL_INVALID", "UNAUTHENTICATED", enrollable=True, registering=False)
    assert plan.slow
    assert plan.register_again
    assert "same neuron_id" in plan.remedy


# ---- context


def context() -> CommandContext:
    return CommandContext(command_id="c", attempt=1, type="t", report=lambda _: None)


def test_the_log_tail_holds_the_last_16_kib() -> None:
    ctx = context()
    for number in range(1000):
        ctx.log.info(f"line {number}", text="é" * 20)  # noqa: G004 - no logger of logging
    tail = ctx.log.tail()
    assert len(tail.encode()) <= MAX_LOG_TAIL_BYTES
    assert "line 999" in tail
    assert "line 0 " not in tail


def test_a_log_line_has_time_level_and_fields() -> None:
    ctx = context()
    ctx.log.warning("slow", rows=5)
    assert ctx.log.tail().endswith("WARNING slow rows=5")


async def test_progress_is_held_to_its_range() -> None:
    told: list[Progress] = []
    ctx = CommandContext(command_id="c", attempt=1, type="t", report=told.append)
    await ctx.progress(-1)
    await ctx.progress(7, "x" * 2000)
    assert [p.fraction for p in told] == [0.0, 1.0]
    assert len(told[1].message) == 1024
    with pytest.raises(ValueError, match="NaN"):
        await ctx.progress(float("nan"))


# ---- relay


def kept_by(passed: list[T], what: T) -> Future[None]:
    passed.append(what)
    kept: Future[None] = Future()
    kept.set_result(None)
    return kept


async def test_progress_that_follows_fast_is_passed_on_by_its_newest() -> None:
    passed: list[float] = []
    relay = ProgressRelay(asyncio.get_running_loop(), lambda p: kept_by(passed, p.fraction))
    for number in range(1000):
        relay.tell(Progress(number / 1000, ""))
    await asyncio.sleep(0.01)
    assert passed == [0.999]
    relay.tell(Progress(1.0, ""))
    await asyncio.sleep(0.01)
    assert passed == [0.999], "not more often than twice a second"
    relay.close()
    relay.tell(Progress(1.0, ""))


async def test_progress_takes_along_the_checkpoint_that_it_overtakes() -> None:
    passed: list[Progress] = []
    relay = ProgressRelay(asyncio.get_running_loop(), lambda p: kept_by(passed, p))
    kept = relay.tell(Progress(0.5, "", {"rows": 1}))
    relay.tell(Progress(0.6, ""))
    assert kept is not None
    await asyncio.wrap_future(kept)
    assert passed == [Progress(0.6, "", {"rows": 1})]
    relay.tell(Progress(0.7, ""))
    relay.tell(Progress(0.8, "", {"rows": 2}))
    relay.close()
    assert passed[1:] == [Progress(0.8, "", {"rows": 2})], "neither is passed on twice"


# ---- reports


def test_a_report_holds_measurements_and_events() -> None:
    metrics = Metrics()
    reports = Reports(metrics, lambda: [Point("g", "gauge", "", {}, 1.0)], now=lambda: 50.0)
    metrics.track_request(5)
    reports.note(make_event("started", "hello", "INFO", {"a": 1}, 49.0))
    (report,) = reports.take()
    assert {point.name for point in report.points} >= {"requests", "response_ms", "g"}
    assert [event.type for event in report.events] == ["started"]
    assert report.start_time <= report.end_time == 50.0


def test_too_much_for_one_report_becomes_several_within_the_limits() -> None:
    reports = Reports(Metrics(), list)
    for number in range(1500):
        reports.note(make_event("e", str(number), "INFO", {"a": "x" * 2000}, 0.0))
    cut = reports.take()
    assert sum(len(report.events) for report in cut) == 1500
    for report in cut:
        assert len(report.events) <= 1000
        assert report_message(report).ByteSize() <= 2**20


def test_many_large_points_fit_into_several_reports() -> None:
    metrics = Metrics()
    bounds = [float(n) for n in range(100)]
    for number in range(1500):
        metrics.histogram(f"h{number}", bounds=bounds, labels={"zone": "é" * 200}).observe(5)
    cut = Reports(metrics, list).take()
    assert sum(len(report.points) for report in cut) == 1500
    assert all(report_message(report).ByteSize() <= 2**20 for report in cut)


def test_events_are_bounded_and_the_newest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuron_sdk.reports.MAX_BUFFERED_EVENTS", 10)
    reports = Reports(Metrics(), list)
    for number in range(25):
        reports.note(make_event("e", str(number), "INFO", {}, 0.0))
    (report,) = reports.take_events()
    assert [event.message for event in report.events] == [str(n) for n in range(15, 25)]


def test_events_of_severity_error_and_above_come_in_reports_of_their_own_and_first() -> None:
    metrics = Metrics()
    reports = Reports(metrics, list)
    for take in (reports.take, reports.take_events):
        metrics.track_request(5)
        for severity in ("INFO", "ERROR", "WARNING", "CRITICAL"):
            reports.note(make_event("e", severity, severity, {}, 0.0))
        errors, rest = take()
        assert [event.message for event in errors.events] == ["ERROR", "CRITICAL"]
        assert [event.message for event in rest.events] == ["INFO", "WARNING"]
        assert (errors.grave, rest.grave) == (True, False)
        assert not errors.points
    assert reports.take()[0].points, "what was measured waits for its interval"


def test_a_flood_of_lesser_events_does_not_push_an_error_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("neuron_sdk.reports.MAX_BUFFERED_EVENTS", 10)
    reports = Reports(Metrics(), list)
    reports.note(make_event("e", "grave", "ERROR", {}, 0.0))
    for number in range(25):
        reports.note(make_event("e", str(number), "INFO", {}, 0.0))
    errors, rest = reports.take_events()
    assert [event.message for event in errors.events] == ["grave"]
    assert [event.message for event in rest.events] == [str(n) for n in range(16, 25)]
    for number in range(11):
        reports.note(make_event("e", str(number), "ERROR", {}, 0.0))
    (errors,) = reports.take_events()
    assert [event.message for event in errors.events] == [str(n) for n in range(1, 11)]


def test_an_error_does_not_wait_for_the_interval() -> None:
    urgent: list[bool] = []
    reports = Reports(Metrics(), list)
    reports.listen(lambda: urgent.append(True))
    reports.note(make_event("e", "", "WARNING", {}, 0.0))
    assert not urgent
    reports.note(make_event("e", "", "ERROR", {}, 0.0))
    assert urgent


def test_a_clock_that_was_set_back_makes_no_impossible_span() -> None:
    clock = [100.0]
    reports = Reports(Metrics(), lambda: [Point("g", "gauge", "", {}, 1.0)], now=lambda: clock[0])
    clock[0] = 50.0
    (report,) = reports.take()
    assert report.start_time <= report.end_time == 50.0


@pytest.mark.parametrize("type_", ["", "9x", "a b", "é", "x" * 129, "a\n"])
def test_a_bad_event_type_raises(type_: str) -> None:
    with pytest.raises(ValueError, match="event type"):
        make_event(type_, "", "INFO", {}, 0.0)


def test_bad_attributes_do_not_lose_the_event() -> None:
    event = make_event("e", "m", "INFO", {"x": object()}, 0.0)
    assert "left_out" in event.attributes
