"""Open files: a stream is one of the server's, and one of its neuron's process."""

from __future__ import annotations

import resource

SPARE = 512
"""For everything in a process that is not a stream."""


def raise_limit() -> int:
    """Raises the soft limit to the hard one, for this process and what it starts; gives it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def why_not(streams: int) -> str:
    """Why a server cannot hold so many streams here; empty if it can."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= streams + SPARE:
        return ""
    return (
        f"{streams} streams need {streams + SPARE} open files in the server, and the hard limit"
        f" here is {limit} (ulimit -Hn; raise it in /etc/security/limits.conf, or with"
        " LimitNOFILE= of systemd or --ulimit nofile= of a container)"
    )
