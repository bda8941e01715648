"""A restart by command: the program is executed again in its own process, and the new one answers.

The command is left in the journal as carried over. Whoever opens the journal next ends it: the
new process once it is ready and has a session; this one if it cannot be replaced.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from neuron_sdk.outcome import CommandOutcome, FinalState, failed

SUCCEEDED = CommandOutcome(FinalState.SUCCEEDED, response={"restarted": True})


def failed_restart(problem: str) -> CommandOutcome:
    """The end of a restart that did not bring the neuron back."""
    return failed("RESTART_FAILED", problem)


def execute_again(folder: Path) -> OSError:
    """Replace this process by its own program, started in `folder`; returns why it cannot."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.chdir(folder)  # the arguments may be relative to it
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - ourselves
    except OSError as error:
        return error
