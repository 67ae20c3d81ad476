"""Parameters of the gates and of the difficulty estimator: outside the model, and beside it in checkpoints."""

from __future__ import annotations

from megatron_adamba.blueprint.manifest import ParamSpec, manifest
from megatron_adamba.config.resolved import ResolvedModel

STAYS, KEEPS_WIDTH = "plus_two", "minus_two"
"""biases at birth: a gate that has learned nothing lets no token leave and widens none"""


def expansion_layers(config: ResolvedModel) -> range:
    """Blocks that may run at the doubled width: those past three quarters of the depth, never the first."""
    return range(max(1, -(-3 * config.num_layers // 4)), config.num_layers)


def whole_width(config: ResolvedModel) -> int:
    """Channels that a difficulty of 1 asks for, of a resolved config."""
    return config.estimator_reference or config.hidden_size


def gate_manifest(config: ResolvedModel) -> tuple[ParamSpec, ...]:
    """All parameters of the gates of a resolved config; none where `gate_size` is 0.

    Block i's gates read the residual behind it. The last block has none: there is nothing left to decide.
    """
    if not config.gate_size:
        return ()
    specs: list[ParamSpec] = []
    widened = expansion_layers(config)
    for block in range(config.num_layers - 1):
        specs += _gate(config, f"blocks.{block}.confidence_gate", 1, STAYS)
        if block + 1 in widened:
            specs += _gate(config, f"blocks.{block}.expansion_gate", 1, KEEPS_WIDTH)
    return (*specs, *_gate(config, "predictor", config.num_layers, "zeros"))


def _gate(config: ResolvedModel, prefix: str, outputs: int, bias: str) -> list[ParamSpec]:
    size = config.gate_size
    return [
        ParamSpec(f"{prefix}.up.weight", (size, config.hidden_size), "gate", "matrix", "linear"),
        ParamSpec(f"{prefix}.up.bias", (size,), "gate", "vector", "zeros"),
        ParamSpec(f"{prefix}.down.weight", (outputs, size), "gate", "matrix", "zeros"),
        ParamSpec(f"{prefix}.down.bias", (outputs,), "gate", "vector", bias),
    ]


def stored_manifest(config: ResolvedModel) -> tuple[ParamSpec, ...]:
    """What a checkpoint of a resolved config holds: the model's parameters, and those of its gates."""
    return (*manifest(config), *gate_manifest(config))
