"""Naming the first tensor that is not finite, once a run has to stop for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def first_bad_tensor(module: nn.Module, run_batch: Callable[[], None]) -> str:
    """A weight by its canonical name, else the first module whose output is not finite on the batch at hand.

    Every rank calls it and gets the same answer, whichever of them saw the trouble. run_batch: calls the model once.
    """
    names = [name for name, _ in module.named_parameters()]
    tensors = (getattr(parameter, "ds_tensor", parameter) for parameter in module.parameters())
    bad = next((index for index, tensor in enumerate(tensors) if not bool(tensor.isfinite().all())), None)
    found = [index for index in _gather(bad) if index is not None]
    if found:
        return f"weight {names[min(found)]}"
    outputs = [name for name in _gather(_first_bad_output(module, run_batch)) if name is not None]
    return f"output of {outputs[0]}" if outputs else "a gradient (weights and outputs are finite)"


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _first_bad_output(module: nn.Module, run_batch: Callable[[], None]) -> str | None:
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            if any(isinstance(part, Tensor) and not bool(part.isfinite().all()) for part in parts):
                found.append(name)

        return hook

    handles = [child.register_forward_hook(watch(name)) for name, child in module.named_modules() if name]
    try:
        run_batch()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
