"""Puts the nouns on the root command, and loads one only when it is called.

A noun's module brings gRPC, the stubs and rich along, which `federation --help` and `federation
serve` do not need: the root knows each noun's name and one line about it, no more.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import typer

from federation_server.console.leaf import OptionsAnywhere

NOUNS = {
    "overview": ("overview", "The whole fleet in a few numbers."),
    "neurons": ("neurons", "See and steer neurons: list, show, watch, update, delete, …"),
    "command": ("commands", "Order neurons about: exec, batch, cancel, retry, …"),
    "batches": ("batches", "Orders to many neurons: list, show, follow, cancel."),
    "metrics": ("metrics", "What neurons measured, over time."),
    "events": ("events", "What neurons noted, newest first."),
    "tls": ("tls", "TLS certificates from a private CA: init."),
    "token": ("tokens", "Enrollment tokens: create, list, revoke."),
    "api-key": ("api_keys", "API keys: create, list, rotate, expire, revoke."),
    "keys": ("signing_keys", "The keys that sign neurons' tokens: list, rotate."),
}
"""Each noun: its module here, and its line in the root's help."""


def register(app: typer.Typer) -> None:
    """Adds the console's commands to the root command of `federation`."""
    app.info.cls = _Root
    for noun, (_, summary) in NOUNS.items():
        app.command(noun, help=summary)(_placeholder)


def _placeholder() -> None:
    """Stands for a noun in the root's help; `_Root` puts the real one in its place."""
    raise AssertionError("a noun was called without being loaded")


class _Root(OptionsAnywhere):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the arguments name, loaded."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in NOUNS:
            # gRPC writes lines of its own to stderr; what they mean, an error's line says.
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")
            module = import_module(f"federation_server.console.{NOUNS[name][0]}")
            command = typer.main.get_command(module.app)
            command.name = name
        return name, command, rest
