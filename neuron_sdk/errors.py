"""Every exception that the SDK raises on purpose.

All are `NeuronError`s. None of them is raised because the federation is away: an outage is
logged, waited out, and never reaches the service.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class NeuronError(Exception):
    """The base of every exception of the SDK."""


class ConfigError(NeuronError):
    """A setting cannot be used. Its text names the setting (an argument of `Neuron`, or an
    environment variable) and says what to do. `neuron.run()` ends the process with exit code 2.
    """


class StateDirInUse(ConfigError):
    """Another process uses the same STATE_DIR: two neurons must not share a spool."""


class HandlerError(NeuronError):
    """A function cannot be a command's handler; raised when the neuron is built, never when a
    command arrives. Its text names the function, the parameter and the remedy.
    """


class LifecycleError(NeuronError):
    """A neuron was started twice, or used in a way that its state does not allow."""


class CommandFailed(NeuronError):
    """Raise this in a handler to end its command as FAILED, with words of your own.

    Attributes:
        code: a word for programs, 1 to 128 characters, for example "SOURCE_NOT_FOUND".
        message: a sentence for people.
        details: anything else, as JSON; at most 64 KiB and 16 levels deep.
    """

    def __init__(self, code: str, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.details = details


class CommandInterrupted(BaseException):
    """Raised inside a function that must end and has not by itself: somebody has cancelled its
    command, its time is over, or the neuron stops.

    A BaseException, so that a handler's `except Exception` does not swallow it; `finally` blocks
    run as always. Coroutines see asyncio.CancelledError instead.
    """


class IsolatedImport(BaseException):
    """Raised by `neuron.run()` in the process of an isolated handler, which imports the neuron's
    module only to find the handler. Never seen in a neuron's own process.
    """
