"""The SDK of a federation's neurons.

    from neuron_sdk import Neuron, CommandContext

    neuron = Neuron("python-processor-001", type="data-processor")

    @neuron.command("run_task")
    async def run_task(ctx: CommandContext, limit: int = 100) -> dict: ...

    neuron.run()

Everything that a service needs is named here; the other modules are the SDK's own business, but
for `neuron_sdk.testing`.
"""

from __future__ import annotations

from neuron_sdk import checks
from neuron_sdk.config import NeuronConfig
from neuron_sdk.context import CommandContext, CommandLog
from neuron_sdk.dependencies import DependencyResult, DependencyState
from neuron_sdk.description import (
    AlertThresholds,
    ApiEndpoint,
    AutoRestart,
    Deployment,
    ResourceRequirements,
)
from neuron_sdk.errors import (
    CommandFailed,
    CommandInterrupted,
    ConfigError,
    HandlerError,
    LifecycleError,
    NeuronError,
    StateDirInUse,
)
from neuron_sdk.health import HealthInputs, default_health_score
from neuron_sdk.metrics import Counter, Gauge, Histogram
from neuron_sdk.neuron import Neuron
from neuron_sdk.version import __version__

__all__ = [
    "AlertThresholds",
    "ApiEndpoint",
    "AutoRestart",
    "CommandContext",
    "CommandFailed",
    "CommandInterrupted",
    "CommandLog",
    "ConfigError",
    "Counter",
    "DependencyResult",
    "DependencyState",
    "Deployment",
    "Gauge",
    "HandlerError",
    "HealthInputs",
    "Histogram",
    "LifecycleError",
    "Neuron",
    "NeuronConfig",
    "NeuronError",
    "ResourceRequirements",
    "StateDirInUse",
    "__version__",
    "checks",
    "default_health_score",
]
