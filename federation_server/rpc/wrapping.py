"""Handlers that an interceptor puts others in the place of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import grpc

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class WrappedOnce:
    """A wrapper for each method's handler: made when it is first asked for, and kept."""

    def __init__(self, wrap: Callable[[Handler, str], Handler]) -> None:
        """`wrap` makes it, for a method."""
        self._wrap = wrap
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}

    def of(self, handler: Handler, method: str) -> Handler:
        """The handler's wrapper."""
        known = self._wrapped.get(method)
        if known is not None and known[0] is handler:
            return known[1]
        wrapped = self._wrap(handler, method)
        self._wrapped[method] = (handler, wrapped)
        return wrapped
