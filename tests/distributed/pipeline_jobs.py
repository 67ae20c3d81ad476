"""Jobs about what a pipeline's stages keep, and what becomes of the others when one fails."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from typing import Any

import torch
from curve import build_session, micro_batch, run_config
from torch import Tensor

from megatron_adamba.elastic.plan import full_plan
from megatron_adamba.engine.session import MicroStep, TrainingSession


class Kept:
    """Bytes that autograd keeps for backward, now and at the most; of weights, which it keeps by name, none."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        if tensor.is_leaf:
            return (tensor,)
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        holder = [tensor]
        handle = _Handle(holder)
        weakref.finalize(handle, self._free, size)
        return handle

    def _free(self, size: int) -> None:
        self.now -= size

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        return packed[0] if isinstance(packed, tuple) else packed.holder[0]


class _Handle:
    def __init__(self, holder: list[Tensor]) -> None:
        self.holder = holder


def kept_activations(info, arguments: dict[str, Any], micro_batches: int, **layout: Any) -> dict[str, Any]:
    """A step at full width: the most that this rank kept, and what one pass through each of its chunks keeps."""
    config = run_config(**arguments)
    config.train.global_batch_size = 2 * micro_batches
    session = build_session(info, config, 1, **layout)
    plan = full_plan(config.model)
    steps = [MicroStep(**micro_batch(0, number), plan=plan) for number in range(micro_batches)]
    session.train_step(steps)
    gc.collect()
    kept = Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        session.train_step(steps)
    passes = {number: _one_pass(session, chunk, steps[0]) for number, chunk in session.runner.chunks.items()}
    return {"most": kept.most, "passes": passes}


def _one_pass(session: TrainingSession, chunk, one: MicroStep) -> int:
    from megatron_adamba.ops.nested_linear import Accumulation

    kept, model = Kept(), session.module
    context = model.training_context(one.tokens, one.seq_idx, Accumulation.DEFER)
    shape = (*one.tokens.shape, model.config.hidden_size)
    x = None if chunk.embedding else torch.randn(shape).requires_grad_().clone()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        model.run_chunk(chunk, x, one.tokens, one.labels, context, one.plan, False)
    return kept.most


def fails_in_the_middle(info, arguments: dict[str, Any], how: str, at: int, **layout: Any) -> None:
    """A stage raises, or is killed, in its third forward pass."""
    config = run_config(**arguments)
    session = build_session(info, config, 1, **layout)
    steps = [MicroStep(**micro_batch(0, number), plan=full_plan(config.model)) for number in range(4)]
    session.train_step(steps)
    if info.rank == at:
        calls = []

        def fail(*_: Any) -> None:
            calls.append(1)
            if len(calls) == 3 and how == "raises":
                raise ValueError("the third pass went wrong")
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        block = next(index for chunk in session.runner.chunks.values() for index in chunk.blocks)
        session.module.blocks[block].register_forward_pre_hook(fail)
    session.train_step(steps)
