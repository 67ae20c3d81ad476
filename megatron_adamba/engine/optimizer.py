"""The optimizer that DeepSpeed is given: AdamW, and Muon for hidden matrices, on whole tensors or flat partitions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from megatron_adamba.blueprint.manifest import ParamSpec
from megatron_adamba.config.sections import OptimizerConfig
from megatron_adamba.parallel.layout import cut, join, local_shape
from megatron_adamba.parallel.topology import Topology

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""quintic Newton-Schulz iteration of Muon (Jordan et al. 2024)"""
NS_STEPS = 5


def parameter_groups(
    module: nn.Module,
    specs: Sequence[ParamSpec],
    config: OptimizerConfig,
    experts_apart: str | None = None,
    elsewhere: Sequence[ParamSpec] = (),
    fillers: Sequence[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Groups of trainable parameters, each with its peak learning rate in `peak_lr`.

    Only matrices decay. Groups carry the specs of their parameters in the parameters' order, because ZeRO replaces
    the parameters by one flat partition. experts_apart: DeepSpeed's name for the ranks that experts are summed up
    over; they then have groups of their own. elsewhere: what trains on other pipeline stages; a group that would hold
    nothing else gets one of `fillers`, so that all stages have the same groups.
    """
    parameters = dict(module.named_parameters())
    trained = [spec for spec in specs if parameters[spec.name].requires_grad] + list(elsewhere)
    apart = [spec for spec in trained if experts_apart and spec.group == "expert"]
    trained = [spec for spec in trained if spec not in apart]
    muon = config.name == "muon"
    choice = lambda value: config.lr if value is None else value
    plans = (
        ("muon", [s for s in trained if muon and s.kind == "matrix"], config.muon_lr, config.weight_decay),
        ("matrix", [s for s in trained if not muon and s.kind == "matrix"], config.lr, config.weight_decay),
        ("experts", [s for s in trained if s.kind == "matrices"], config.lr, config.weight_decay),
        ("embedding", [s for s in trained if s.group == "embedding"], choice(config.embedding_lr), 0.0),
        ("head", [s for s in trained if s.group == "head"], choice(config.head_lr), 0.0),
        ("vector", [s for s in trained if s.kind == "vector"], choice(config.vector_lr), 0.0),
        (experts_apart, [s for s in apart if s.kind == "matrices"], config.lr, config.weight_decay),
        (experts_apart, [s for s in apart if s.kind == "vector"], choice(config.vector_lr), 0.0),
    )
    return [
        {
            "params": [parameters[spec.name] for spec in members if spec not in elsewhere] or [fillers[number]],
            "name": name,
            "use_muon": name == "muon",
            "moe": name is not None and name == experts_apart,
            "specs": [spec for spec in members if spec not in elsewhere],
            "peak_lr": peak,
            "lr": peak,
            "weight_decay": decay,
        }
        for number, (name, members, peak, decay) in enumerate(plans)
        if members
    ]


class ElasticOptimizer(torch.optim.AdamW):
    """AdamW (arXiv 1711.05101), and Muon for groups with `use_muon`.

    Under ZeRO 1 and 2 the one parameter of a Muon group is this rank's slice of all its matrices laid end to end, in
    order and padded at the end: the momentum is gathered over data-parallel and tensor-parallel ranks, matrices that
    overlap the slice are orthogonalized whole, and the slice of the result is kept. The gradient arrives
    clipped by its raw norm.
    `skip_step` makes the next steps leave weights and state as they are, until it is set back.
    """

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimizerConfig, ns_dtype: torch.dtype, topology: Topology
    ) -> None:
        betas = (config.beta1, config.beta2)
        fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
        super().__init__(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)
        self.muon_momentum = config.muon_momentum
        self.ns_dtype, self.topology = ns_dtype, topology
        self.skip_step = False
        self._slow: dict[Tensor, Tensor] = {}
        self._slow_factor = 1.0
        self._parts: dict[Tensor, list[tuple[slice, Tensor]]] = {}
        """of tensors whose parameters have made different numbers of steps: each part and its own count"""

    def slow_down(self, masks: dict[Tensor, Tensor], factor: float) -> None:
        """masks: of tensors that are stepped, where their updates count `factor`."""
        self._slow, self._slow_factor = masks, factor

    def set_steps(self, flat: Tensor, counts: Sequence[tuple[slice, int]]) -> None:
        """How many steps the state of a tensor has seen, part by part, as bias correction (arXiv 1412.6980 section 3)
        goes by a parameter's own count. counts: of every part that belongs to a parameter."""
        state = self.state[flat]
        if "step" not in state:
            return
        different = {count for _, count in counts}
        state["step"].fill_(float(max(different, default=0)))
        self._parts.pop(flat, None)
        if len(different) > 1:
            scalar = lambda count: torch.tensor(float(count), device=flat.device)
            self._parts[flat] = [(part, scalar(count)) for part, count in _joined(counts)]

    @torch.no_grad()
    def step(self, closure=None):
        if self.skip_step:
            return None
        stepped = [p for group in self.param_groups for p in group["params"] if p in self._slow and p.grad is not None]
        before = {p: p.clone() for p in stepped}
        self._step_groups()
        for p, slow in before.items():
            slow.lerp_(p, self._slow_factor)
            torch.where(self._slow[p], slow, p, out=p)
        return None

    def _step_groups(self) -> None:
        groups = self.param_groups
        try:
            self.param_groups = [
                {**group, "params": [p for p in group["params"] if p not in self._parts]}
                for group in groups
                if not group["use_muon"]
            ]
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["use_muon"]:
                self._muon_step(group)
                continue
            for p in group["params"]:
                if p in self._parts and p.grad is not None:
                    self._step_parts(p, group)

    def _step_parts(self, p: Tensor, group: dict[str, Any]) -> None:
        """The same AdamW on views, so that each has its own bias correction."""
        state, parts = self.state[p], self._parts[p]
        views = lambda tensor: [tensor.detach().view(-1)[part] for part, _ in parts]
        beta1, beta2 = group["betas"]
        adamw(
            views(p),
            views(p.grad),
            views(state["exp_avg"]),
            views(state["exp_avg_sq"]),
            [],
            [count for _, count in parts],
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon_step(self, group: dict[str, Any]) -> None:
        params, specs = [p for p in group["params"] if p.numel()], group["specs"]
        if len(params) == len(specs) and all(p.shape == s.shape for p, s in zip(params, specs)):
            for p in params:
                if p.grad is not None:
                    _apply(p, orthogonalize(self._momentum(p, p.grad), self.ns_dtype), group)
            return
        if not specs:
            # a pipeline stage without any of these matrices
            return
        (flat,) = params
        if flat.grad is None:
            return
        _apply(flat, self._orthogonal_slice(self._momentum(flat, flat.grad), specs), group)

    def _momentum(self, p: Tensor, grad: Tensor) -> Tensor:
        """Nesterov momentum; the sum of past gradients is the state `exp_avg`."""
        state = self.state[p]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(p)
        average = state["exp_avg"].lerp_(grad, 1 - self.muon_momentum)
        return grad.lerp(average, self.muon_momentum)

    def _orthogonal_slice(self, update: Tensor, specs: Sequence[ParamSpec]) -> Tensor:
        size = update.numel()
        low = self.topology.place("dp") * size
        shards = self._gather_shards(self._gather_partitions(update), specs)
        tp_size, tp_rank = len(shards), self.topology.place("tp")
        starts = [0] * tp_size
        out = torch.zeros_like(update)
        for spec in specs:
            shapes = [local_shape(spec, tp_size, rank) for rank in range(tp_size)]
            ends = [start + prod(shape) for start, shape in zip(starts, shapes)]
            first, last = max(starts[tp_rank], low), min(ends[tp_rank], low + size)
            if first < last:
                parts = [flat[a:b].view(shape) for flat, a, b, shape in zip(shards, starts, ends, shapes)]
                whole = orthogonalize(join(spec, parts), self.ns_dtype)
                own = cut(spec, whole, tp_size, tp_rank).flatten()
                out[first - low : last - low] = own[first - starts[tp_rank] : last - starts[tp_rank]]
            starts = ends
        return out

    def _gather_partitions(self, update: Tensor) -> Tensor:
        """All of this tensor-parallel rank's matrices end to end, from the data-parallel ranks' slices."""
        ranks = self.topology.size("dp")
        if ranks == 1:
            return update
        whole = update.new_empty(ranks * update.numel())
        dist.all_gather_into_tensor(whole, update.contiguous(), group=self.topology.group("dp"))
        return whole

    def _gather_shards(self, own: Tensor, specs: Sequence[ParamSpec]) -> list[Tensor]:
        """The same of every tensor-parallel rank; ranks may hold one unit more or less."""
        ranks = self.topology.size("tp")
        if ranks == 1:
            return [own]
        sizes = [sum(prod(local_shape(spec, ranks, rank)) for spec in specs) for rank in range(ranks)]
        padded = own.new_zeros(max(sizes))
        padded[: sizes[self.topology.place("tp")]] = own[: sizes[self.topology.place("tp")]]
        gathered = own.new_empty(ranks, max(sizes))
        dist.all_gather_into_tensor(gathered.view(-1), padded, group=self.topology.group("tp"))
        return list(gathered)


def _joined(counts: Sequence[tuple[slice, int]]) -> list[tuple[slice, int]]:
    """Neighbours of the same count as one."""
    joined: list[tuple[slice, int]] = []
    for part, count in sorted(counts, key=lambda entry: entry[0].start):
        if joined and joined[-1][1] == count and joined[-1][0].stop == part.start:
            joined[-1] = (slice(joined[-1][0].start, part.stop), count)
        elif part.stop > part.start:
            joined.append((part, count))
    return joined


def _apply(p: Tensor, update: Tensor, group: dict[str, Any]) -> None:
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.add_(update, alpha=-group["lr"])


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Roughly U V^T of the matrix's singular value decomposition, times max(1, rows / cols)^0.5.

    matrix: [rows, cols]; computed in `dtype`, returned in the matrix's own.
    """
    a, b, c = NS_COEFFICIENTS
    rows, cols = matrix.shape
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    if rows > cols:
        x = x.t()
    for _ in range(NS_STEPS):
        gram = x @ x.t()
        poly = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, poly, x, beta=a)
    if rows > cols:
        x = x.t()
    return x.to(matrix.dtype) * max(1.0, rows / cols) ** 0.5
