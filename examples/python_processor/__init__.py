"""A complete neuron: data processing over HTTP, with commands, dependencies and numbers.

Start reading in `service.py`; `README.md` says how to run it.
"""

from .service import neuron

__all__ = ["neuron"]
