"""How many files this process may have open: each connection is one.

Beyond that number no connection is taken, and nobody is told: clients wait, gRPC says nothing. So a
server takes all that it may have, where shells and systemd give it 1,024 unless it asks; and says
so before none is left.
"""

from __future__ import annotations

import asyncio
import resource
from contextlib import suppress
from pathlib import Path

import structlog

from federation_server.live.metrics import Metrics

log = structlog.get_logger(__name__)

LOOK_INTERVAL_S = 10.0
FEW = 0.1
"""With less than that share left it is said."""

ENOUGH = 1 << 20
MACOS_MOST = 10_240
"""What macOS gives a process although its hard limit says "unlimited" (OPEN_MAX)."""

_OPEN = Path("/dev/fd")


def raise_limit() -> None:
    """Raises the soft limit as far as the hard one lets it, also for what this process starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for most in (ENOUGH, MACOS_MOST):
        wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
        if soft == resource.RLIM_INFINITY or wanted <= soft:
            return
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return


class Descriptors:
    """Looks at how many are left."""

    def __init__(self, metrics: Metrics) -> None:
        """Looks at nothing before `run`."""
        self._metrics = metrics
        self._told = False

    async def run(self) -> None:
        """Looks until it is cancelled."""
        while True:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            self.note(await asyncio.to_thread(_count, limit), limit)
            await asyncio.sleep(LOOK_INTERVAL_S)

    def note(self, count: int, limit: int) -> None:
        """So many are open, and no more than `limit` may be. Says once that few are left."""
        self._metrics.open_files.set(count)
        if limit == resource.RLIM_INFINITY:
            return
        self._metrics.open_files_limit.set(limit)
        few = count > limit * (1.0 - FEW)
        if few and not self._told:
            log.error(
                "few connections more can be taken: raise the hard limit of open files"
                " (LimitNOFILE= of systemd, --ulimit nofile= of a container), or see who connects",
                action="descriptors_few",
                open=count,
                limit=limit,
            )
        self._told = few


def _count(limit: int) -> int:
    try:
        return sum(1 for _ in _OPEN.iterdir())
    except OSError:  # to look needs one as well, and there is none
        return limit
