"""A mixture-of-experts layer beside `transformers` experts and DeepSpeed's MoE: forward + backward, speed, memory."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.commands.benchmarks.common import (
    DTYPES,
    PeakMemory,
    Row,
    gradient_of,
    in_subprocess,
    interleaved,
    require_small_error,
)
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.engine.launch import import_deepspeed, start_distributed
from megatron_adamba.layers.context import ForwardContext
from megatron_adamba.layers.moe.layer import MoE
from megatron_adamba.ops.activation import clamped_swiglu
from megatron_adamba.ops.host_memory import keep_freed_pages
from megatron_adamba.ops.nested_linear import Accumulation

TRANSFORMERS = ("eager", "batched_mm", "grouped_mm")
"""its experts implementations; the fastest one that can be trained is the peer"""
DEEPSPEED = "deepspeed"
CLOSE = {"fp32": 1e-5, "bf16": 0.1}
"""share of the output's norm; in bf16 tokens whose best logits are nearly equal go to other experts"""


@dataclass(frozen=True)
class Size:
    """A layer and how many tokens it gets."""

    name: str
    hidden: int
    experts: int
    rows: int
    k: int
    tokens: int
    repeats: int


SIZES = (
    Size("hidden 1024, 32 experts of 1024, top-4", 1024, 32, 1024, 4, 2048, 12),
    Size("gpt-oss-tiny", 256, 8, 256, 2, 2048, 20),
)
QUICK = (Size("quick", 32, 4, 32, 2, 24, 2),)


def measure(quick: bool) -> list[Row]:
    """Tokens/s and peak memory, ours beside each of the others."""
    start_distributed()
    rows = []
    for size in QUICK if quick else SIZES:
        _compare(size, "fp32")
        _compare(size, "bf16")
        # every measurement is a process that imports for seconds
        rows += _measure_size(size, "bf16", _trainable(size, "bf16")[: 1 if quick else None])
    return rows


def _measure_size(size: Size, dtype: str, implementations: list[str]) -> list[Row]:
    rows, threads = [], torch.get_num_threads()
    peak = in_subprocess(peak_of, "ours", size, dtype, threads)
    for name in (*implementations, DEEPSPEED):
        times = in_subprocess(times_of, name, size, dtype, threads)
        ours, theirs = (size.tokens / statistics.median(seconds) for seconds in times.values())
        ratio = statistics.median(b / a for a, b in zip(*times.values()))
        label = name if name == DEEPSPEED else f"transformers {name}"
        rows.append(Row(f"{dtype} {size.name} vs {label}", ours, theirs, "tokens/s", ratio))
        other = in_subprocess(peak_of, name, size, dtype, threads)
        rows.append(Row(f"{dtype} {size.name} vs {label}, peak memory", peak, other, "MiB", other / peak))
    return rows


def _trainable(size: Size, dtype: str) -> list[str]:
    """transformers' implementations whose backward runs on this machine."""
    found = []
    for name in TRANSFORMERS:
        try:
            _step(_layer(name, size, dtype), _input(size, dtype))()
        except (RuntimeError, ValueError):
            continue
        found.append(name)
    return found


def _compare(size: Size, dtype: str) -> None:
    x = _input(size, dtype)
    wanted = _step(_layer("ours", size, dtype), x)()
    for name in (*_trainable(size, dtype), DEEPSPEED):
        for part, mine, theirs in zip(("output", "input gradient"), wanted, _step(_layer(name, size, dtype), x)()):
            require_small_error(f"{dtype} {size.name}, {name}, {part}", mine, theirs, CLOSE[dtype])


def _input(size: Size, dtype: str, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, size.tokens, size.hidden, generator=generator).to(DTYPES[dtype])


def _step(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Forward + backward; returns the output and the gradient of the input."""

    def run() -> tuple[Tensor, Tensor]:
        if isinstance(layer, nn.Module):
            layer.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        y.backward(torch.ones_like(y))
        return y.detach(), gradient_of(leaf)

    return run


def _steps(layer: Callable[[Tensor], Tensor], size: Size, dtype: str) -> Callable[[], object]:
    """A step with another batch at every call, as in training: no expert gets as many tokens as in the last."""
    seeds = itertools.count(1)
    return lambda: _step(layer, _input(size, dtype, next(seeds)))()


def _layer(name: str, size: Size, dtype: str) -> nn.Module:
    """One side's layer, from the same random weights; the router's bias is zero, as DeepSpeed's has none."""
    ours = OurLayer(size)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            scale = 0.0 if key.endswith("router.bias") else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    layer: nn.Module = ours
    if name != "ours":
        layer = DeepSpeedLayer(ours.moe, size) if name == DEEPSPEED else TransformersLayer(ours.moe, size, name)
    return layer.to(DTYPES[dtype])


class OurLayer(nn.Module):
    """Ours at full width; gradients are handed over at once, as everybody else's."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        config = resolve_model(
            ModelConfig(
                hidden_size=size.hidden,
                block_pattern="E",
                vocab_size=8,
                head_dim=16,
                num_experts=size.experts,
                experts_per_token=size.k,
                expert_ffn_size=size.rows,
                ffn_granule=16,
            )
        )
        self.moe, self.row = MoE(config, 0), config.nest[-1]

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, seq, hidden]."""
        empty = x.new_empty(0)
        context = ForwardContext(Accumulation.DIRECT, empty, empty, {}, None, x.shape[1])
        return self.moe(x, self.row, context)


class TransformersLayer(nn.Module):
    """GptOssMLP with one of its experts implementations."""

    def __init__(self, ours: MoE, size: Size, implementation: str) -> None:
        super().__init__()
        from transformers import GptOssConfig, logging
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

        logging.set_verbosity_error()
        config: Any = GptOssConfig(
            hidden_size=size.hidden,
            intermediate_size=size.rows,
            num_local_experts=size.experts,
            num_experts_per_tok=size.k,
        )
        config._experts_implementation = implementation
        mlp: Any = GptOssMLP(config)
        self.mlp = mlp
        mine, theirs = ours.experts, mlp.experts
        with torch.no_grad():
            mlp.router.weight.copy_(ours.router.weight)
            mlp.router.bias.copy_(ours.router.bias)
            theirs.gate_up_proj[:, :, ::2] = mine.gate_weight.transpose(1, 2)
            theirs.gate_up_proj[:, :, 1::2] = mine.up_weight.transpose(1, 2)
            theirs.gate_up_proj_bias[:, ::2], theirs.gate_up_proj_bias[:, 1::2] = mine.gate_bias, mine.up_bias
            theirs.down_proj.copy_(mine.down_weight.transpose(1, 2))
            theirs.down_proj_bias.copy_(mine.down_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, seq, hidden]."""
        return self.mlp(x)[0]


class DenseExpert(nn.Module):
    """Our expert as a plain module, for a layer that wants one module an expert."""

    gate_weight: nn.Parameter
    up_weight: nn.Parameter
    down_weight: nn.Parameter
    gate_bias: nn.Parameter
    up_bias: nn.Parameter
    down_bias: nn.Parameter

    def __init__(self, ours: MoE, number: int) -> None:
        super().__init__()
        experts = ours.experts
        self.limit, self.slope = experts.limit, experts.slope
        for name in experts.NAMES:
            self.register_parameter(name, nn.Parameter(getattr(experts, name)[number].detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden]."""
        gate, up = F.linear(x, self.gate_weight, self.gate_bias), F.linear(x, self.up_weight, self.up_bias)
        return F.linear(clamped_swiglu(gate, up, self.limit, self.slope), self.down_weight, self.down_bias)


class DeepSpeedLayer(nn.Module):
    """deepspeed.moe.layer.MoE that drops no token, with our experts inside."""

    def __init__(self, ours: MoE, size: Size) -> None:
        super().__init__()
        import_deepspeed()
        from deepspeed.moe.layer import MoE as PeerMoE

        first = DenseExpert(ours, 0)
        options = {"drop_tokens": False, "use_rts": False, "top2_2nd_expert_sampling": False}
        self.moe = PeerMoE(size.hidden, first, size.experts, k=size.k, **options)
        self.moe.set_deepspeed_parallelism()
        held = self.moe.deepspeed_moe.experts.deepspeed_experts
        with torch.no_grad():
            self.moe.deepspeed_moe.gate.wg.weight.copy_(ours.router.weight)
            for number, expert in enumerate(held):
                expert.load_state_dict(DenseExpert(ours, number).state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, seq, hidden]."""
        return self.moe(x)[0]


def times_of(name: str, size: Size, dtype: str, threads: int) -> dict[str, list[float]]:
    """Seconds of ours and of one other side, taking turns.

    In a process of their own: who asks for more memory than there is (batched_mm may) leaves glibc's heap in a state
    that has every large block mapped anew, for whoever comes after it.
    """
    _start_alone(name, threads)
    return interleaved({side: _steps(_layer(side, size, dtype), size, dtype) for side in ("ours", name)}, size.repeats)


def peak_of(name: str, size: Size, dtype: str, threads: int) -> float:
    """MiB that passes of one side add to a process in which its layer is built."""
    _start_alone(name, threads)
    run = _steps(_layer(name, size, dtype), size, dtype)
    peak = PeakMemory()
    for _ in range(size.repeats):
        run()
    return peak.added()


def _start_alone(name: str, threads: int) -> None:
    """The allocator as in a run; a process group for the side that needs one."""
    torch.set_num_threads(threads)
    keep_freed_pages()
    if name != DEEPSPEED:
        return
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(variable, None)  # the parent's group is not ours
    start_distributed()
