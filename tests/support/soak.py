"""The soak: all faults at random, over a flow of commands, and then the books are compared.

    python -m tests.support.soak --seconds 3600 --seed 7

One server, its PostgreSQL, neurons behind proxies and one without a stream; servers and neurons
are killed, stopped and frozen, PostgreSQL is stopped and frozen, streams are cut, stalled and made
deaf, while operators order, cancel, retry and follow. In the end everything is healed, every
command must end, and the ledger, the neurons' own notes and what operators were told must agree.
The seed fixes what is chosen, not what comes of it: the processes run freely.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from federation.v1 import neuron_pb2
from tests.support.calls import online
from tests.support.command_faults import DeafProxy, Witness, deaf_proxy, witness
from tests.support.evidence import Account, Note, complaints, read_accounts
from tests.support.faults import Postgres, calling, doomed_postgres, serving
from tests.support.federation import Served
from tests.support.postgres import passable_folder
from tests.support.processes import FederationProcess
from tests.support.pulling import PullingNeuron
from tests.support.soak_flow import Flow
from tests.support.waiting import eventually

WITNESSES = 4
HEALED_WITHIN_S = 120.0
LONGEST_OUTAGE_S = 4.0

Fault = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Post:
    """A witness, and the proxy between it and the server."""

    neuron: Witness
    between: DeafProxy


class Soak:
    """What the faults are done to, and what was done."""

    def __init__(
        self,
        postgres: Postgres,
        server: FederationProcess,
        posts: list[Post],
        chance: random.Random,
        *,
        longest_s: float,
    ) -> None:
        self.done: list[str] = []
        self._postgres = postgres
        self._server = server
        self._posts = posts
        self._chance = chance
        self._longest_s = longest_s
        self._began = time.monotonic()

    async def break_servers(self) -> None:
        """One fault of the server or of PostgreSQL after the other, until it is cancelled."""
        faults: list[Fault] = [
            self._kill_server,
            self._kill_server,
            self._restart_server,
            self._stop_postgres,
            self._freeze_postgres,
        ]
        await self._break(faults, 2, 8)

    async def break_neurons(self) -> None:
        """One fault of a neuron or its stream after the other, until it is cancelled."""
        faults: list[Fault] = [
            self._kill_neuron,
            self._kill_neuron,
            self._restart_neuron,
            self._freeze_neuron,
            self._cut,
            self._stall,
            self._deafen,
        ]
        await self._break(faults, 0.2, 2)

    async def keep_neurons(self) -> None:
        """Starts the neurons again that a command of theirs has ended, until it is cancelled."""
        while True:
            await asyncio.sleep(0.5)
            for post in self._posts:
                if not post.neuron.process.alive:
                    post.neuron.process.start()

    async def _break(self, faults: list[Fault], least_s: float, most_s: float) -> None:
        while True:
            await asyncio.sleep(self._chance.uniform(least_s, most_s))
            # Shielded: a fault that has begun is healed, also if the soak is over meanwhile.
            healing = asyncio.ensure_future(self._chance.choice(faults)())
            try:
                await asyncio.shield(healing)
            except asyncio.CancelledError:
                await healing
                raise

    def _note(self, what: str, post: Post | None = None) -> None:
        name = f" {post.neuron.name}" if post else ""
        self.done.append(f"{time.monotonic() - self._began:7.1f} s {what}{name}")

    async def _while_it_lasts(self) -> None:
        await asyncio.sleep(self._chance.uniform(0, self._longest_s))

    async def _kill_server(self) -> None:
        self._note("server killed")
        await asyncio.to_thread(self._server.kill)
        await asyncio.sleep(self._chance.uniform(0, 1))
        await asyncio.to_thread(self._server.start)

    async def _restart_server(self) -> None:
        self._note("server restarted")
        await asyncio.to_thread(self._server.stop)
        await asyncio.to_thread(self._server.start)

    async def _stop_postgres(self) -> None:
        self._note("PostgreSQL stopped")
        await asyncio.to_thread(self._postgres.embedded.stop)
        await self._while_it_lasts()
        await asyncio.to_thread(self._postgres.start)

    async def _freeze_postgres(self) -> None:
        self._note("PostgreSQL frozen")
        await asyncio.to_thread(self._postgres.freeze)
        await self._while_it_lasts()
        await asyncio.to_thread(self._postgres.thaw)

    async def _kill_neuron(self) -> None:
        post = self._chance.choice(self._posts)
        self._note("killed", post)
        await asyncio.to_thread(post.neuron.process.kill)  # `keep_neurons` starts it

    async def _restart_neuron(self) -> None:
        post = self._chance.choice(self._posts)
        self._note("told to stop", post)
        if post.neuron.process.alive:
            await post.neuron.process.stop()

    async def _freeze_neuron(self) -> None:
        post = self._chance.choice(self._posts)
        self._note("frozen", post)
        if post.neuron.process.alive:
            post.neuron.freeze()
            await self._while_it_lasts()
            post.neuron.thaw()

    async def _cut(self) -> None:
        post = self._chance.choice(self._posts)
        self._note("cut", post)
        post.between.cut_after(self._chance.randint(1, 2000))

    async def _stall(self) -> None:
        post = self._chance.choice(self._posts)
        self._note("stalled", post)
        post.between.stall()
        await self._while_it_lasts()
        if self._chance.random() < 0.5:
            post.between.cut()
        post.between.go_on()

    async def _deafen(self) -> None:
        post = self._chance.choice(self._posts)
        self._note("deaf", post)
        post.between.deafen()
        await self._while_it_lasts()
        if self._chance.random() < 0.5:
            post.between.cut()
        post.between.hear()


@asynccontextmanager
async def _posts(served: Served, folder: Path) -> AsyncIterator[list[Post]]:
    token = await served.enrollment_token()
    async with AsyncExitStack() as proxies:
        with ExitStack() as neurons:
            posts = []
            for number in range(WITNESSES):
                name = f"witness-{number}"
                between = await proxies.enter_async_context(deaf_proxy(served.address))
                neuron = neurons.enter_context(witness(folder / name, name, between.address, token))
                posts.append(Post(neuron, between))
            for post in posts:
                await online(served, post.neuron.name)
            yield posts


async def soak(seconds: float, seed: int, say: Callable[[str], object]) -> None:
    """Runs it; `say` gets what happens, line by line.

    Raises:
        AssertionError: the books do not agree; the text says all that is known.
    """
    say(f"seed {seed}, {seconds:g} s of faults")
    chance = random.Random(seed)  # noqa: S311 - chance, and no secret
    with (
        doomed_postgres() as postgres,
        passable_folder() as folder,
        serving(postgres, folder, FEDERATION_COMMAND_LOST_AFTER="PT5S") as server,
    ):
        async with calling(server) as served, _posts(served, folder) as posts:
            longest_s = LONGEST_OUTAGE_S if seconds < 300 else 20.0
            work = Soak(postgres, server, posts, chance, longest_s=longest_s)
            try:
                await _run(work, served, posts, postgres, seconds, chance, say)
                before, word, after = server.output.partition("Traceback")
                assert not word, f"{before[-1000:]}{word}{after[:8000]}"
            except BaseException:
                say(f"seed {seed}: it failed")
                say("\n".join(work.done))
                say(f"the server's last words:\n{server.output[-4000:]}")
                raise


async def _run(  # noqa: PLR0917 - the parts of one thing
    work: Soak,
    served: Served,
    posts: list[Post],
    postgres: Postgres,
    seconds: float,
    chance: random.Random,
    say: Callable[[str], object],
) -> None:
    command_types = [neuron_pb2.CommandType(type="work")]
    token = await served.register("puller", command_types=command_types)
    pulling = PullingNeuron(served, "puller", token, chance)
    flow = Flow(served, [post.neuron.name for post in posts], [pulling.name], chance)
    async with asyncio.TaskGroup() as group:
        for_ever = [group.create_task(each) for each in (pulling.run(), work.keep_neurons())]
        breaking = [
            group.create_task(each) for each in (work.break_servers(), work.break_neurons())
        ]
        ordering = group.create_task(flow.run(seconds))
        await asyncio.wait([ordering], timeout=seconds)
        for task in breaking:
            task.cancel()
        await asyncio.wait(breaking)
        for post in posts:
            post.between.hear()
            post.between.cut()
        say(f"{len(work.done)} faults; everything is healed")
        await ordering
        accounts = await _all_ended(postgres)
        for task in for_ever:
            task.cancel()
    notes = [note for post in posts for note in post.neuron.notes] + pulling.notes
    _settle(accounts, notes, flow, say)
    say("faults: " + _counts(" ".join(each.split()[2:4]) for each in work.done))


async def _all_ended(postgres: Postgres) -> dict[str, Account]:
    async def look() -> dict[str, Account] | None:
        accounts = await asyncio.to_thread(read_accounts, postgres.url)
        waiting = [account.told([]) for account in accounts.values() if not account.final]
        assert not waiting, "\n".join(waiting)
        return accounts

    return await eventually(look, within=HEALED_WITHIN_S, describe="every command has ended")


def _settle(
    accounts: dict[str, Account], notes: list[Note], flow: Flow, say: Callable[[str], object]
) -> None:
    wrong = complaints(accounts, notes) + flow.untrue(accounts)
    ends = _counts(account.state.value for account in accounts.values())
    say(f"{len(accounts)} commands, {len(flow.followed)} followed: {ends}")
    assert not wrong, f"{len(wrong)} complaints:\n" + "\n".join(wrong)


def _counts(words: object) -> str:
    return ", ".join(f"{number} {word}" for word, number in Counter(words).most_common())  # type: ignore[call-overload]


def main() -> None:
    """The command line: `make soak`."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long (default: 3600)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()

    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    asyncio.run(soak(options.seconds, options.seed, say))


if __name__ == "__main__":
    main()
