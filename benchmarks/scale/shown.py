"""What an operator is shown meanwhile: the fleet's overview, asked for again and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from benchmarks.processes import Served
from federation.v1 import fleet_service_pb2, neuron_pb2
from federation.v1.fleet_service_pb2_grpc import FleetServiceStub

ASK_EACH_S = 0.25
PATIENCE_S = 5.0

OPTIONS = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500))


class Shown:
    """Every answer so far; a thread asks."""

    def __init__(self, served: Served) -> None:
        """Asks nothing yet."""
        self.most: dict[str, int] = {}
        """Of each presence, the most neurons that any answer has shown."""
        self.last: dict[str, int] = {}
        self.last_asked = 0.0
        """When the last answer was asked for, on the monotonic clock."""
        self.answers = 0
        self.without_answer = 0
        self._over = threading.Event()
        self._channel: Any = grpc.insecure_channel(served.address, options=OPTIONS)
        self._key = (("x-admin-key", served.admin_key),)

    def ask(self) -> None:
        """Asks until it is over."""
        stub = FleetServiceStub(self._channel)
        while not self._over.wait(ASK_EACH_S):
            asked = time.monotonic()
            try:
                answer: Any = stub.GetFleetOverview(
                    fleet_service_pb2.GetFleetOverviewRequest(top=1),
                    metadata=self._key,
                    timeout=PATIENCE_S,
                )
            except grpc.RpcError:
                self.without_answer += 1
                continue
            now = {
                neuron_pb2.Presence.Name(each.presence).removeprefix("PRESENCE_"): each.count
                for each in answer.presences
            }
            for presence, count in now.items():
                self.most[presence] = max(count, self.most.get(presence, 0))
            self.last, self.last_asked = now, asked
            self.answers += 1

    def end(self) -> None:
        """No further questions."""
        self._over.set()

    def close(self) -> None:
        """Gives the connection back."""
        self._channel.close()

    def all_online(self, neurons: int, since: float) -> bool:
        """Whether an answer that was asked for after `since` has shown them all ONLINE."""
        return self.last_asked >= since and self.last.get("ONLINE") == neurons


@contextmanager
def shown(served: Served) -> Iterator[Shown]:
    """Asks within the block; the server may go and come back at the same address."""
    asking = Shown(served)
    thread = threading.Thread(target=asking.ask, daemon=True)
    thread.start()
    try:
        yield asking
    finally:
        asking.end()
        thread.join(2 * PATIENCE_S)
        asking.close()
