"""Naming the first tensor that is not finite, once a run has to stop for it, and a way on that can work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from megatron_adamba.config.sections import OptimizerConfig


def first_bad_tensor(module: nn.Module, names: Sequence[str], run_batch: Callable[[], None]) -> str:
    """A weight by its canonical name, else the first module whose output is not finite on the batch at hand.

    Every rank calls it and gets the same answer, whichever of them saw the trouble. names: of all weights, in the
    model's order; run_batch: runs the model once.
    """
    tensors = {name: getattr(parameter, "ds_tensor", parameter) for name, parameter in module.named_parameters()}
    bad = next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)
    found = [name for name in _gather(bad) if name is not None]
    if found:
        return f"weight {min(found, key=names.index)}"
    outputs = [name for name in _gather(_first_bad_output(module, run_batch)) if name is not None]
    return f"output of {outputs[0]}" if outputs else "a gradient (weights and outputs are finite)"


def way_on(kept: Path | None, optimizer: OptimizerConfig, run_dir: str) -> str:
    """Flags with which the run may get past the step: going on as before would meet it again. kept: a checkpoint from
    before the update that led into it, if there is one."""
    usual = {"lr": OptimizerConfig.lr, "muon_lr": OptimizerConfig.muon_lr}
    names = ["lr", *(["muon_lr"] if optimizer.name == "muon" else []), "embedding_lr", "head_lr", "vector_lr"]
    begin = f"--resume {kept}" if kept else f"a fresh start with --logging.run_dir {run_dir}-2"
    if optimizer.weight_decay * max(optimizer.lr, optimizer.muon_lr if optimizer.name == "muon" else 0.0) >= 1:
        # every step takes away more than the whole weight
        return f"{begin} --optimizer.weight_decay 0.1"
    rates = {name: rate for name in names if (rate := getattr(optimizer, name)) is not None}
    # a rate that blew up within a run is halved, one beyond all use goes to the usual one
    halved = {name: rate / 2 if rate <= 1 else usual.get(name, OptimizerConfig.lr) for name, rate in rates.items()}
    flags = " ".join(f"--optimizer.{name} {rate:g}" for name, rate in halved.items())
    return f"{begin} {flags}"


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
