"""An elastic attention + MLP block inside the engine, beside two other ways to have the same function at a width.

The peers: a dense block built at that width out of torch's own modules, and a block of full size whose activations
are multiplied by masks. All three run in a `TrainingSession` of their own (one process, ZeRO 1, 8 micro-batches to a
step) and use the same norm, rotary and activation kernels, so that the nesting is what differs.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn

from megatron_adamba.blueprint.manifest import ParamSpec, manifest
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.commands.benchmarks.common import (
    DTYPES,
    TOLERANCE,
    Row,
    gradient_of,
    require_close,
    seconds,
    time_row,
)
from megatron_adamba.config.ds_config import complete_ds_config
from megatron_adamba.config.model import ModelConfig, NestRow
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.config.root import AdambaConfig
from megatron_adamba.config.sections import OptimizerConfig, TrainConfig
from megatron_adamba.engine.launch import start_distributed, stop_distributed
from megatron_adamba.engine.session import TrainingSession
from megatron_adamba.layers.block import AttentionBlock
from megatron_adamba.layers.context import ForwardContext
from megatron_adamba.model.init import initial_tensor
from megatron_adamba.ops.activation import relu_squared
from megatron_adamba.ops.attention import attend
from megatron_adamba.ops.nested_linear import Accumulation
from megatron_adamba.ops.rms_norm import rms_norm
from megatron_adamba.ops.rotary import rotary_table, rotate_and_norm
from megatron_adamba.parallel.topology import RankGrid, build_topology

MICRO_BATCHES = 8
LINEARS = {
    "q": "attention.qkv.q_weight",
    "k": "attention.qkv.k_weight",
    "v": "attention.qkv.v_weight",
    "o": "attention.out.o_weight",
    "up": "mlp.up.up_weight",
    "down": "mlp.down.down_weight",
}
"""the peers' linear layers and where our block keeps the same weights"""


def measure(quick: bool) -> list[Row]:
    """Rows for every dtype and width."""
    hidden, batch, seq, steps = (64, 2, 16, 2) if quick else (1024, 2, 512, 4)
    config = resolve_model(
        ModelConfig(
            hidden_size=hidden,
            num_layers=1,
            vocab_size=8,
            head_dim=8 if quick else 64,
            ffn_granule=16 if quick else 64,
            widths=[hidden // 8, hidden // 4, hidden // 2, hidden],
        )
    )
    info = start_distributed()
    rows = []
    for dtype in DTYPES:
        for row in config.nest:
            rows += _measure_width(config, row, dtype, batch, seq, steps, info)
            # engines hold cycles, and with them their flat buffers
            gc.collect()
    stop_distributed()
    return rows


class BlockLoss(nn.Module):
    """A block and the mean square of its output: what the engine is given as a model."""

    def __init__(self, block: nn.Module, config: ResolvedModel, row: NestRow) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])
        self.config, self.row = config, row

    def output(self, x: Tensor, accumulation: Accumulation) -> Tensor:
        """x: [batch, seq, channels] -> the same shape."""
        positions = torch.arange(x.shape[1])
        cos, sin = rotary_table(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_sign)
        return self.blocks[0](x, self.row, ForwardContext(accumulation, cos, sin, {None: None}, None))

    def forward(self, x: Tensor, accumulation: Accumulation, all_take_part: bool) -> Tensor:
        return self.output(x, accumulation)[..., : self.row.width].float().square().mean()


class DenseBlock(nn.Module):
    """The block at one width and nothing else, out of torch's linear layers; its weights are copies of `source`'s."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    up: nn.Linear
    down: nn.Linear

    def __init__(self, config: ResolvedModel, source: AttentionBlock, row: NestRow) -> None:
        super().__init__()
        self.heads_per_group = config.num_heads // config.num_kv_groups
        self.head_dim, self.eps = config.head_dim, config.norm_eps
        self.head_norm = config.head_dim if config.qk_norm else None
        self.norm_size = row.norm_size
        width, keys = row.width, row.kv_groups * config.head_dim
        queries = keys * self.heads_per_group
        shapes = {
            "q": (queries, width),
            "k": (keys, width),
            "v": (keys, width),
            "o": (width, queries),
            "up": (row.ffn, width),
            "down": (width, row.ffn),
        }
        for name, (rows, cols) in shapes.items():
            linear = nn.Linear(cols, rows, bias=False)
            linear.weight.data.copy_(source.get_parameter(LINEARS[name]).data[:rows, :cols])
            self.add_module(name, linear)
        norm = lambda name: nn.Parameter(source.get_parameter(f"{name}.weight").data[:width].clone())
        self.attention_norm, self.mlp_norm = norm("attention_norm"), norm("mlp_norm")

    def forward(self, x: Tensor, row: NestRow, context: ForwardContext) -> Tensor:
        """x: [batch, seq, width] -> the same shape."""
        u = rms_norm(x, self.attention_norm, self.norm_size, self.eps)
        q, k, v = (self._heads(linear(u)) for linear in (self.q, self.k, self.v))
        q = rotate_and_norm(q, context.cos, context.sin, self.head_norm, self.eps)
        k = rotate_and_norm(k, context.cos, context.sin, self.head_norm, self.eps)
        x = x + self.o(attend(q, k, v, None, self.head_dim**-0.5))
        u = rms_norm(x, self.mlp_norm, self.norm_size, self.eps)
        return x + self.down(relu_squared(self.up(u)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim)


class MaskedBlock(DenseBlock):
    """The block at full size, every activation multiplied by a mask that leaves a width's share of it."""

    width: Tensor
    queries: Tensor
    keys: Tensor
    ffn: Tensor

    def __init__(self, config: ResolvedModel, source: AttentionBlock, row: NestRow) -> None:
        super().__init__(config, source, config.nest[-1])
        self.norm_size = row.norm_size
        keys = row.kv_groups * config.head_dim
        kept = {"width": row.width, "queries": keys * self.heads_per_group, "keys": keys, "ffn": row.ffn}
        whole = {"width": config.hidden_size, "ffn": config.ffn_size}
        whole |= {
            "queries": config.num_heads * config.head_dim,
            "keys": config.num_kv_groups * config.head_dim,
        }
        for name, size in whole.items():
            self.register_buffer(name, (torch.arange(size) < kept[name]).to(torch.float32))

    def forward(self, x: Tensor, row: NestRow, context: ForwardContext) -> Tensor:
        """x: [batch, seq, hidden_size], zero past the width -> the same shape."""
        u = rms_norm(x, self.attention_norm, self.norm_size, self.eps) * self.width
        q, k, v = (self._heads(linear(u) * mask) for linear, mask in self._projections())
        q = rotate_and_norm(q, context.cos, context.sin, self.head_norm, self.eps)
        k = rotate_and_norm(k, context.cos, context.sin, self.head_norm, self.eps)
        x = x + self.o(attend(q, k, v, None, self.head_dim**-0.5)) * self.width
        u = rms_norm(x, self.mlp_norm, self.norm_size, self.eps) * self.width
        return x + self.down(relu_squared(self.up(u)) * self.ffn) * self.width

    def _projections(self):
        return (self.q, self.queries), (self.k, self.keys), (self.v, self.keys)


def _peer_specs(model: nn.Module) -> tuple[ParamSpec, ...]:
    kinds = {2: ("mlp", "matrix"), 1: ("norm", "vector")}
    return tuple(ParamSpec(name, tuple(p.shape), *kinds[p.dim()], "linear") for name, p in model.named_parameters())


def _our_model(block: AttentionBlock, config: ResolvedModel, row: NestRow) -> tuple[BlockLoss, tuple[ParamSpec, ...]]:
    model = BlockLoss(block, config, row)
    specs = tuple(spec for spec in manifest(config) if spec.name.startswith("blocks.0."))
    with torch.no_grad():
        for spec in specs:
            model.get_parameter(spec.name).copy_(initial_tensor(spec, 0))
        for parameter in (block.get_parameter(LINEARS[name]) for name in ("o", "down")):
            # at their birth output projections are zero, or nearly, and would hide what stands before them
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=torch.Generator().manual_seed(1))
    return model, specs


def _session(model: Any, specs: tuple[ParamSpec, ...], dtype: str, batch: int, info) -> TrainingSession:
    train = TrainConfig(micro_batch_size=batch, global_batch_size=batch * MICRO_BATCHES)
    config = AdambaConfig(model=model.config, train=train, optimizer=OptimizerConfig(lr=1e-5))
    settings: dict[str, Any] = {"zero_optimization": {"stage": 1}}
    if dtype == "bf16":
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    settings = complete_ds_config(settings, config, info.world_size, "the benchmark")
    return TrainingSession(model, specs, config.optimizer, settings, info, build_topology(RankGrid(info.world_size)))


def _measure_width(config, row: NestRow, dtype: str, batch: int, seq: int, steps: int, info) -> list[Row]:
    block = AttentionBlock(config, None)
    ours, specs = _our_model(block, config, row)
    models = {"ours": ours}
    models["dense"] = BlockLoss(DenseBlock(config, block, row), config, row)
    models["masked"] = BlockLoss(MaskedBlock(config, block, row), config, row)
    x = torch.randn(batch, seq, row.width, generator=torch.Generator().manual_seed(2)).to(DTYPES[dtype])
    inputs = {"ours": x, "dense": x, "masked": nn.functional.pad(x, (0, config.hidden_size - row.width))}
    for model in models.values():
        model.to(DTYPES[dtype])
    _compare(models, inputs, row, DTYPES[dtype], f"{dtype} width {row.width}")
    sessions = {
        name: _session(model, specs if name == "ours" else _peer_specs(model), dtype, batch, info)
        for name, model in models.items()
    }
    return _time_sessions(sessions, inputs, steps, f"{dtype} width {row.width}")


def _compare(models: dict[str, BlockLoss], inputs: dict[str, Tensor], row, dtype: torch.dtype, what: str) -> None:
    """Outputs and the gradients of inputs and weights, before any engine has them."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, model in models.items():
        x = inputs[name].clone().requires_grad_()
        y = model.output(x, Accumulation.DIRECT)[..., : row.width]
        y.float().square().mean().backward()
        block = model.blocks[0]
        names = LINEARS.values() if name == "ours" else [f"{linear}.weight" for linear in LINEARS]
        grads = {linear: gradient_of(block.get_parameter(place)) for linear, place in zip(LINEARS, names)}
        found[name] = {"output": y.detach(), "input gradient": gradient_of(x)[..., : row.width], **grads}
        model.zero_grad(set_to_none=True)
    for peer in ("dense", "masked"):
        for part, theirs in found[peer].items():
            mine = found["ours"][part]
            if peer == "dense":
                mine = mine[tuple(slice(0, size) for size in theirs.shape)]
            require_close(f"{what}, {part} beside {peer}", mine, theirs, TOLERANCE[dtype])


def _time_sessions(sessions: dict[str, TrainingSession], inputs: dict[str, Tensor], steps: int, what: str) -> list[Row]:
    """The sides take turns micro-batch by micro-batch; the first step warms up and its losses are compared."""
    inner: dict[str, list[float]] = {name: [] for name in sessions}
    last: dict[str, list[float]] = {name: [] for name in sessions}
    step: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(1 + steps):
        for index in range(MICRO_BATCHES):
            losses: dict[str, Tensor] = {}
            for name, session in sessions.items():
                x = inputs[name].clone().requires_grad_()
                taken = seconds(lambda: losses.setdefault(name, session.micro_step(x=x)))  # noqa: B023
                if number and 0 < index < MICRO_BATCHES - 1:
                    inner[name].append(taken)
                elif number and index:
                    last[name].append(taken)
            if number == 0:
                for peer in ("dense", "masked"):
                    require_close(f"{what}, loss beside {peer}", losses["ours"], losses[peer], 0.02)
        norms: dict[str, float] = {}
        for name, session in sessions.items():
            taken = seconds(lambda: norms.setdefault(name, session.step().grad_norm))  # noqa: B023
            if number:
                step[name].append(taken)
    rows = [time_row(f"{what} vs {peer}", inner["ours"], inner[peer]) for peer in ("dense", "masked")]
    rows.append(time_row(f"{what}, hand-over micro-batch (peer dense)", last["ours"], last["dense"], False))
    rows.append(time_row(f"{what}, optimizer step (peer dense)", step["ours"], step["dense"], False))
    return rows
