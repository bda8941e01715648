"""What every command of the console shares: its options, its exit codes, its help.

`noun` makes a group, `leaf` a command in it. A leaf's function takes a `Session` first; the
options --json, --server, --key and --timeout are added here, and whatever goes wrong becomes a
line on stderr and an exit code here, so that no command does either itself. Options that several
commands share stand in a dataclass: a parameter of that type takes them all.
"""

from __future__ import annotations

import errno
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec, get_type_hints

import typer
from typer.core import TyperGroup

from federation_server.console.failure import (
    EXIT_CODES,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_PIPE,
    EXIT_USAGE,
    Failure,
)

if TYPE_CHECKING:
    from federation_server.console.client import Federation
    from federation_server.console.render import Output

P = ParamSpec("P")

DEFAULT_SERVER = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 10.0
_PANEL = "Connection and output"

Json = Annotated[
    bool,
    typer.Option("--json", help="Print JSON: one document, or one a line.", rich_help_panel=_PANEL),
]
Server = Annotated[
    str,
    typer.Option(
        help="The federation's address. Beyond loopback it is TLS, unless it begins with"
        " federation://.",
        metavar="HOST:PORT",
        envvar="FEDERATION_SERVER",
        rich_help_panel=_PANEL,
    ),
]
Key = Annotated[
    str,
    typer.Option(
        help="An admin's API key; else FEDERATION_ADMIN_KEY, ADMIN_API_KEY, or the file admin.key"
        " that `federation up` keeps.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        help="How many seconds an answer may take.",
        min=0.1,
        max=86400,
        rich_help_panel=_PANEL,
    ),
]

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""What keeps output from being written, and nothing else here."""

_SHARED: dict[str, tuple[Any, Any]] = {
    "json": (Json, False),
    "server": (Server, DEFAULT_SERVER),
    "key": (Key, ""),
    "timeout": (Timeout, DEFAULT_TIMEOUT_S),
}
"""The options of every command: each with its type and its default."""


@dataclass(frozen=True)
class Session:
    """What a command works with: somebody to ask and somewhere to say it."""

    federation: Federation
    out: Output


def leaf(
    app: typer.Typer, name: str, *, example: str
) -> Callable[[Callable[Concatenate[Session, P], int | None]], Callable[..., None]]:
    """Makes a function a command.

    The function gets a Session and its own options, and returns an exit code (None: 0). A parameter
    whose type is a dataclass stands for the options that are its fields.

    Args:
        app: the noun.
        name: the command's name in it.
        example: a worked example for --help, without "federation ".
    """

    def add(function: Callable[Concatenate[Session, P], int | None]) -> Callable[..., None]:
        groups = _groups(function)

        @wraps(function)
        def command(*args: P.args, **options: P.kwargs) -> None:
            shared = {name: options.pop(name) for name in _SHARED}
            for group, kind in groups.items():
                options[group] = kind(
                    **{each.name: options.pop(each.name) for each in fields(kind)}
                )
            with told() as end:
                session = _open(**shared)
                with session.federation:
                    end.exit_code = function(session, *args, **options) or 0
            if end.exit_code:
                raise typer.Exit(end.exit_code)

        _sign(command, function)
        epilog = f"Example:  federation {example}\n\n{EXIT_CODES}"
        app.command(name, epilog=epilog)(command)
        return command

    return add


def noun(help_text: str, *, default: str | None = None) -> typer.Typer:
    """A group of commands.

    Args:
        help_text: what it is about.
        default: the command that is meant where the first word names none.
    """
    group = type("Noun", (OptionsAnywhere,), {"default": default})
    app = typer.Typer(cls=group, help=help_text, no_args_is_help=True, add_completion=False)
    app.callback()(lambda: None)
    app.info.help = help_text
    return app


class OptionsAnywhere(TyperGroup):
    """A group that takes its commands' shared options also before the command's name."""

    default: str | None = None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Moves the shared options behind the command's name."""
        early, rest = _shared_options(args)
        if self.default and rest and rest[0] not in {*self.commands, "--help"}:
            rest = [self.default, *rest]
        if not rest:
            return super().parse_args(ctx, early)
        return super().parse_args(ctx, [rest[0], *early, *rest[1:]])


def _shared_options(args: list[str]) -> tuple[list[str], list[str]]:
    """The shared options at the beginning, and what follows them."""
    end = 0
    while end < len(args):
        name, assigned, _ = args[end].partition("=")
        if name == "--json":
            end += 1
        elif name in {"--server", "--key", "--timeout"}:
            end += 1 if assigned else 2
        else:
            break
    return args[:end], args[end:]


def _sign(command: Callable[..., None], function: Callable[..., Any]) -> None:
    """Gives `command` the parameters that typer is to see: the function's own and the shared."""
    hints = get_type_hints(function, include_extras=True)
    groups = _groups(function)
    _, *own = inspect.signature(function).parameters.values()
    parameters = [
        each.replace(annotation=hints[each.name]) for each in own if each.name not in groups
    ]
    for kind in groups.values():
        parameters += _options(kind)
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in _SHARED.items()
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}


def _groups(function: Callable[..., Any]) -> dict[str, Any]:
    """The function's parameters that stand for several options: each with its dataclass."""
    hints = get_type_hints(function, include_extras=True)
    _, *own = inspect.signature(function).parameters
    return {name: hints[name] for name in own if is_dataclass(hints[name])}


def _options(kind: Any) -> list[inspect.Parameter]:
    """A dataclass's fields as parameters."""
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if each.default is MISSING else each.default,
            annotation=hints[each.name],
        )
        for each in fields(kind)
    ]


def _open(*, json: Any, server: Any, key: Any, timeout: Any) -> Session:
    # Here and not above: the root's help needs neither gRPC nor rich.
    from federation_server.console.client import Address, Federation, find_key  # noqa: PLC0415
    from federation_server.console.render import Output  # noqa: PLC0415
    from federation_server.console.trust import Trust  # noqa: PLC0415

    out = Output(json=json)
    trust = Trust.from_environment()
    return Session(Federation(Address.parse(server), find_key(key), timeout, trust), out)


class told:  # noqa: N801 - reads as a statement
    """Turns what ends a command early into lines on stderr and an exit code."""

    exit_code = 0

    def __enter__(self) -> told:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        del kind, trace
        if error is None or isinstance(error, SystemExit):
            try:
                sys.stdout.flush()
            except OSError as unwritten:
                error = unwritten
        match error:
            case None | SystemExit():
                return False
            case Failure():
                self.exit_code = error.exit_code
                report(error)
            case KeyboardInterrupt():
                self.exit_code = EXIT_INTERRUPTED
            case BrokenPipeError():
                self.exit_code = EXIT_PIPE
                _drop_output()
            case OSError(filename=None) if error.errno in _UNWRITABLE:
                self.exit_code = EXIT_FAILED
                _drop_output()
                _say(
                    (
                        f"the output cannot be written ({error.strerror})",
                        "what was asked for may have been done all the same",
                    )
                )
            case UnicodeEncodeError():
                self.exit_code = EXIT_USAGE
                _say(("an argument is not valid UTF-8",))
            case _:
                return False
        return True


def _drop_output() -> None:
    """Lets what is left of it go nowhere: the interpreter flushes stdout once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report(failure: Failure) -> None:
    """Says on stderr what went wrong."""
    _say(failure.lines)


def _say(lines: tuple[str, ...]) -> None:
    from federation_server.console.wording import clean  # noqa: PLC0415 - as in _open

    first, *rest = (clean(line) for line in lines)
    typer.echo(f"federation: {first}", err=True)
    for line in rest:
        typer.echo(f"  {line}", err=True)
