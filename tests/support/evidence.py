"""What the ledger says became of commands, what the neurons' own notes say, and whether they agree.

The notes are what `tests/support/witness.py` writes: a line for the beginning of each run, and one
for each that came to its end. `complaints` holds the two against each other and against the rules
that hold whatever was killed when.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg

from federation_server.domain.command import FINAL_STATES, TRANSITIONS, CommandState
from tests.support.postgres import libpq


@dataclass(frozen=True, slots=True)
class Note:
    """A line of a neuron's own notes."""

    journal: str
    """Whose: a name for the STATE_DIR that the process ran on."""
    command_id: str
    attempt: int
    event: str
    """"began" or "ended"."""


@dataclass(frozen=True, slots=True)
class Step:
    """A change of state."""

    revision: int
    state: CommandState
    attempt: int
    time: str
    actor: str
    reason: str


@dataclass(slots=True)
class Account:
    """A command, as the ledger tells it."""

    command_id: str
    neuron_id: str
    type: str
    once: bool
    max_attempts: int
    state: CommandState
    attempt: int
    response: dict[str, Any] | None
    error_code: str | None
    batch_id: str | None
    steps: list[Step] = field(default_factory=list)

    @property
    def final(self) -> bool:
        return self.state in FINAL_STATES

    def told(self, notes: Iterable[Note]) -> str:
        """All that is known of it, for people."""
        execution = " at most once" if self.once else ""
        lines = [f"{self.command_id} {self.type}{execution} on {self.neuron_id}: {self.state}"]
        lines.append(f"    attempt {self.attempt} of {self.max_attempts}, error {self.error_code}")
        lines.append(f"    response {self.response}")
        for each in self.steps:
            step = f"r{each.revision} {each.state} a{each.attempt} {each.actor} {each.reason}"
            lines.append(f"    {each.time} {step}")
        lines += [f"    {each.journal}: a{each.attempt} {each.event}" for each in notes]
        return "\n".join(lines)


_ACCOUNTS = b"""
SELECT command_id::text, neuron_id, type, execution = 'AT_MOST_ONCE', max_attempts, state::text,
    attempt, response, error_code, batch_id::text
FROM commands ORDER BY create_time
"""
_STEPS = b"""
SELECT command_id::text, revision, state::text, attempt, transition_time::text, actor, reason
FROM command_transitions ORDER BY command_id, revision
"""


def read_accounts(url: str) -> dict[str, Account]:
    """Every command of that database."""
    with psycopg.connect(libpq(url)) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        found = {}
        for command_id, neuron_id, kind, once, most, state, *rest in connection.execute(_ACCOUNTS):
            found[command_id] = Account(
                command_id, neuron_id, kind, once, most, CommandState(state), *rest
            )
        for command_id, revision, state, attempt, time, actor, reason in connection.execute(_STEPS):
            step = Step(revision, CommandState(state), attempt, time, actor, reason)
            found[command_id].steps.append(step)
    return found


def read_notes(journal: str, folder: Path) -> list[Note]:
    """What a witness has written."""
    file = folder / "runs"
    lines = file.read_text().splitlines() if file.exists() else []
    return [
        Note(journal, each["command_id"], each["attempt"], each["event"])
        for each in map(json.loads, lines)
    ]


def complaints(accounts: dict[str, Account], notes: Iterable[Note]) -> list[str]:
    """What must not be, each with all that is known of the command."""
    of: dict[str, list[Note]] = {command_id: [] for command_id in accounts}
    for note in notes:
        of[note.command_id].append(note)
    return [
        f"{wrong}:\n{account.told(of[command_id])}"
        for command_id, account in accounts.items()
        for wrong in [*_wrong_in_itself(account), *_wrong_beside(account, of[command_id])]
    ]


def _wrong_in_itself(account: Account) -> Iterator[str]:
    if not account.final:
        yield "it has not ended"
    yield from impossible(account)


def impossible(account: Account) -> Iterator[str]:
    """What no command's history may have, whether it has ended or not."""
    steps = account.steps
    if (steps[0].state, steps[0].attempt) != (CommandState.QUEUED, 0):
        yield "it does not begin as QUEUED"
    if (steps[-1].state, steps[-1].attempt) != (account.state, account.attempt):
        yield "its history ends elsewhere"
    for before, after in pairwise(steps):
        if after.state not in TRANSITIONS[before.state]:
            yield f"{before.state} to {after.state} is not allowed"
        if not before.attempt <= after.attempt <= account.max_attempts:
            yield f"attempt {after.attempt} after {before.attempt}"
    if sum(each.state in FINAL_STATES for each in steps) > 1:
        yield "it has several ends"
    sent = [each.attempt for each in steps if each.state is CommandState.SENT]
    if sent != list(range(1, len(sent) + 1)):
        yield f"attempts {sent}"


def _wrong_beside(account: Account, notes: list[Note]) -> Iterator[str]:
    began = Counter((each.journal, each.attempt) for each in notes if each.event == "began")
    for (journal, attempt), number in began.items():
        if number > 1:
            yield f"attempt {attempt} ran {number} times with the living journal of {journal}"
        if attempt > account.attempt:
            yield f"attempt {attempt} ran and was never sent"
    if account.once and began.total() > 1:
        yield f"it ran {began.total()} times and may run once"
    ran = any(attempt == account.attempt for _, attempt in began)
    if account.state is CommandState.SUCCEEDED:
        if not any(each.event == "ended" and each.attempt == account.attempt for each in notes):
            yield "it SUCCEEDED, and no run came to its end"
        if (account.response or {}).get("attempt") != account.attempt:
            yield "its answer is another attempt's"
    if account.state is CommandState.REJECTED and ran:
        yield "it was REJECTED and ran"
    if account.attempt == 0 and began:
        yield "it ran and was never sent"
