"""How a neuron lives: beside a program, as a process, or as one that comes and goes."""

from __future__ import annotations

from enum import Enum, auto


class Mode(Enum):
    """What a started neuron is to its process, and how it talks to the federation."""

    BESIDE = auto()
    """A part of a larger program; holds a stream until it is told to stop."""
    PROCESS = auto()
    """The process is this neuron and nothing else; holds a stream until it is told to stop."""
    ONCE = auto()
    """The process is this neuron; holds no stream, and ends when nothing is left to do."""

    @property
    def owns_process(self) -> bool:
        """Whether the process is this neuron and nothing else."""
        return self is not Mode.BESIDE
