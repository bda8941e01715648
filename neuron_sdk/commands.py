"""The commands that a neuron knows: which function runs, where, and what it takes.

`CommandRegistry` is filled by decorators while the neuron is built, and read-only once it has
started. Everything wrong with a handler raises HandlerError here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from neuron_sdk.description import CommandTypeInfo
from neuron_sdk.errors import HandlerError
from neuron_sdk.payload import clean_text
from neuron_sdk.schema import Handler, Parameters, read_signature

_TYPE = re.compile(r"[a-z][a-z0-9_.-]{0,127}")
_MAX_TYPES = 256

Isolation = Literal["process"]


@dataclass(frozen=True, slots=True)
class Command:
    """One command that the neuron accepts."""

    type: str
    handler: Handler
    parameters: Parameters
    description: str = ""
    control: bool = False
    """It runs in the control lane, which long work never delays."""
    isolation: Isolation | None = None
    """"process": it runs in a process of its own, which can be killed."""
    is_coroutine: bool = False
    builtin: bool = False
    """It is the SDK's, and runs on the control channel's own loop."""

    def info(self) -> CommandTypeInfo:
        """The command as it is advertised."""
        return CommandTypeInfo(
            self.type, self.description, self.parameters.data_schema, self.control
        )


class CommandRegistry:
    """The commands of one neuron, unique by type."""

    def __init__(self) -> None:
        self._commands: dict[str, Command] = {}

    def __iter__(self) -> Iterator[Command]:
        return iter(self._commands.values())

    def get(self, type: str) -> Command | None:  # noqa: A002 - the contract's word
        """The command of that type; None if the neuron does not know it."""
        return self._commands.get(type)

    def add(self, command: Command, *, replace: bool = False) -> None:
        """Take a command in.

        Raises:
            HandlerError: the type is taken (by a built-in: say `replace=True`), or there are
                more than 256.
        """
        known = self._commands.get(command.type)
        if known is not None and known.builtin and not replace:
            raise HandlerError(
                f"command {command.type!r} is built in: choose another name, or say replace=True "
                "to put yours in its place"
            )
        if known is not None and not known.builtin:
            raise HandlerError(f"command {command.type!r} has a handler already: remove one")
        if known is None and len(self._commands) >= _MAX_TYPES:
            raise HandlerError(f"a neuron has at most {_MAX_TYPES} commands")
        self._commands[command.type] = command


def make_command(
    handler: Handler,
    type: str | None = None,  # noqa: A002 - the contract's word
    *,
    description: str | None = None,
    control: bool = False,
    isolation: Isolation | None = None,
    builtin: bool = False,
) -> Command:
    """A command that `handler` carries out.

    Args:
        handler: a function or coroutine function.
        type: what operators call it; default: the function's name.
        description: for people; default: the first paragraph of the docstring.
        control: whether it runs in the control lane.
        isolation: "process" for a process of its own.
        builtin: whether it is the SDK's.

    Raises:
        HandlerError: the name, the function or its signature cannot be used.
    """
    if not callable(handler):
        raise HandlerError(f"{handler!r} cannot be a handler: decorate a function")
    name = type if type is not None else getattr(handler, "__name__", "")
    where = f"handler {getattr(handler, '__qualname__', repr(handler))}"
    if not isinstance(name, str) or not _TYPE.fullmatch(name):
        raise HandlerError(
            f"{where}: {name!r} cannot be a command's type: begin with a lower-case letter, go on "
            "with lower-case letters, digits, '_', '.' and '-', at most 128 of them"
        )
    if inspect.isgeneratorfunction(handler) or inspect.isasyncgenfunction(handler):
        raise HandlerError(
            f"{where} is a generator: return one value, and tell of steps by ctx.progress(…)"
        )
    if isolation not in (None, "process"):
        raise HandlerError(f"{where}: isolation {isolation!r} is unknown: use 'process' or None")
    if isolation == "process":
        _check_importable(handler, where)
    text = inspect.cleandoc(getattr(handler, "__doc__", None) or "").split("\n\n")[0]
    return Command(
        type=name,
        handler=handler,
        parameters=read_signature(handler),
        description=clean_text(
            text.replace("\n", " ") if description is None else description, 1024
        ),
        control=control,
        isolation=isolation,
        is_coroutine=_is_coroutine(handler),
        builtin=builtin,
    )


def _is_coroutine(handler: Handler) -> bool:
    if inspect.iscoroutinefunction(handler):
        return True
    return inspect.iscoroutinefunction(getattr(handler, "__call__", None))  # noqa: B004


def _check_importable(handler: Handler, where: str) -> None:
    name = getattr(handler, "__qualname__", "")
    if not inspect.isfunction(handler) or not name.isidentifier():
        raise HandlerError(
            f"{where} cannot run in a process of its own, because that process has to import it: "
            "define it at module level"
        )
