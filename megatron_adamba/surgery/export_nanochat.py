"""A canonical checkpoint of nanochat's kind for nanochat itself, and for transformers' NanoChatForCausalLM."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_adamba.blueprint.manifest import ParamSpec, manifest
from megatron_adamba.blueprint.resolve import attention_windows, resolve_model
from megatron_adamba.checkpoint.history import extended_history
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.errors import CheckpointError, ConfigError
from megatron_adamba.surgery.canonical_source import CanonicalSource, open_canonical
from megatron_adamba.surgery.export_tokenizer import published_text
from megatron_adamba.surgery.importing import FLOATS
from megatron_adamba.surgery.nanochat import OWN, TRANSFORMERS, Layout, norm_of
from megatron_adamba.surgery.nanochat_config import (
    CodeSettings,
    read_metadata,
    read_transformers_config,
    to_metadata,
    to_transformers_config,
)
from megatron_adamba.surgery.writing import Job, PlannedTensor

PROMISE = (
    "the logits at full width are the source's; its gains are folded into the matrices behind them, those of narrow "
    "widths are left"
)
TORCH_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
MAX_STEP = 999_999
_LEFT = {
    "widths",
    "nest",
    "end_tokens",
    "modes",
    "ffn_granule",
    "gate_size",
    "estimator_reference",
    "norm_weight",
    "sliding_window",
    "window_pattern",
    "rope_original_context",
    "rope_beta_fast",
    "rope_beta_slow",
}
"""settings that need not come back: narrow widths, gates, what is folded or looked at by itself, and YaRN's, which is
off"""
_OF_OTHER_BLOCKS = ("mamba_", "router_", "expert", "num_experts")


def export_hugging_face_nanochat(source: Path, dtype: torch.dtype | None = None) -> Job:
    """Plan a folder of transformers'. dtype: of every tensor; None keeps each one's own.

    Raises CheckpointError naming the block, setting or tensor that NanoChatForCausalLM does not have.
    """
    old = open_canonical(source)
    read = partial(read_transformers_config, source)
    check_exportable(old.config, source, "NanoChat", lambda: read(to_transformers_config(old.config, "float32")))
    plan = _Exporter(old, TRANSFORMERS, dtype).plan()
    # transformers casts all tensors to this one: the wider loses nothing
    widest = torch.float32 if any(tensor.dtype == torch.float32 for tensor in plan) else torch.bfloat16
    text = published_text(old)
    values = to_transformers_config(old.config, TORCH_NAMES[widest]) | text.settings
    history = extended_history(source, "export hf", {"dtype": _named(dtype)}, "canonical")
    return Job(plan, values, history, PROMISE, contents=text.files)


def export_nanochat(source: Path, step: int = 0, dtype: torch.dtype | None = None) -> Job:
    """Plan one of nanochat's own checkpoints in the form of its first release; the job's config is its metadata.

    step: what it calls itself; dtype: as above. Raises CheckpointError as above, ConfigError (step).
    """
    if not 0 <= step <= MAX_STEP:
        raise ConfigError(f"--step {step}: must lie between 0 and {MAX_STEP}, for example --step 0")
    old = open_canonical(source)
    read = lambda: read_metadata(source, to_metadata(old.config, step), CodeSettings(), None)
    check_exportable(old.config, source, "nanochat's first release", read)
    plan = _Exporter(old, OWN, dtype).plan()
    arguments = {"step": step, "dtype": _named(dtype)}
    history = extended_history(source, "export nanochat", arguments, "canonical")
    return Job(plan, to_metadata(old.config, step), history, PROMISE, old.tokenizer_files())


def _named(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else TORCH_NAMES.get(dtype)


def check_exportable(config: ResolvedModel, source: Path, target: str, read_back: Callable[[], ModelConfig]) -> None:
    """Whether what is written would be read as the same model.

    read_back: the model of the settings that are about to be written. Raises CheckpointError naming the first setting
    that is lost.
    """
    if strange := set(config.block_pattern) - {"T"}:
        raise CheckpointError(
            f"{source}: blocks {', '.join(sorted(strange))} of {config.block_pattern} are not {target}'s, which are "
            f"all T; a grafted model has no form there"
        )
    if any(window is not None for window in attention_windows(config)):
        raise CheckpointError(
            f"{source}: model.window_pattern {config.window_pattern}: {target} has L, all layers see everything"
        )
    back = resolve_model(read_back())
    for entry in fields(ModelConfig):
        if entry.name in _LEFT or entry.name.startswith(_OF_OTHER_BLOCKS):
            continue
        value, wanted = getattr(config, entry.name), getattr(back, entry.name)
        if not _same(value, wanted):
            raise CheckpointError(f"{source}: model.{entry.name} {value}: {target} has {wanted}")
    full = config.nest[-1]
    rules = (
        ("width", full.width, config.hidden_size),
        ("norm_size", full.norm_size, config.hidden_size),
        ("kv_groups", full.kv_groups, config.num_kv_groups),
        ("ffn", full.ffn, config.ffn_size),
    )
    for name, value, whole in rules:
        if value != whole:
            raise CheckpointError(
                f"{source}: {name} {value} of the full width {full.width}: {target} has {whole} (all); a model that "
                f"was grown, or uses a part of itself, cannot be exported"
            )


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(value, float) and isinstance(wanted, float):
        return math.isclose(value, wanted, rel_tol=1e-6)
    return value == wanted


@dataclass
class _Exporter:
    old: CanonicalSource
    layout: Layout
    dtype: torch.dtype | None

    def plan(self) -> tuple[PlannedTensor, ...]:
        """Their tensors, in the order of ours. Raises CheckpointError naming a tensor that cannot be folded."""
        if self.old.config.tie_embeddings:
            self._check_final_norm()
        return tuple(self._tensor(spec) for spec in manifest(self.old.config) if spec.group not in ("gain", "norm"))

    def _tensor(self, spec: ParamSpec) -> PlannedTensor:
        own = self.old.dtype(spec.name)
        dtype = self.dtype or own
        if dtype not in FLOATS:
            raise CheckpointError(
                f"{self.old.opened.folder}: {spec.name} is {dtype}; give --dtype bf16 or --dtype fp32"
            )
        norm = norm_of(spec.name)
        origin = spec.name if norm is None else f"{spec.name} times {norm}"

        def make() -> Tensor:
            matrix = self.old.read(spec.name)
            if norm is None:
                return matrix.to(dtype)
            return (matrix.float() * self._scale(norm)).to(dtype)

        return PlannedTensor(self.layout.place(spec.name), spec.shape, dtype, origin, make)

    def _scale(self, norm: str) -> Tensor:
        """What a norm multiplies its output by at full width, fp32: a number, or one of each channel."""
        gain = self.old.read(f"{norm}.gain")[-1].float()
        return self.old.read(f"{norm}.weight").float() * gain if self.old.config.norm_weight else gain

    def _check_final_norm(self) -> None:
        scale = self._scale("final_norm")
        if not bool((scale == 1).all()):
            worst = scale.flatten()[(scale - 1).abs().argmax()].item()
            raise CheckpointError(
                f"{self.old.opened.folder}: final_norm multiplies by {worst:g}, which the head would take; but "
                f"model.tie_embeddings is true, and the embedding cannot take it; untie the head"
            )
