"""Naming the first tensor that is not finite, once a run has to stop for it."""

from __future__ import annotations

from torch import Tensor, nn


def first_bad_tensor(module: nn.Module, run_batch) -> str:
    """A weight by its canonical name, else the first module whose output is not finite on the batch at hand.

    run_batch: calls the model once, on every rank alike. A weight that ZeRO 3 keeps in parts is judged by this rank's.
    """
    for name, parameter in module.named_parameters():
        data = getattr(parameter, "ds_tensor", parameter)
        if not bool(data.isfinite().all()):
            return f"weight {name}"
    found: list[str] = []

    def watch(name: str):
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
    return f"output of {found[0]}" if found else "a gradient (weights and outputs are finite)"
