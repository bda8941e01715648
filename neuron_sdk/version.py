"""The SDK's version; imports nothing, so that any part may read it."""

__version__ = "0.1.0"
