"""The support matrix: every pair of features put to the table of `compat`, on one small model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from megatron_adamba.blueprint.compat import RULES, RunSetup
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.root import AdambaConfig
from megatron_adamba.config.sections import TrainConfig


@dataclass(frozen=True)
class Feature:
    """Something a run may use. `sets` holds `SECTION.FIELD` of the config; one feature at a time fills a `slot`."""

    name: str
    sets: dict[str, Any] = field(default_factory=dict)
    slot: str = ""
    zero_stage: int | None = None
    least_stage: int = 1
    """ZeRO stage that it is tried with where no stage is asked for"""
    offload: bool = False
    bf16: bool = False
    world_size: int = 2


EXPERTS = {"model.block_pattern": "EM", "model.num_experts": 4, "model.experts_per_token": 2}
EXPERTS |= {"model.attention_sinks": True, "model.router_balance_weight": 0.05}
FEATURES = (
    Feature("ZeRO 0", slot="zero", zero_stage=0),
    Feature("ZeRO 1", slot="zero", zero_stage=1),
    Feature("ZeRO 2", slot="zero", zero_stage=2),
    Feature("ZeRO 3", slot="zero", zero_stage=3),
    Feature("offload", offload=True, least_stage=2),
    Feature("bf16", bf16=True),
    Feature("one process", slot="ranks", world_size=1),
    Feature("tensor parallel", {"parallel.tp": 2}, slot="ranks"),
    Feature("TP x data parallel", {"parallel.tp": 2}, slot="ranks", world_size=4),
    Feature("sequence parallel", {"parallel.tp": 2, "parallel.sp": True}),
    Feature("pipeline parallel", {"parallel.pp": 2}, slot="ranks"),
    Feature("PP x data parallel", {"parallel.pp": 2}, slot="ranks", world_size=4),
    Feature("experts", EXPERTS),
    Feature("expert parallel", EXPERTS | {"parallel.ep": 2}),
    Feature("Muon", {"optimizer.name": "muon"}),
    Feature("frozen groups", {"train.freeze": ["attention", "norm"]}),
    Feature("per-layer widths", {"elastic.width_sampling": "per_layer"}, slot="sampling"),
    Feature("sandwich", {"elastic.width_sampling": "sandwich"}, slot="sampling"),
    Feature("recompute", {"train.activation_checkpointing": True}),
    Feature("Mamba-1", {"model.mamba_version": 1, "model.mamba_num_groups": 1}),
    Feature("tied embeddings", {"model.tie_embeddings": True}),
)


def base_config() -> AdambaConfig:
    """A T and an M block, GQA, biases, a vocabulary that no degree here divides, clipping that bites."""
    model = ModelConfig(
        hidden_size=64,
        block_pattern="TM",
        vocab_size=53,
        head_dim=8,
        num_heads=8,
        num_kv_groups=4,
        linear_bias=True,
        activation="swiglu",
        ffn_granule=16,
        widths=[8, 32, 64],
        mamba_d_state=16,
        mamba_head_dim=16,
        mamba_chunk_size=8,
        mamba_num_groups=2,
        mamba_use_mlp=True,
    )
    train = TrainConfig(steps=20, micro_batch_size=2, global_batch_size=8, gradient_clipping=0.3)
    return AdambaConfig(model=model, train=train)


@dataclass(frozen=True)
class Cell:
    """Two features together (or one with itself)."""

    row: Feature
    column: Feature
    setup: RunSetup | None
    """None where both fill the same slot"""
    rule: str | None
    """the first rule of `compat` that refuses them; None where they run"""

    @property
    def supported(self) -> bool:
        return self.setup is not None and self.rule is None


def cell(row: Feature, column: Feature) -> Cell:
    """What `compat` says about two features."""
    if row is not column and row.slot and row.slot == column.slot:
        return Cell(row, column, None, None)
    setup = _combined(row, column)
    rule = next((rule.name for rule in RULES if rule.broken(setup)), None)
    return Cell(row, column, setup, rule)


def _combined(*features: Feature) -> RunSetup:
    config = base_config()
    for feature in features:
        for key, value in feature.sets.items():
            section, name = key.split(".")
            config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    if config.parallel.tp == 1 and any(feature.zero_stage == 0 for feature in features):
        ranks = 1
    else:
        ranks = next((feature.world_size for feature in features if feature.slot == "ranks"), 2)
    stage = next((feature.zero_stage for feature in features if feature.zero_stage is not None), None)
    return RunSetup(
        config=replace(config, model=resolve_model(config.model)),
        zero_stage=max(feature.least_stage for feature in features) if stage is None else stage,
        offload=any(feature.offload for feature in features),
        world_size=ranks,
        bf16=any(feature.bf16 for feature in features),
    )


def support_table() -> str:
    """The matrix in Markdown: `x` runs and is tested, a letter stands for the rule that refuses it."""
    letters: dict[str, str] = {}
    rows = []
    for index, row in enumerate(FEATURES):
        marks = []
        for column in FEATURES[: index + 1]:
            found = cell(row, column)
            if found.setup is None:
                marks.append(".")
            elif found.rule is None:
                marks.append("x")
            else:
                marks.append(letters.setdefault(found.rule, chr(ord("a") + len(letters))))
        rows.append(f"| **{index + 1}** {row.name} | {' | '.join(marks + [''] * (len(FEATURES) - index - 1))} |")
    head = f"| | {' | '.join(str(number + 1) for number in range(len(FEATURES)))} |"
    line = f"|---|{'---|' * len(FEATURES)}"
    notes = ["x: runs, and a test trains it", ".: both fill the same place"]
    notes += [f"{letter}: {rule} is refused" for rule, letter in letters.items()]
    return "\n".join([head, line, *rows, "", *(f"- {note}" for note in notes)])
