"""`neuron run module:neuron`: run a neuron that a module holds.

Exit codes: 0 it was stopped, or nothing was left to do (--once); 1 it failed; 2 it was not started,
because the command line, the module or a setting is wrong. One line on stderr says what to do.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from neuron_sdk.errors import ConfigError, HandlerError, LifecycleError
from neuron_sdk.neuron import EXIT_CONFIG, Neuron
from neuron_sdk.version import __version__


class _Unusable(Exception):
    """The argument does not lead to a neuron."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of the SDK; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        Neuron.once = options.once
        neuron = find(options.target)
        if not neuron.has_run:  # else its module called run() itself, and it has ended
            neuron.run()
    except (_Unusable, ConfigError, HandlerError, LifecycleError) as error:
        sys.stderr.write(f"neuron: {error}\n")
        return EXIT_CONFIG
    return 0


def find(target: str) -> Neuron:
    """The neuron that "module:name" names; the name may be left out if there is one neuron only.

    Raises:
        _Unusable: there is none; the text says what would lead to one.
    """
    module_name, _, name = target.partition(":")
    if module_name.endswith(".py") or "/" in module_name:
        path = Path(module_name)
        sys.path.insert(0, str(path.parent.absolute()))
        module_name = path.stem
    else:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise _Unusable(
            f"there is no module {module_name!r}: name one that can be imported from "
            f"{Path.cwd()}, for example `neuron run service:neuron`"
        ) from None
    except ValueError as error:
        raise _Unusable(f"{module_name!r} names no module: {error}") from None
    found = {key: value for key, value in vars(module).items() if isinstance(value, Neuron)}
    if name in found:
        return found[name]
    known = ", ".join(sorted(found)) or "none"
    if name or len(found) != 1:
        what = f"no neuron {name!r}" if name else f"{len(found)} neurons"
        raise _Unusable(f"{module_name} holds {what} (known: {known}): say {module_name}:<name>")
    return next(iter(found.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neuron", description="Run services as neurons of a federation."
    )
    parser.add_argument("--version", action="version", version=f"neuron-sdk {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="run a neuron until it is stopped",
        description="Run a neuron until SIGTERM, Ctrl-C or a command stops it. Settings come from "
        "the environment: FEDERATION_URL, NEURON_ID, ENROLLMENT_TOKEN, STATE_DIR and others.",
    )
    run.add_argument(
        "--once",
        action="store_true",
        help="carry out the commands that wait and end, for cron jobs: exit code 0 when none is "
        "left; 1 with one line on stderr if the federation is away for a minute or refuses the "
        "neuron, and what could not be sent is sent by the next run",
    )
    run.add_argument("target", help="module:neuron, for example service:neuron or service.py")
    return parser


if __name__ == "__main__":
    sys.exit(main())
