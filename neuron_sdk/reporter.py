"""Puts analytics reports into the spool: each interval, and at once what is grave."""

from __future__ import annotations

import asyncio

from neuron_sdk.convert import report_message
from neuron_sdk.intervals import Intervals
from neuron_sdk.offload import offload
from neuron_sdk.reports import Report, Reports
from neuron_sdk.spool import Spool
from neuron_sdk.vitals import VitalSigns

URGENT_SPACING_S = 1.0


class Reporter:
    """Belongs to the control loop."""

    def __init__(
        self, reports: Reports, vitals: VitalSigns, spool: Spool, intervals: Intervals
    ) -> None:
        self._reports = reports
        self._vitals = vitals
        self._spool = spool
        self._intervals = intervals
        self._urgent = asyncio.Event()

    def hurry(self) -> None:
        """Something grave is waiting."""
        self._urgent.set()

    async def run(self) -> None:
        """Report until it is cancelled."""
        loop = asyncio.get_running_loop()
        last = loop.time()
        while True:
            urgent = asyncio.create_task(self._urgent.wait(), name="urgent")
            due = asyncio.create_task(
                self._intervals.wait(last + self._intervals.analytics), name="due"
            )
            try:
                await asyncio.wait({urgent, due}, return_when="FIRST_COMPLETED")
            finally:
                urgent.cancel()
                due.cancel()
            if due.done() and not due.cancelled() and due.result():
                last = loop.time()
                await self.report()
            elif self._urgent.is_set():
                self._urgent.clear()
                await offload(self._spool_events, "neuron-report")
                await asyncio.sleep(URGENT_SPACING_S)  # a storm of errors makes few reports

    async def report(self) -> None:
        """Put everything that was measured, and every event, into the spool."""
        await offload(self._spool_all, "neuron-report")

    def _spool_all(self) -> None:
        self._vitals.refresh()
        self._keep(self._reports.take())

    def _spool_events(self) -> None:
        self._keep(self._reports.take_events())

    def _keep(self, reports: list[Report]) -> None:
        for report in reports:
            keep = self._spool.report_errors if report.grave else self._spool.report
            keep(report_message(report).SerializeToString()).result()
