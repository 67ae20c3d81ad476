"""A canonical checkpoint of the GPT-OSS kind as a folder that transformers' GptOssForCausalLM loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_adamba.blueprint.manifest import ParamSpec, manifest
from megatron_adamba.checkpoint.history import extended_history
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.errors import CheckpointError
from megatron_adamba.surgery.canonical_source import CanonicalSource, open_canonical
from megatron_adamba.surgery.export_tokenizer import published_text
from megatron_adamba.surgery.gpt_oss import LAYOUTS, Place, source_shape
from megatron_adamba.surgery.gpt_oss_config import HUGGING_FACE, to_hugging_face
from megatron_adamba.surgery.sources import OWN_DTYPES, TensorFolder
from megatron_adamba.surgery.writing import Job, PlannedTensor

PROMISE = (
    "the logits at full width are the source's; its gains are folded into the norms, those of narrow widths are left"
)
TORCH_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def export_hugging_face(source: Path, dtype: torch.dtype | None = None) -> Job:
    """Plan the folder. dtype: of every tensor; None takes that of the source's embedding.

    Raises CheckpointError naming the setting that GptOssForCausalLM does not have.
    """
    old = open_canonical(source)
    check_exportable(old.config, source)
    dtype = dtype or old.dtype("embedding.weight")
    if dtype not in TORCH_NAMES:
        raise CheckpointError(f"{source}: embedding.weight is {dtype}; give --dtype bf16 or --dtype fp32")
    plan = _Exporter(old, dtype).plan()
    text = published_text(old)
    values = to_hugging_face(old.config, TORCH_NAMES[dtype]) | text.settings
    history = extended_history(source, "export hf", {"dtype": TORCH_NAMES[dtype]}, "canonical")
    return Job(plan, values, history, PROMISE, contents=text.files)


def check_exportable(config: ResolvedModel, source: Path) -> None:
    """Raises CheckpointError naming the first setting that GptOssForCausalLM cannot express."""
    if strange := set(config.block_pattern) - {"E"}:
        raise CheckpointError(
            f"{source}: blocks {', '.join(sorted(strange))} of {config.block_pattern} are not GPT-OSS's, which are all "
            f"E; a grafted model has no form in transformers"
        )
    full = config.nest[-1]
    wanted = {
        "qk_norm": False,
        "attention_sinks": True,
        "embedding_norm": False,
        "rope_sign": 1,
        "logit_softcap": 0,
        "static_norm_size": config.hidden_size,
    }
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise CheckpointError(f"{source}: model.{name} {getattr(config, name)}: GPT-OSS has {value}")
    if config.expert_gate_limit <= 0:
        raise CheckpointError(f"{source}: model.expert_gate_limit 0: GPT-OSS always clamps")
    rules = (
        ("norm_size", full.norm_size, config.hidden_size),
        ("kv_groups", full.kv_groups, config.num_kv_groups),
        ("expert_ffn", full.expert_ffn, config.expert_ffn_size),
    )
    for name, value, whole in rules:
        if value != whole:
            raise CheckpointError(
                f"{source}: {name} {value} of the full width {full.width}: GPT-OSS has {whole} (all); "
                f"a model that was grown, or uses a part of itself, cannot be exported"
            )


@dataclass
class _Exporter:
    old: CanonicalSource
    dtype: torch.dtype

    def plan(self) -> tuple[PlannedTensor, ...]:
        """Their tensors, in the order of ours."""
        layout, config = LAYOUTS[HUGGING_FACE], self.old.config
        planned = []
        for spec in manifest(config):
            if spec.group == "gain":
                if not config.norm_weight:
                    planned.append(self._norm(spec, layout.place(spec.name.removesuffix("gain") + "weight")))
                continue
            place = layout.place(spec.name)
            if spec.group == "norm":
                planned.append(self._norm(spec, place))
            elif place.part == "up":
                continue  # goes with its gate
            elif place.expert_matrix or place.part == "gate":
                planned.append(self._experts(spec, place))
            else:
                planned.append(self._tensor(place.name, spec.shape, spec.name, partial(self.old.read, spec.name)))
        return tuple(planned)

    def _tensor(self, name: str, shape: tuple[int, ...], origin: str, make: Callable[[], Tensor]) -> PlannedTensor:
        return PlannedTensor(name, shape, self.dtype, origin, lambda: make().to(self.dtype))

    def _norm(self, spec: ParamSpec, place: Place) -> PlannedTensor:
        """weight * gain of the full width, the last one."""
        prefix, shape = spec.name.rsplit(".", 1)[0], (self.old.config.hidden_size,)

        def make() -> Tensor:
            gain = self.old.read(f"{prefix}.gain")[-1].float()
            weight = self.old.read(f"{prefix}.weight").float() if self.old.config.norm_weight else torch.ones(shape)
            return weight * gain

        return self._tensor(place.name, shape, f"{prefix}, weight times full-width gain", make)

    def _experts(self, spec: ParamSpec, place: Place) -> PlannedTensor:
        """Gate and up take turns in the outputs; matrices are transposed, [experts, inputs, outputs]."""
        pair, shape = place.part == "gate", source_shape(self.old.config, spec, place, transposed=True)
        names = [spec.name, spec.name.replace(".gate_", ".up_")] if pair else [spec.name]

        def make() -> Tensor:
            out = torch.empty(shape, dtype=self.dtype)
            rows = out.transpose(1, 2) if place.expert_matrix else out
            source = TensorFolder(self.old.opened.folder, OWN_DTYPES)
            for first, name in enumerate(names):
                source.check(name)
                for expert in range(shape[0]):
                    rows[expert, first :: len(names)] = source.rows(name, expert, expert + 1)[0]
            return out

        notes = [*(["interleaved"] if pair else []), *(["transposed"] if place.expert_matrix else [])]
        return self._tensor(place.name, shape, f"{' and '.join(names)}, {', '.join(notes)}", make)
