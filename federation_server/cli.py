"""`federation`: the command line.

`up`, `serve`, `migrate` and `config` run here; everything else is a client that talks gRPC like
everyone else (`console/`). What a command needs is imported when it runs, so that `--help` is
quick.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Coroutine
from typing import Annotated, Any, Never

import structlog
import typer

from federation_server import __version__, logs
from federation_server.console.app import register
from federation_server.console.leaf import told
from federation_server.settings import Settings, SettingsError, load, mistyped, shown

log = structlog.get_logger(__name__)

app = typer.Typer(
    name="federation",
    help="A control plane for headless services.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Host = Annotated[str | None, typer.Option(help="The address to serve on. [FEDERATION_HOST]")]
Port = Annotated[int | None, typer.Option(help="The gRPC port. [FEDERATION_PORT]")]
Insecure = Annotated[
    bool | None,
    typer.Option(
        "--insecure", help="Serve plaintext beyond this machine: tokens are readable then."
    ),
]


@app.command()
def up(
    *,
    host: Host = None,
    port: Port = None,
    insecure: Insecure = None,
    demo: Annotated[bool, typer.Option(help="Run a demo neuron beside the server.")] = True,
) -> None:
    """Run a whole federation: PostgreSQL (unless DATABASE_URL is set), server, demo neuron.

    Everything is kept in FEDERATION_DATA_DIR; Ctrl-C stops it all in order.
    """
    settings = _start(host=host, port=port, insecure=insecure)
    from federation_server import up as runner  # noqa: PLC0415 - see the module's docstring

    _run(runner.up(settings, demo=demo))


@app.command()
def serve(*, host: Host = None, port: Port = None, insecure: Insecure = None) -> None:
    """Run one server on the PostgreSQL of DATABASE_URL; its schema must be up to date."""
    settings = _start(host=host, port=port, insecure=insecure)
    from federation_server import up as runner  # noqa: PLC0415 - see the module's docstring

    _run(runner.serve(settings))


@app.command()
def migrate() -> None:
    """Bring the schema of the database up to date. Safe to run again, and by many at once.

    Waits up to a minute for PostgreSQL.
    """
    settings = _start()
    from federation_server import up as runner  # noqa: PLC0415 - see the module's docstring

    _run(runner.migrate(settings))


config = typer.Typer(help="The server's settings.", no_args_is_help=True, add_completion=False)
app.add_typer(config, name="config")


@config.command("show")
def show_config(
    *, json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False
) -> None:
    """Every setting as a server started here would have it, and where it comes from.

    Secrets are masked, also the password in DATABASE_URL.
    """
    settings = shown(_load())
    for line in mistyped(os.environ):
        typer.echo(f"federation: {line}", err=True)
    from federation_server.console.render import Column, Output  # noqa: PLC0415 - as above

    out = Output(json=json)
    if json:
        values = {each.variable: {"value": each.value, "source": each.source} for each in settings}
        out.object(values, indent=2)
        return
    columns = (Column("SETTING"), Column("VALUE", folds=True), Column("FROM"))
    rows = ((each.variable, _value(each.value), each.source) for each in settings)
    out.table(columns, rows)


def _value(value: object) -> str:
    """A setting's value as the environment would have it."""
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


register(app)


def _start(**overrides: object) -> Settings:
    """The settings, checked, with logging set up as they say."""
    settings = _load(**overrides)
    # A person at a terminal reads lines, whatever else reads takes JSON.
    json = settings.log_format == "json" if settings.log_format else not sys.stderr.isatty()
    logs.configure(settings.log_level, json=json)
    for line in mistyped(os.environ):
        log.warning(line, action="setting_unknown")
    # gRPC writes lines of its own to stderr; what they mean, an error's line says.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    return settings


def _load(**overrides: object) -> Settings:
    try:
        return load(**overrides)
    except SettingsError as error:
        _fail(str(error), status=2)


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Does the work; what a person can mend becomes one line and exit status 1."""
    from federation_server.up import MENDABLE  # noqa: PLC0415 - see the module's docstring

    try:
        asyncio.run(work)
    except MENDABLE as error:
        _fail(str(error), status=1)


def _fail(message: str, *, status: int) -> Never:
    typer.echo(f"federation: {message}", err=True)
    raise typer.Exit(status)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"federation {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    del version


def main() -> None:
    """The console script."""
    with told() as end:
        app()
    sys.exit(end.exit_code)


if __name__ == "__main__":
    main()
