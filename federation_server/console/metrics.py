"""`federation metrics …`: what neurons measured, over time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from federation.v1 import analytics_service_pb2 as pb
from federation_server.console import values
from federation_server.console.leaf import Session, leaf, noun
from federation_server.console.plot import plot as draw
from federation_server.console.render import Column, Output
from federation_server.console.wire import duration, timestamp
from federation_server.console.wording import (
    NOTHING,
    absolute,
    enum,
    moment,
    number,
    pairs,
    relative,
    span,
)

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration

app = noun(
    "What neurons measured, over time.  `metrics NAME` is short for `metrics show NAME`.",
    default="show",
)

FIGURES: dict[int, tuple[str, ...]] = {
    pb.METRIC_KIND_COUNTER: ("sum", "rate", "count"),
    pb.METRIC_KIND_GAUGE: ("mean", "min", "max", "count"),
    pb.METRIC_KIND_HISTOGRAM: ("rate", "mean", "p50", "p90", "p99", "max", "count"),
}
"""What means something for each kind, in the order of its columns."""

DEFAULT_SPAN = timedelta(hours=1)
"""The contract's."""

TITLES = {"rate": "RATE/S", "count": "POINTS"}
GAP = "…"


@leaf(app, "show", example="metrics http_requests --since 6h --bucket 5m --group-by neuron_id")
def show(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The metric.")],
    *,
    filter_text: Annotated[
        str, typer.Option("--filter", help="Which neurons; see `neurons list --help`.")
    ] = "",
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Only points with this label; may be repeated."),
    ] = None,
    since: Annotated[
        datetime | None,
        typer.Option(parser=values.past, metavar="SPAN|TIME", help="From when.", show_default="1h"),
    ] = None,
    until: Annotated[
        datetime | None,
        typer.Option(
            parser=values.past, metavar="SPAN|TIME", help="Until when.", show_default="now"
        ),
    ] = None,
    bucket: Annotated[
        timedelta | None,
        typer.Option(
            parser=values.span,
            metavar="SPAN",
            help="A row's width.",
            show_default="about a 60th of it all",
        ),
    ] = None,
    group_by: Annotated[
        list[str] | None,
        typer.Option(
            help="A table for each neuron_id, type or labels.KEY; may be repeated.",
        ),
    ] = None,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw it instead: a line a figure, a gap is a gap.")
    ] = False,
) -> None:
    """One metric over time: a table a group, a row a bucket. What has no points is a gap."""
    federation, out = session.federation, session.out
    request = pb.QueryMetricsRequest(
        name=name,
        filter=filter_text,
        labels=values.labels(label or []),
        start_time=timestamp(since),
        end_time=timestamp(until),
        bucket_width=duration(bucket),
        group_by=group_by or [],
    )
    answer = federation.call(federation.analytics.QueryMetrics, request)
    if out.json:
        out.document(answer)
        return
    if not answer.series:
        out.note(
            f"no point of {name} in that time (`federation metrics names` lists what there is)"
        )
    drawn = _span(request) if plot else None
    for index, series in enumerate(answer.series):
        if index:
            out.line()
        _print(out, name, series, answer.bucket_width, drawn)
    if answer.truncated:
        out.note("the first 1000 groups; filter or group less to see all")


@leaf(app, "names", example="metrics names --prefix http")
def names(
    session: Session,
    *,
    prefix: Annotated[str, typer.Option(help="Only names that begin with this.")] = "",
) -> None:
    """The metrics that neurons reported."""
    federation, out = session.federation, session.out
    request = pb.ListMetricNamesRequest(prefix=prefix)
    answer = federation.pages(federation.analytics.ListMetricNames, request, "metrics")
    if out.json:
        out.document(answer)
    elif not answer.metrics:
        out.note("no metric has been reported yet" if not prefix else "no metric begins so")
    else:
        columns = (
            Column("NAME", folds=True),
            Column("KIND"),
            Column("UNIT"),
            Column("LAST REPORT"),
        )
        rows = (
            (each.name, _kind(each.kind), each.unit, relative(each.last_report_time))
            for each in answer.metrics
        )
        out.table(columns, rows)


def _span(request: pb.QueryMetricsRequest) -> tuple[datetime, datetime]:
    """What was asked for, where the request leaves it to the federation as that fills it in."""
    end = moment(request.end_time) or datetime.now(UTC)
    start = moment(request.start_time) or end - DEFAULT_SPAN
    return start, end


def _print(
    out: Output,
    name: str,
    series: pb.MetricSeries,
    width: Duration,
    drawn: tuple[datetime, datetime] | None,
) -> None:
    kind, unit = _kind(series.kind), f", {series.unit}" if series.unit else ""
    group = pairs(series.group.items())
    out.line(f"{name}  {group}{'  ' if group else ''}({kind.lower()}{unit}, each {span(width)})")
    if drawn is not None:
        out.drawing(draw(series, *drawn, width.ToTimedelta(), color=out.colored))
        return
    figures = FIGURES.get(series.kind, ("sum", "mean", "count"))
    columns = [Column("FROM")]
    columns += [Column(TITLES.get(figure, figure.upper()), right=True) for figure in figures]
    out.table(columns, _rows(series, width.ToTimedelta(), figures))


def _rows(
    series: pb.MetricSeries, width: timedelta, figures: tuple[str, ...]
) -> Iterator[tuple[str, ...]]:
    expected: datetime | None = None
    now = datetime.now(UTC)
    for bucket in series.buckets:
        start = bucket.start_time.ToDatetime(UTC)
        if expected is not None and start > expected:
            missing = round((start - expected) / width)
            yield (f"{GAP} {missing} without points", *[GAP] * len(figures))
        expected = start + width
        so_far = " so far" if expected > now else ""
        time = absolute(bucket.start_time) + so_far
        yield (time, *[_figure(bucket, figure) for figure in figures])


def _figure(bucket: pb.MetricBucket, figure: str) -> str:
    has: Callable[[str], bool] = bucket.HasField  # type: ignore[assignment]  # any field's name
    if figure != "count" and not has(figure):
        return NOTHING
    return number(getattr(bucket, figure))


def _kind(kind: pb.MetricKind.ValueType) -> str:
    return enum(pb.MetricKind, kind)
