"""A program as our child, PostgreSQL or another: started by the launcher, watched by a thread.

That thread starts the child *and* stays until it ends. It has to: Linux takes the end of the thread
that started a child for the end of its parent, and a thread of a pool may end before the process.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from enum import StrEnum
from pathlib import Path

from federation_server.store.embedded.home import Account

_LAUNCHER = Path(__file__).with_name("launch.py")

_PLAIN = {"LC_ALL": "C", "TZ": "UTC"}
"""So that complaints are in the words that we look for, and initdb does not guess a time zone."""


def environment_of_others() -> dict[str, str]:
    """Ours for a program that is not the server, which has no use for its settings: some are
    secrets, and it may run as an account that must not know them.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name not in {"DATABASE_URL", "ADMIN_API_KEY"} and not name.startswith("FEDERATION_")
    }


class Watch(StrEnum):
    """How a child learns that we have ended without stopping it; see `launch.py`."""

    KERNEL = "kernel"
    """The kernel signals it. Linux only."""

    GUARD = "guard"
    """The launcher stays beside it and signals it. Anywhere, at the price of one small process."""

    @classmethod
    def best(cls) -> "Watch":
        """The cheapest one that this system has."""
        return cls.KERNEL if sys.platform == "linux" else cls.GUARD


class Child:
    """One run of a program. `pid` is the program's, or the guard's that passes signals on to it."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        account: Account,
        watch: Watch,
        output: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start `command` as `account`, both its outputs going to the file descriptor `output`.

        environment: the child's, whole; by default that of others with the plain locale and UTC.

        Raises OSError when not even the launcher could be started.
        """
        self._exit: Future[int] = Future()
        self._exit.set_running_or_notify_cancel()  # from here on nobody who waits can cancel it
        started: Future[subprocess.Popen[bytes]] = Future()
        threading.Thread(
            target=self._keep,
            args=(
                _launched(command, account, watch),
                watch,
                output,
                environment_of_others() | _PLAIN if environment is None else dict(environment),
                started,
            ),
            name=f"keeper of {Path(command[0]).name}",
            daemon=True,
        ).start()
        self._process = started.result()

    def _keep(
        self,
        command: list[str],
        watch: Watch,
        output: int,
        environment: Mapping[str, str],
        started: "Future[subprocess.Popen[bytes]]",
    ) -> None:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if watch is Watch.GUARD else subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,  # a Ctrl-C in the terminal is for us alone to act on
            )
        except OSError as error:
            started.set_exception(error)
            return
        started.set_result(process)
        status = process.wait()
        if process.stdin is not None:
            process.stdin.close()
        self._exit.set_result(status)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit(self) -> "Future[int]":
        """Done when the child has ended, with its exit status (negative for a signal)."""
        return self._exit

    @property
    def returncode(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._exit.result() if self._exit.done() else None

    def wait(self, within: float | None = None) -> int:
        """The exit status, waited for at most `within` seconds; raises TimeoutError."""
        return self._exit.result(within)

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens when the child has ended already."""
        self._process.send_signal(number)


def _launched(command: Sequence[str | Path], account: Account, watch: Watch) -> list[str]:
    # -I -S: neither environment nor site-packages change what runs there, perhaps as root.
    launcher = [sys.executable, "-I", "-S", _LAUNCHER, os.getpid(), watch, account.uid, account.gid]
    return [str(word) for word in (*launcher, *command)]
