"""Everything a run consists of, built from a checked config."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_adamba.blueprint.compat import RunSetup, check_combination
from megatron_adamba.blueprint.manifest import ParamSpec, manifest
from megatron_adamba.blueprint.phases import frozen_specs
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.blueprint.stages import StagePlan, plan_stages
from megatron_adamba.checkpoint.training import from_first_rank, together
from megatron_adamba.config.cli import ParsedArguments
from megatron_adamba.config.ds_config import (
    bf16_enabled,
    complete_ds_config,
    offload_enabled,
    read_ds_config,
    zero_stage,
)
from megatron_adamba.config.resolved import ResolvedConfig
from megatron_adamba.config.rules import folder_to_write
from megatron_adamba.config.sections import default_predictor
from megatron_adamba.data.blend import build_dataset, open_dataset
from megatron_adamba.data.order import data_order
from megatron_adamba.data.packed import EvaluationBatches, evaluation_batches
from megatron_adamba.data.tokenizer import Tokenizer
from megatron_adamba.elastic.sampler import PlanSampler, earliest_exit
from megatron_adamba.engine.ds_schema import check_ds_config
from megatron_adamba.engine.experts import moe_layer_for
from megatron_adamba.engine.launch import RankInfo
from megatron_adamba.engine.old_weights import slow_old_weights
from megatron_adamba.engine.pipeline import PipelineSession
from megatron_adamba.engine.session import TrainingSession
from megatron_adamba.errors import ConfigError
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.ops.precision import fast_bf16
from megatron_adamba.parallel.expert import expert_parallel
from megatron_adamba.parallel.tensor import tensor_parallel
from megatron_adamba.parallel.topology import RankGrid, Topology, build_topology
from megatron_adamba.training.freeze import freeze_groups
from megatron_adamba.training.gate_setup import GateSetup, gates_train
from megatron_adamba.training.gates import GateTrainer
from megatron_adamba.training.run_tokenizer import named_tokenizer, run_tokenizer
from megatron_adamba.training.start import check_start, find_resume, load_start


@dataclass
class RunPlan:
    """What is known before any process group or weight exists."""

    config: ResolvedConfig
    ds_config: dict[str, Any]
    specs: tuple[ParamSpec, ...]
    tokenizer: Tokenizer
    grid: RankGrid
    zero_stage: int
    bf16: bool
    stages: StagePlan
    """of one chunk where there is no pipeline"""
    tokenizer_note: str = ""
    """where the tokenizer is not the file that was named"""


@dataclass
class Run:
    """A plan brought to life on this rank."""

    plan: RunPlan
    session: TrainingSession
    dataset: Any
    sampler: PlanSampler
    validation: EvaluationBatches | None
    frozen: int
    history: list[dict[str, Any]]
    """surgery before the run (`checkpoint.history`)"""
    gate_setup: GateSetup | None = None
    """where the model has gates"""
    gates: GateTrainer | None = None
    """on the ranks with its head"""
    resume_from: list[Path] = field(default_factory=list)
    """checkpoints to go on from, best first; none for a fresh start"""
    data_order: dict[str, Any] = field(default_factory=dict)
    """of `data.order`"""
    optimizer_starts: dict[str, int] = field(default_factory=dict)
    """optimizer step at which a parameter's state began, where that is not the first"""
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """told apart by it: what this run wrote, by way of its first rank, and what others did"""

    @property
    def run_dir(self) -> Path:
        return Path(self.plan.config.logging.run_dir)


def plan_run(parsed: ParsedArguments, world_size: int) -> RunPlan:
    """Check everything that can be checked at parse time. Raises ConfigError, TokenizerError, CheckpointError."""
    config = parsed.config
    named_tokenizer(config)
    if not config.data.train:
        raise ConfigError("--data.train: no dataset given; for example --data.train runs/quickstart/data/train")
    folder_to_write("--logging.run_dir", config.logging.run_dir)
    pattern = config.model.block_pattern
    raw = read_ds_config(parsed.deepspeed_config, bf16=fast_bf16())
    if parsed.deepspeed_config is not None:
        check_ds_config(raw, f"--deepspeed_config {parsed.deepspeed_config}")
    stage, offload, bf16 = zero_stage(raw), offload_enabled(raw), bf16_enabled(raw)
    check_combination(RunSetup(config, stage, offload, world_size, bf16))
    grid = RankGrid(world_size, config.parallel.tp, config.parallel.pp, config.parallel.ep)
    named_by_user = parsed.sources.get("data.tokenizer") != config.checkpoint.init_from
    tokenizer, note = run_tokenizer(config, named_by_user)
    if config.checkpoint.init_from is not None:
        check_start(config.checkpoint.init_from, tokenizer)
    config = ResolvedConfig(**{**vars(config), "model": resolve_model(config.model, tokenizer.vocab_size)})
    if config.train.phase == 3 and config.model.expanded_from is None:
        raise ConfigError(
            "--train.phase 3: goes on with a model that was made wider, and this one was not; start from one with "
            "--checkpoint.init_from, made by adamba surgery expand, or take --train.phase 2"
        )
    config = _with_gates(config)
    PlanSampler(config.model, config.elastic, config.train.seed, config.train.phase, config.train.steps)
    _prompt_end(config.data.prompt_end, tokenizer)
    # once more, as some rules look at the vocabulary
    check_combination(RunSetup(config, stage, offload, world_size, bf16))
    stages = plan_stages(config.model, config.parallel, config.train.seq_len, pattern)
    config = replace(config, parallel=replace(config.parallel, stage_bounds=list(stages.bounds)))
    ds_config = complete_ds_config(raw, config, grid.dp, parsed.deepspeed_config or "the built-in ds_config")
    return RunPlan(config, ds_config, manifest(config.model), tokenizer, grid, stage, bf16, stages, note)


def build_run(plan: RunPlan, rank_info: RankInfo) -> Run:
    """Open the data, build and initialise the model, wrap it in the engine. Raises DataError, ConfigError."""
    config = plan.config
    dataset, validation = together(lambda: _open_data(plan))
    topology = build_topology(plan.grid, config.parallel.sp)
    recompute = config.train.activation_checkpointing
    model = AdambaModel(
        config.model,
        activation_checkpointing=recompute,
        tp=tensor_parallel(topology),
        ep=expert_parallel(topology),
        moe_layer=moe_layer_for(topology, _experts_train(plan)),
        chunks=plan.stages.chunks_of(topology.place("pp")),
    )
    history, resume_from = [], from_first_rank(lambda: find_resume(config))
    if config.checkpoint.init_from is not None and not resume_from:
        history = load_start(model, config.checkpoint.init_from, config.checkpoint.verify)
    else:
        model.initialize(config.train.seed)
    frozen = freeze_groups(model, plan.specs, config.train.freeze, config.train.phase)
    session = _build_session(plan, model, rank_info, topology)
    if config.train.phase == 3:
        slow_old_weights(session, config.model, config.optimizer.old_lr_scale)
    sampler = PlanSampler(config.model, config.elastic, config.train.seed, config.train.phase, config.train.steps)
    setup = _gate_setup(plan, sampler) if config.model.gate_size else None
    gates = None
    if setup is not None and topology.place("pp") == plan.stages.loss_rank:
        gates = GateTrainer(setup, topology, rank_info.device)
        if config.checkpoint.init_from is not None:
            gates.load(config.checkpoint.init_from, config.checkpoint.verify)
    order = from_first_rank(lambda: data_order(dataset))
    return Run(plan, session, dataset, sampler, validation, frozen, history, setup, gates, resume_from, order)


def _with_gates(config: ResolvedConfig) -> ResolvedConfig:
    """Where gates train, the model with them, and what they were trained for in so many words. Raises ConfigError."""
    gates, elastic = config.gates, config.elastic
    if not gates_train(config):
        return config
    if gates.predictor == "relative" and elastic.width_sampling != "sandwich":
        raise ConfigError(
            f"--gates.predictor relative: compares narrow passes with full ones, which --elastic.width_sampling "
            f"{elastic.width_sampling} does not make; take sandwich, or --gates.predictor original"
        )
    if config.model.num_layers < 2:
        raise ConfigError("--gates.train: a model of one block has nothing to leave out; add a block, or turn it off")
    first = elastic.min_exit_layer or earliest_exit(config.model.num_layers)
    if first >= config.model.num_layers:
        raise ConfigError(
            f"--elastic.min_exit_layer {first}: leaves no layer of {config.model.num_layers} to train gates behind; "
            f"try {earliest_exit(config.model.num_layers)}, or --gates.train false"
        )
    return replace(
        config,
        model=config.model if config.model.gate_size else replace(config.model, gate_size=gates.size),
        gates=replace(gates, predictor=gates.predictor or default_predictor(elastic.width_sampling)),
        elastic=replace(elastic, min_exit_layer=first),
    )


def _gate_setup(plan: RunPlan, sampler: PlanSampler) -> GateSetup:
    config, tokenizer = plan.config, plan.tokenizer
    return GateSetup(
        model=config.model,
        gates=config.gates,
        trains=gates_train(config),
        min_exit_layer=sampler.min_exit_layer,
        passes=sampler.passes,
        seq_len=config.train.seq_len,
        seed=config.train.seed,
        eod_id=tokenizer.eod_id,
        prompt_end=_prompt_end(config.data.prompt_end, tokenizer),
    )


def _prompt_end(text: str | None, tokenizer: Tokenizer) -> int | None:
    """Raises ConfigError where it is not one token."""
    if text is None:
        return None
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise ConfigError(f"--data.prompt_end {text!r}: is {len(ids)} tokens of this tokenizer; give the text of one")
    return ids[0]


def _build_session(plan: RunPlan, model: AdambaModel, rank_info: RankInfo, topology: Topology) -> TrainingSession:
    arguments = (model, model.specs, plan.config.optimizer, plan.ds_config, rank_info, topology)
    if plan.grid.pp == 1:
        return TrainingSession(*arguments)
    frozen = frozen_specs(plan.specs, plan.config.train.freeze, plan.config.train.phase)
    elsewhere = [spec for spec in plan.specs if spec not in frozen and spec not in model.specs]
    return PipelineSession(*arguments, stages=plan.stages, elsewhere=elsewhere)


def _experts_train(plan: RunPlan) -> bool:
    frozen = frozen_specs(plan.specs, plan.config.train.freeze, plan.config.train.phase)
    return any(spec.group == "expert" and spec not in frozen for spec in plan.specs)


def _open_data(plan: RunPlan) -> tuple[Any, EvaluationBatches | None]:
    config = plan.config
    dataset = build_dataset(
        [str(word) for word in config.data.train], config.train.seq_len, config.train.seed, plan.tokenizer
    )
    return dataset, _validation(plan)


def _validation(plan: RunPlan) -> EvaluationBatches | None:
    config = plan.config
    if not config.data.validation:
        return None
    if len(config.data.validation) > 1:
        raise ConfigError("--data.validation: is evaluated as one dataset; give one prefix, without a weight")
    indexed = open_dataset(str(config.data.validation[0]), plan.tokenizer, "--data.validation", "--data.tokenizer")
    train = config.train
    return evaluation_batches(indexed, train.seq_len, train.micro_batch_size, plan.tokenizer.eod_id, train.eval_tokens)
