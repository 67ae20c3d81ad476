"""A wider model that computes what the old one did: new channels carry zero, and new units are not listened to yet."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_adamba.blueprint.gates import stored_manifest
from megatron_adamba.blueprint.growth import AxisGrowth, growth_of
from megatron_adamba.blueprint.manifest import ParamSpec
from megatron_adamba.checkpoint.history import extended_history
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.model.init import initial_tensor
from megatron_adamba.surgery.canonical_source import CanonicalSource, open_canonical, require_whole
from megatron_adamba.surgery.expand_config import ADD_HEADS, Sizes, grown_config
from megatron_adamba.surgery.growth import copy_kept, fill_low_rank, silence
from megatron_adamba.surgery.writing import Job, PlannedTensor

_KEEPS = "the logits are the source's at the new full width and at every old width; optimizer state is dropped"
_NEAR = (
    "near the source's logits: the norm of queries and keys sees the new keys; measure it with adamba surgery "
    "compare; optimizer state is dropped"
)


@dataclass(frozen=True)
class Noise:
    """New weights that read: A @ B of this rank, A of standard deviation `std`."""

    rank: int
    std: float
    seed: int


def expand(source: Path, hidden_size: int, heads: str, noise: Noise, sizes: Sizes) -> Job:
    """Plan a model of `hidden_size` channels.

    heads: "add-heads" adds KV groups of the old head_dim, "grow-dim" makes every head larger. sizes: what is not to
    grow in proportion. What reads new channels, and new units, are random; what writes new channels, and what carries
    new units back, is zero.
    Raises CheckpointError, ConfigError.
    """
    old = open_canonical(source)
    require_whole(old.config, source, "expand")
    config = grown_config(old.config, hidden_size, heads, sizes)
    specs = {spec.name: spec for spec in stored_manifest(old.config)}
    growth = _Growth(old, config, growth_of(old.config, config), noise)
    plan = tuple(growth.plan(specs[spec.name], spec) for spec in stored_manifest(config))
    values = {**old.opened.config, "model": asdict(config)}
    arguments = {"hidden_size": hidden_size, "heads": heads, **asdict(noise), **sizes.given()}
    history = extended_history(source, "expand", arguments, "canonical")
    promise = _KEEPS if heads == ADD_HEADS or not old.config.qk_norm else _NEAR
    return Job(plan, values, history, promise, old.tokenizer_files())


@dataclass(frozen=True)
class _Growth:
    """One expansion."""

    source: CanonicalSource
    config: ResolvedModel
    axes: dict[str, tuple[AxisGrowth, ...]]
    noise: Noise

    def plan(self, old: ParamSpec, new: ParamSpec) -> PlannedTensor:
        """What becomes of one tensor."""
        dtype = self.source.dtype(old.name)
        read = partial(self.source.read, old.name)
        if old.shape == new.shape:
            return PlannedTensor(new.name, new.shape, dtype, f"{old.name}, as it is", read)
        axes = self.axes[new.name]
        origin = f"{old.name} {list(old.shape)}, new places {self._fill_name(new)}"
        return PlannedTensor(new.name, new.shape, dtype, origin, lambda: self._make(new, axes, read(), dtype))

    def _make(self, new: ParamSpec, axes: tuple[AxisGrowth, ...], old: Tensor, dtype: torch.dtype) -> Tensor:
        fill = self._fill_name(new)
        if fill == "initial":
            tensor = initial_tensor(new, self.noise.seed).to(dtype)
        elif fill == "random":
            tensor = torch.empty(new.shape, dtype=dtype)
            fill_low_rank(tensor, self.noise.rank, self.noise.std, self.noise.seed, new.name)
        else:
            tensor = torch.zeros(new.shape, dtype=dtype)
        if fill == "the widest's":
            tensor[:] = old[-1]
        copy_kept(tensor, old, axes)
        self._silence(tensor, new, axes)
        return tensor

    @staticmethod
    def _fill_name(spec: ParamSpec) -> str:
        if spec.group == "gain":
            return "the widest's"
        if spec.group == "norm" or (spec.group == "mamba" and spec.kind == "vector"):
            return "initial"
        if spec.group == "gate":
            return "zero"
        reads = spec.group == "head" or (spec.kind in ("matrix", "matrices") and spec.init != "output")
        return "random" if reads else "zero"

    def _silence(self, tensor: Tensor, spec: ParamSpec, axes: tuple[AxisGrowth, ...]) -> None:
        leaf = spec.name.rsplit(".", 1)[-1]
        if spec.name.endswith(("x_proj.weight", "dt_proj.weight")):
            # inside the mixer: old time steps, B and C do not listen to new channels, nor old channels to new ranks
            silence(tensor, [place for _, place in axes[0].kept()], axes[1].added())
        if self.config.head_dim != self.source.config.head_dim and leaf == "q_weight":
            # a score is the old one where the new part of the query is zero, whatever the key's
            silence(tensor, axes[0].added(), [slice(None)])
