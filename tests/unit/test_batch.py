"""What waits for the writer: merged, split and halved without losing anything."""

from __future__ import annotations

import gc
from datetime import datetime
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from federation_server.domain.neuron import Presence
from federation_server.live.batch import Batch
from federation_server.store.ingest import ClosedItem, DurableItem, HeartbeatItem
from tests.support.neurons import heartbeat


class Silent:
    """A sender that notes only whether it came too late."""

    was_fenced = False

    def stored(self, mark: int, time: datetime) -> None:
        raise AssertionError("nothing is stored here")

    def fenced(self) -> None:
        self.was_fenced = True

    def refused(self, sequence: int, message: str) -> None:
        raise AssertionError("nothing is refused here")


def beat(neuron_id: str, epoch: int) -> HeartbeatItem:
    return HeartbeatItem(neuron_id, epoch, "i", heartbeat())


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    numbers = st.integers(0, 4)
    batch = Batch()
    for number in range(draw(numbers)):
        batch.beat(Silent(), beat(f"n{number}", 1))
    for number in range(draw(numbers)):
        item = DurableItem("n", 1, "s", number + 1, None)
        batch.durables.append((Silent(), item, draw(st.integers(1, 9))))
    batch.reopened.extend((f"n{number}", 1) for number in range(draw(numbers)))
    batch.closed.extend(
        ClosedItem(f"n{number}", 1, Presence.OFFLINE, "") for number in range(draw(numbers))
    )
    return batch


def items(batch: Batch) -> list[list[Any]]:
    return [
        [item for _, item in batch.heartbeats.values()],
        [item for _, item, _ in batch.durables],
        batch.reopened,
        batch.closed,
    ]


def joined(first: Batch, second: Batch) -> list[list[Any]]:
    return [a + b for a, b in zip(items(first), items(second), strict=True)]


@given(batches().filter(lambda batch: len(batch) > 1))
def test_both_halves_are_smaller_than_the_whole_and_make_it_up(batch: Batch) -> None:
    one, other = batch.halves()
    assert 0 < len(one) < len(batch)
    assert 0 < len(other) < len(batch)
    assert joined(one, other) == items(batch)


@given(batches(), st.integers(1, 20))
def test_what_is_split_off_makes_up_the_batch_with_what_is_left(
    batch: Batch, most_bytes: int
) -> None:
    before = items(batch)
    rest = batch.split(most_bytes)
    assert joined(batch, rest) == before
    assert batch.bytes <= most_bytes or len(batch.durables) == 1
    assert not (rest.durables and batch.closed)


def test_of_two_batches_the_newer_heartbeats_count_and_the_older_senders_are_kept_in_mind() -> None:
    old, new = Silent(), Silent()
    older, newer = Batch(), Batch()
    older.beat(old, beat("n", 1))
    newer.beat(new, beat("n", 1))
    both = older.before(newer)
    assert both.heartbeats["n"][0] is new
    assert set(both.replaced) == {old}


def test_a_heartbeat_of_an_older_session_never_takes_the_place_of_the_newer_ones() -> None:
    late, new = Silent(), Silent()
    batch = Batch()
    assert not batch.beat(new, beat("n", 2))
    assert batch.beat(late, beat("n", 1))
    assert batch.heartbeats["n"] == (new, beat("n", 2))
    assert (late.was_fenced, set(batch.replaced)) == (True, set())


def test_a_heartbeat_without_a_session_is_the_newest_whatever_came_before() -> None:
    stream, call = Silent(), Silent()
    batch = Batch()
    batch.beat(stream, beat("n", 2))
    batch.beat(call, beat("n", 0))
    assert batch.heartbeats["n"][0] is call


def test_a_replaced_sender_that_has_gone_is_not_held() -> None:
    batch = Batch()
    for _ in range(100):
        batch.beat(Silent(), beat("n", 0))
    gc.collect()
    assert len(batch.replaced) == 0
