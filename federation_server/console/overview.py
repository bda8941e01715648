"""`federation overview`: the whole fleet in a few numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from federation.v1 import fleet_service_pb2 as pb
from federation.v1.neuron_pb2 import Lifecycle, Presence
from federation_server.console.leaf import Session, leaf
from federation_server.console.render import Column
from federation_server.console.wording import NOTHING, absolute, enum, number

app = typer.Typer(add_completion=False)


@leaf(app, "overview", example="overview --filter 'labels.zone = \"eu\"'")
def overview(
    session: Session,
    *,
    filter_text: Annotated[
        str, typer.Option("--filter", help="Which neurons; see `neurons list --help`.")
    ] = "",
    top: Annotated[
        int, typer.Option(min=1, max=100, help="How many of the slowest and the worst.")
    ] = 5,
) -> None:
    """The whole fleet in a few numbers: by presence, lifecycle and type; slowest and worst."""
    federation, out = session.federation, session.out
    request = pb.GetFleetOverviewRequest(filter=filter_text, top=top)
    answer = federation.call(federation.fleet.GetFleetOverview, request)
    if out.json:
        out.document(answer)
        return
    mean = (
        f", mean health {number(round(answer.mean_health_score, 1))}"
        if answer.HasField("mean_health_score")
        else ""
    )
    noun = "neuron" if answer.total == 1 else "neurons"
    out.line(f"{answer.total} {noun}{mean}, at {absolute(answer.server_time)}")
    for doubt in answer.doubts:
        out.line(_doubt(doubt))
    out.line()
    out.facts("Presence", _counts((_presence(each), each.count) for each in answer.presences))
    out.facts("Lifecycle", _counts((_lifecycle(each), each.count) for each in answer.lifecycles))
    out.facts("Type", _counts((each.type, each.count) for each in answer.types))
    _ranking(session, "Slowest", answer.slowest)
    _ranking(session, "Worst health", answer.worst)


def _doubt(doubt: pb.ServerDoubt) -> str:
    causes = ", ".join(enum(pb.DoubtCause, cause) for cause in doubt.causes)
    if not doubt.sweeping:
        whose = f"the neurons of server {doubt.server_id} are not marked down"
    elif list(doubt.causes) == [pb.DOUBT_CAUSE_MASS_DISCONNECT]:
        whose = "neurons that were lost all at once are not marked down yet"
    else:
        whose = "no neuron is marked down"
    return f"Presence frozen ({causes}): {whose}, since {absolute(doubt.since_time)}"


def _presence(each: pb.PresenceCount) -> str:
    return enum(Presence, each.presence)


def _lifecycle(each: pb.LifecycleCount) -> str:
    return enum(Lifecycle, each.lifecycle)


def _counts(counts: Iterable[tuple[str, int]]) -> list[tuple[str, str]]:
    return [(name, str(count)) for name, count in counts]


def _ranking(session: Session, title: str, neurons: Iterable[pb.NeuronSummary]) -> None:
    rows = [
        (
            each.neuron_id,
            each.type,
            number(round(each.health_score, 1)) if each.HasField("health_score") else NOTHING,
            f"{number(round(each.mean_response_ms, 2))} ms"
            if each.HasField("mean_response_ms")
            else NOTHING,
        )
        for each in neurons
    ]
    if not rows:
        return
    columns = [
        Column("NEURON", folds=True),
        Column("TYPE", folds=True),
        Column("HEALTH", right=True),
        Column("RESPONSE", right=True),
    ]
    session.out.line()
    session.out.line(title)
    session.out.table(columns, rows)
