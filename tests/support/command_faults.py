"""What the tests of commands' faults and the soak run: witnesses as processes, and a deaf proxy."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from federation.v1 import command_pb2, command_service_pb2
from tests.support.calls import spec
from tests.support.evidence import Account, Note, complaints, read_accounts, read_notes
from tests.support.federation import Served
from tests.support.neuron_process import NeuronProcess
from tests.support.proxy import Proxy
from tests.support.waiting import eventually

WITNESS = ("-m", "tests.support.witness")
ONCE = command_pb2.EXECUTION_AT_MOST_ONCE


class Witness:
    """A neuron of `tests/support/witness.py`, its files and its own notes."""

    def __init__(self, name: str, folder: Path, process: NeuronProcess) -> None:
        self.name = name
        self.folder = folder
        self.process = process

    @property
    def notes(self) -> list[Note]:
        """What it has written down, over all its starts."""
        return read_notes(self.name, self.folder)

    def began(self, command_id: str) -> list[int]:
        """The attempts that began, in their order."""
        return [
            note.attempt
            for note in self.notes
            if (note.command_id, note.event) == (command_id, "began")
        ]

    def release(self) -> None:
        """Lets what is held come to its end."""
        (self.folder / "release").touch()

    def freeze(self) -> None:
        self.process.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        if self.process.alive:
            self.process.process.send_signal(signal.SIGCONT)


@contextmanager
def witness(
    folder: Path, name: str, address: str, token: str, **environment: str
) -> Iterator[Witness]:
    """A witness that was started, and is killed at the block's end."""
    folder.mkdir(exist_ok=True)
    settings = {
        "NEURON_ID": name,
        "ENROLLMENT_TOKEN": token,
        "WITNESS_FOLDER": str(folder),
        "METRICS_ENABLED": "false",
        "LOG_LEVEL": "DEBUG",
        "STOP_GRACE": "1",
        **environment,
    }
    process = NeuronProcess(folder, address, *WITNESS, **settings)
    try:
        process.start()
        yield Witness(name, folder, process)
    finally:
        process.kill()


class DeafProxy(Proxy):
    """A proxy whose client can be made deaf: what the server says does not reach it."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self._hearing = asyncio.Event()
        self._hearing.set()

    def deafen(self) -> None:
        """What the client says still reaches the server."""
        self._hearing.clear()

    def hear(self) -> None:
        """What was held back arrives."""
        self._hearing.set()

    def cut(self) -> None:
        """Cuts every connection; the next ones are whole again."""
        self._left = None
        super().cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await super()._serve(reader, writer)
        except OSError:  # there is no server now
            writer.transport.abort()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, upstream: bool
    ) -> None:
        if not upstream:
            source = _Held(source, self._hearing)  # type: ignore[assignment]  # all that is used
        await super()._pump(source, sink, upstream=upstream)


class _Held:
    """A reader that gives nothing while nobody may hear."""

    def __init__(self, source: asyncio.StreamReader, hearing: asyncio.Event) -> None:
        self._source = source
        self._hearing = hearing

    async def read(self, most: int) -> bytes:
        data = await self._source.read(most)
        await self._hearing.wait()
        return data


@asynccontextmanager
async def deaf_proxy(address: str) -> AsyncIterator[DeafProxy]:
    """A proxy to that address for the block."""
    host, _, port = address.rpartition(":")
    one = DeafProxy(host, int(port))
    await one.start()
    try:
        yield one
    finally:
        one.hear()
        await one.stop()


async def issue(
    served: Served,
    name: str,
    kind: str,
    /,
    *,
    data: dict[str, Any] | None = None,
    in_s: float = 0.0,
    **fields: Any,
) -> str:
    """Issues a command, to be sent in so many seconds at the earliest; gives its id."""
    wanted = spec(name, kind, **(data or {}))
    if in_s:
        time = Timestamp()
        time.FromDatetime(datetime.now(UTC) + timedelta(seconds=in_s))
        fields["not_before_time"] = time
    wanted.MergeFrom(command_service_pb2.CommandSpec(**fields))
    answer = await served.command.IssueCommand(
        command_service_pb2.IssueCommandRequest(command=wanted), metadata=served.admin, timeout=10
    )
    return answer.command.command_id


def span(seconds: float) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=seconds))
    return duration


async def ended(url: str, command_ids: list[str], *, within: float = 40.0) -> dict[str, Account]:
    """Waits until those commands have ended; gives what the ledger says of them."""

    async def look() -> dict[str, Account] | None:
        found = await asyncio.to_thread(read_accounts, url)
        own = {command_id: found[command_id] for command_id in command_ids}
        waiting = [account.told([]) for account in own.values() if not account.final]
        assert not waiting, "\n".join(waiting)
        return own

    return await eventually(look, within=within, describe="every command has ended")


def agree(accounts: dict[str, Account], *witnesses: Witness) -> None:
    """Fails if the ledger and the neurons' own notes do not agree, and says where."""
    notes = [note for each in witnesses for note in each.notes if note.command_id in accounts]
    found = complaints(accounts, notes)
    assert not found, "\n".join(found)
