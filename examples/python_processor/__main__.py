"""`python -m examples.python_processor` does the same as `neuron run examples.python_processor`."""

from . import neuron

neuron.run()
