"""Ready-made dependency checks, with nothing but the standard library.

Each function makes a check: it returns nothing if all is well, and raises with the reason if not.
"""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

from neuron_sdk.redaction import redact_text


def tcp(host: str, port: int) -> Callable[[], Coroutine[Any, Any, None]]:
    """A check that a TCP port accepts a connection."""
    if not 1 <= port <= 65_535:
        raise ValueError(f"port {port} of {host}: use 1 to 65535")

    async def check() -> None:
        _, writer = await asyncio.open_connection(host, port)
        writer.close()
        await writer.wait_closed()

    return check


def http(url: str, *, timeout: float = 5.0) -> Callable[[], None]:
    """A check that a GET of an http or https URL is answered with a status below 400.

    Redirects are followed, and a proxy is used where the environment names one.
    """
    address = urlsplit(url)
    if address.scheme not in {"http", "https"} or not address.hostname:
        raise ValueError(f"URL {redact_text(url)!r}: use http://host/… or https://host/…")

    def check() -> None:
        request = urllib.request.Request(url, headers={"User-Agent": "neuron"})  # noqa: S310 - http(s)
        try:
            urllib.request.urlopen(request, timeout=timeout).close()  # noqa: S310 - the same
        except urllib.error.HTTPError as error:
            error.close()
            raise ConnectionError(f"answered with HTTP {error.code}") from None

    return check
