"""Tensors that later revisions of nanochat added: none of them has a place in our models, unless it does nothing."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_adamba.errors import CheckpointError
from megatron_adamba.surgery.torch_file import TorchFile

NEUTRAL = (
    (r"resid_lambdas", 1.0, "scales the residual stream in front of each layer"),
    (r"x0_lambdas", 0.0, "adds the embedding in front of each layer"),
    (r"smear_lambda", 0.0, "adds the previous token's embedding"),
    (r"backout_lambda", 0.0, "takes the middle layer's residual away at the end"),
    (r"value_embeds\.\d+\.weight", 0.0, "adds embeddings to the values"),
)
"""name, the value at which it does nothing, and what it does otherwise"""
GATES = (
    (r"smear_gate\.weight", r"smear_lambda"),
    (r"transformer\.h\.(\d+)\.attn\.ve_gate\.weight", r"value_embeds.\1.weight"),
)
"""name of a gate, and of the tensor without which it does nothing"""


def idle_extras(file: TorchFile) -> set[str]:
    """Names of the tensors of later revisions, all of which do nothing in this file.

    Raises CheckpointError naming the first that does something, or cannot be told.
    """
    idle = set()
    for name in sorted(file.entries):
        for pattern, value, effect in NEUTRAL:
            if not re.fullmatch(pattern, name):
                continue
            if not bool((file.read(name) == value).all()):
                raise CheckpointError(
                    f"{file.path}: tensor {name} {effect}, which our models do not; it is left out only where it does "
                    f"nothing, all values {value:g}"
                )
            idle.add(name)
    return idle | {name for name in file.entries if _is_idle_gate(file.path, name, idle)}


def _is_idle_gate(path: Path, name: str, idle: set[str]) -> bool:
    for pattern, owner in GATES:
        if found := re.fullmatch(pattern, name):
            if found.expand(owner) not in idle:
                raise CheckpointError(
                    f"{path}: tensor {name} is the gate of {found.expand(owner)}, which is not there; restore the file"
                )
            return True
    return False
