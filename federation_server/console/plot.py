"""A metric drawn in the terminal, by plotext."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

from federation.v1 import analytics_service_pb2 as pb
from federation_server.console.wording import clean

LINES: dict[int, tuple[str, ...]] = {
    pb.METRIC_KIND_COUNTER: ("rate",),
    pb.METRIC_KIND_GAUGE: ("min", "mean", "max"),
    pb.METRIC_KIND_HISTOGRAM: ("p50", "p90", "p99"),
}
"""What is drawn of each kind."""

HEIGHT = 16
LEAST_WIDTH, MOST_WIDTH = 40, 160
_TICKS = 5
_MARKERS = ("braille", "*", "+", "o")
"""Where the terminal cannot show the first one, each line has one of the others."""


def plot(
    series: pb.MetricSeries, start: datetime, end: datetime, width: timedelta, *, color: bool
) -> str:
    """The series over [start, end), a line a figure; a gap is a gap. Times are those of here."""
    import plotext  # noqa: PLC0415 - most commands draw nothing

    columns = shutil.get_terminal_size((100, 24)).columns
    plotext.clear_figure()
    plotext.plotsize(max(LEAST_WIDTH, min(MOST_WIDTH, columns)), HEIGHT)
    if not color:
        plotext.theme("clear")
    fine = "utf" in (sys.stdout.encoding or "").lower()
    for number, figure in enumerate(LINES.get(series.kind, ("mean",))):
        label: str | None = figure if figure != "rate" else "rate/s"
        marker = _MARKERS[0 if fine else 1 + number]
        for times, values in _runs(series, width, figure):
            draw = plotext.plot if len(times) > 1 else plotext.scatter
            draw(times, values, marker=marker, label=label, color=_COLORS[number])
            label = None  # once is enough
    first, last = start.timestamp(), end.timestamp()
    ticks = [first + (last - first) * place / (_TICKS - 1) for place in range(_TICKS)]
    plotext.xlim(first, last)
    plotext.xticks(ticks, [_tick(tick, last - first) for tick in ticks])
    drawn: str = plotext.build()
    if color:
        return drawn
    lines = plotext.uncolorize(drawn).splitlines()
    return "\n".join(line.rstrip() for line in lines)


_COLORS = ("cyan", "green", "red")


def _runs(
    series: pb.MetricSeries, width: timedelta, figure: str
) -> Iterator[tuple[Sequence[float], Sequence[float]]]:
    """The points that follow each other without a gap: where in time, in seconds, and how much."""
    times: list[float] = []
    values: list[float] = []
    for bucket in series.buckets:
        if not bucket.HasField(figure):  # type: ignore[arg-type]  # any of its optional numbers
            continue
        at = bucket.start_time.ToMicroseconds() / 1e6 + width.total_seconds() / 2
        if times and at - times[-1] > 1.5 * width.total_seconds():
            yield times, values
            times, values = [], []
        times.append(at)
        values.append(getattr(bucket, figure))
    if times:
        yield times, values


def _tick(time: float, span_s: float) -> str:
    shape = "%H:%M:%S" if span_s < 600 else "%H:%M" if span_s < 86_400 else "%d %b %H:%M"
    if span_s > 5 * 86_400:
        shape = "%d %b"
    return clean(datetime.fromtimestamp(time).astimezone().strftime(shape))
