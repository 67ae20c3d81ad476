"""A short training run in two ways: through the engine, and as a plain loop over one model. Used by both sides."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_adamba.blueprint.compat import RunSetup
from megatron_adamba.blueprint.growth import before_expansion, growth_of, sizes_of
from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.blueprint.stages import StagePlan, equal_bounds, num_chunks
from megatron_adamba.blueprint.support import FEATURES, cell
from megatron_adamba.config.distill import DistillConfig
from megatron_adamba.config.ds_config import complete_ds_config
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.root import AdambaConfig
from megatron_adamba.config.sections import ElasticConfig, ElasticStage, OptimizerConfig, TrainConfig
from megatron_adamba.elastic.plan import ElasticPlan
from megatron_adamba.elastic.sampler import PlanSampler
from megatron_adamba.engine.experts import moe_layer_for
from megatron_adamba.engine.old_weights import old_places, slow_old_weights
from megatron_adamba.engine.session import MicroStep, TrainingSession
from megatron_adamba.layers.lesson import Lesson, distillation_loss
from megatron_adamba.layers.moe.statistics import RouterStatistics
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.model.taps import TapRequest
from megatron_adamba.parallel.expert import expert_parallel
from megatron_adamba.parallel.layout import cut
from megatron_adamba.parallel.tensor import tensor_parallel
from megatron_adamba.parallel.topology import RankGrid, Topology, build_topology
from megatron_adamba.training.freeze import freeze_groups
from megatron_adamba.training.schedule import learning_rate_factor

MICRO_BATCHES, SEQ_LEN, VOCAB = 4, 13, 53


def run_config(
    pattern: str = "TM",
    mamba_version: int = 2,
    sampling: str = "per_layer",
    optimizer: str = "adamw",
    plans_per_step: int = 2,
    exits: float = 0.0,
    mixed: float = 0.0,
    expanded: bool = False,
    elastic: dict[str, Any] | None = None,
    distill: dict[str, Any] | None = None,
    **model: Any,
) -> AdambaConfig:
    """A model with GQA, biases, three widths of which the first holds one KV group, and clipping that bites.

    exits: share of the plans that leave early; mixed: of those, in which some tokens leave earlier still. expanded: as
    made from half the channels and units. elastic: further settings, a schedule as dicts; distill: the section.
    """
    elastic = dict(elastic or {})
    if "schedule" in elastic:
        elastic["schedule"] = [ElasticStage(**stage) for stage in elastic["schedule"]]
    shape = {
        "hidden_size": 64,
        "block_pattern": pattern,
        "vocab_size": VOCAB,
        "head_dim": 8,
        "num_heads": 8,
        "num_kv_groups": 4,
        "linear_bias": True,
        "ffn_granule": 16,
        "widths": [8, 32, 64],
        "mamba_version": mamba_version,
        "mamba_d_state": 16,
        "mamba_head_dim": 16,
        "mamba_chunk_size": 8,
        "mamba_use_mlp": True,
        **model,
    }
    resolved = resolve_model(ModelConfig(**shape))
    if expanded:
        halved = {name: size if name == "head_dim" else size // 2 for name, size in sizes_of(resolved).items()}
        resolved = replace(resolved, expanded_from=halved)
    return AdambaConfig(
        model=resolved,
        elastic=ElasticConfig(
            sampling,
            plans_per_step,
            sandwich_passes=2,
            exit_fraction=exits,
            mixed_exit_fraction=mixed,
            min_exit_layer=1,
            **elastic,
        ),
        distill=DistillConfig(**(distill or {})),
        train=TrainConfig(steps=20, micro_batch_size=2, global_batch_size=2 * MICRO_BATCHES, gradient_clipping=0.3),
        # Adam divides by the size of a gradient: with a small eps it turns rounding into updates of full size, and even
        # the plain loop in fp32 then strays from itself in float64 by more than the bound of these tests
        optimizer=OptimizerConfig(
            name=optimizer, lr=3e-3, embedding_lr=5e-3, weight_decay=0.1, warmup_steps=3, eps=1e-5
        ),
    )


def build_model(config: AdambaConfig, freeze: list[str], skew: float = 0.0) -> AdambaModel:
    """From a start that is neutral nowhere: gains, biases, decays and output projections are random too.

    skew: added to the router's logits of the first experts, as many as a token is sent to.
    """
    recompute = config.train.activation_checkpointing
    model = AdambaModel(config.model, activation_checkpointing=recompute).initialize(config.train.seed)
    generator = torch.Generator().manual_seed(99)
    neutral = {spec.name for spec in manifest(config.model) if spec.init in ("ones", "zeros", "output", "head")}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if name in neutral else 0.01))
            if name.endswith("router.bias"):
                parameter[: config.model.experts_per_token] += skew
    freeze_groups(model, manifest(config.model), freeze)
    return model


def micro_batch(step: int, number: int) -> dict[str, torch.Tensor]:
    """Packed documents, some positions unscored; the same for every layout."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    tokens = torch.randint(0, VOCAB, (2, SEQ_LEN + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    # micro-batches differ much in what they score, and the step's loss is the mean over all of it
    labels[torch.rand(labels.shape, generator=generator) < 0.1 + 0.1 * number] = -100
    starts = torch.rand(2, SEQ_LEN, generator=generator) < 0.15
    starts[:, 0] = False
    return {"tokens": tokens[:, :-1].contiguous(), "labels": labels, "seq_idx": starts.cumsum(1, dtype=torch.int32)}


def shares_of(step: int, numbers: range) -> list[torch.Tensor]:
    """What micro-batches of these numbers count in a step."""
    scored = lambda number: int((micro_batch(step, number)["labels"] != -100).sum())
    mean = sum(scored(number) for number in range(MICRO_BATCHES)) / MICRO_BATCHES
    return [torch.tensor(scored(number) / mean) for number in numbers]


def plain_curve(
    arguments: dict[str, Any], freeze: list[str], steps: int = 20, skew: float = 0.0
) -> list[tuple[float, float]]:
    """`plain_curve_of` the config that `run_config` makes of the arguments."""
    return plain_curve_of(run_config(**arguments), freeze, steps, skew)


def plain_curve_of(config: AdambaConfig, freeze: list[str], steps: int, skew: float = 0.0) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, from one model, torch's clipping and torch's AdamW; no engine of anybody's.

    The loss of a step is its mean over all scored tokens, plus routers' losses, which are means over micro-batches. A
    trainable parameter that no micro-batch touched has a gradient of zero.
    """
    model = build_model(config, freeze, skew)
    specs = {spec.name: spec for spec in manifest(config.model)}
    options = config.optimizer
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = options.weight_decay if specs[name].kind in ("matrix", "matrices") else 0.0
            peak = options.embedding_lr if name.startswith("embedding") else options.lr
            groups.setdefault((peak, decay), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": members, "lr": peak, "weight_decay": decay} for (peak, decay), members in groups.items()],
        betas=(options.beta1, options.beta2),
        eps=options.eps,
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sampler = PlanSampler(config.model, config.elastic, config.train.seed, steps=config.train.steps)
    curve = []
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * learning_rate_factor(options, step, config.train.steps)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        total = 0.0
        counts = [int((micro_batch(step, number)["labels"] != -100).sum()) for number in range(MICRO_BATCHES)]
        for number in range(MICRO_BATCHES):
            for k in range(sampler.passes):
                plan = sampler.micro_batch_plan(step, number, MICRO_BATCHES, k)
                statistics = RouterStatistics()
                mean = model(**micro_batch(step, number), plan=plan, statistics=statistics)
                if config.distill.on and k > 0:
                    # written out over whole logits, by torch alone
                    mean = distilled(model, config, micro_batch(step, number), plan) + statistics.total()
                routers = statistics.total() / MICRO_BATCHES
                loss = ((mean - statistics.total()) * counts[number] / sum(counts) + routers) / sampler.passes
                loss.backward()
                total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, config.train.gradient_clipping).item()
        kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        slow_down(config, model, kept)
        curve.append((total, norm))
    return curve


def distilled(model: AdambaModel, config: AdambaConfig, batch: dict[str, Any], plan: ElasticPlan) -> torch.Tensor:
    """The loss of a pass that learns from the full pass, without the routers' losses."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        theirs = model(**inputs)
    ours, labels, distill = model(**inputs, plan=plan), batch["labels"], config.distill
    text = F.cross_entropy(ours.flatten(0, 1), labels.flatten(), ignore_index=-100)
    log_p, log_q = (F.log_softmax(logits[labels != -100] / distill.temperature, -1) for logits in (ours, theirs))
    pair = (log_q, log_p) if distill.divergence == "reverse" else (log_p, log_q)
    divergence = F.kl_div(*pair, reduction="batchmean", log_target=True)
    return (1 - distill.share) * text + distill.share * distill.temperature**2 * divergence


def slow_down(config: AdambaConfig, model: AdambaModel, kept: dict[str, torch.Tensor]) -> None:
    """Of what changed in a step, old weights of an expanded model take a share."""
    old = before_expansion(config.model)
    if old is None:
        return
    growth = growth_of(old, config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change = parameter - kept[name]
            change[old_places(parameter.shape, growth[name])] *= config.optimizer.old_lr_scale
            parameter.copy_(kept[name] + change)


def ds_settings(stage: int, offload: bool, bf16: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    settings: dict[str, Any] = {"zero_optimization": zero}
    if bf16:
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return settings


def topology_of(tp: int, sp: bool, ep: int = 1, pp: int = 1) -> Topology:
    """Of all ranks of this group."""
    return build_topology(RankGrid(dist.get_world_size(), tp, pp, ep), sp)


def build_session(
    info,
    config: AdambaConfig,
    stage: int,
    offload: bool = False,
    bf16: bool = False,
    freeze=(),
    tp: int = 1,
    sp=False,
    ep: int = 1,
    skew: float = 0.0,
    pp: int = 1,
    schedule: str = "1f1b",
    bounds: list[int] | None = None,
) -> TrainingSession:
    """bounds: of the chunks of a pipeline; None takes equal ones."""
    topology = topology_of(tp, sp, ep, pp)
    settings = complete_ds_config(ds_settings(stage, offload, bf16), config, topology.size("dp"), "the test")
    whole = build_model(config, list(freeze), skew)
    chunks = None
    if pp > 1:
        layers = config.model.num_layers
        stages = StagePlan(pp, schedule, tuple(bounds or equal_bounds(layers, num_chunks(pp, schedule))))
        chunks = stages.chunks_of(topology.place("pp"))
    model = shard_model(whole, topology, chunks)
    arguments = (model, model.specs, config.optimizer, settings, info, topology)
    if pp > 1:
        from megatron_adamba.engine.pipeline import PipelineSession

        held = {spec.name for spec in model.specs}
        trained = [spec for spec in manifest(config.model) if whole.get_parameter(spec.name).requires_grad]
        elsewhere = [spec for spec in trained if spec.name not in held]
        session = PipelineSession(*arguments, stages=stages, elsewhere=elsewhere)
    else:
        session = TrainingSession(*arguments)
    if config.model.expanded_from is not None:
        slow_old_weights(session, config.model, config.optimizer.old_lr_scale)
    return session


def shard_model(whole: AdambaModel, topology: Topology, chunks=None) -> AdambaModel:
    """The same model, cut; of a pipeline's stages these chunks."""
    tp, ep = tensor_parallel(topology), expert_parallel(topology)
    if tp.size == ep.size == 1 and chunks is None:
        return whole
    trains = any(whole.get_parameter(s.name).requires_grad for s in manifest(whole.config) if s.group == "expert")
    model = AdambaModel(
        whole.config,
        activation_checkpointing=whole.activation_checkpointing,
        tp=tp,
        ep=ep,
        moe_layer=moe_layer_for(topology, trains),
        chunks=chunks,
    )
    with torch.no_grad():
        for spec in model.specs:
            parameter = model.get_parameter(spec.name)
            parameter.copy_(cut(spec, whole.get_parameter(spec.name), *model.share_of(spec)))
            parameter.requires_grad_(whole.get_parameter(spec.name).requires_grad)
    return model


def take_steps(
    info, session: TrainingSession, config: AdambaConfig, first: int, last: int
) -> list[tuple[float, float]]:
    """Steps first .. last - 1 through the engine."""
    sampler = PlanSampler(config.model, config.elastic, config.train.seed, steps=config.train.steps)
    dp, dp_rank = session.topology.size("dp"), session.topology.place("dp")
    accumulation = MICRO_BATCHES // dp
    curve = []
    numbers = range(dp_rank, accumulation * dp, dp)
    for step in range(first, last):
        session.set_learning_rates(learning_rate_factor(config.optimizer, step, config.train.steps))
        loss = distillation_loss(config.distill)
        lessons = [None if loss is None else Lesson(loss) for _ in numbers]
        report = session.train_step(
            MicroStep(
                **micro_batch(step, number),
                plan=sampler.micro_batch_plan(step, number, MICRO_BATCHES, k),
                share=share,
                teaches=lesson if k == 0 else None,
                learns=lesson if k > 0 else None,
            )
            for number, share, lesson in zip(numbers, shares_of(step, numbers), lessons)
            for k in range(sampler.passes)
        )
        curve.append((session.mean_over_ranks(report.losses.mean()).item(), report.result.grad_norm))
    return curve


def engine_curve(
    info,
    arguments: dict[str, Any],
    stage: int,
    offload: bool = False,
    bf16: bool = False,
    freeze: list[str] = (),
    steps: int = 20,
    tp: int = 1,
    sp: bool = False,
    ep: int = 1,
    skew: float = 0.0,
    **pipeline: Any,
) -> list[tuple[float, float]]:
    """A job: the same run through the engine on this group's ranks. pipeline: pp, schedule, bounds."""
    config = run_config(**arguments)
    session = build_session(info, config, stage, offload, bf16, freeze, tp, sp, ep, skew, **pipeline)
    return take_steps(info, session, config, 0, steps)


def cell_config(row: str, column: str) -> tuple[RunSetup, AdambaConfig]:
    """Setup and config of a cell of the support matrix; the optimizer's settings are those of `run_config`."""
    features = {feature.name: feature for feature in FEATURES}
    setup = cell(features[row], features[column]).setup
    assert setup is not None
    steady = run_config(optimizer=setup.config.optimizer.name).optimizer
    return setup, dataclasses.replace(setup.config, optimizer=steady)


def cell_curve(
    info, row: str, column: str, steps: int, alone: bool = False, stage: int | None = None
) -> list[tuple[float, float]]:
    """A job: a few steps of a cell; alone: on one process at `stage`, whatever the cell's layout."""
    setup, config = cell_config(row, column)
    parallel = config.parallel
    layout = {name: getattr(parallel, name) for name in ("tp", "sp", "pp", "ep")}
    layout |= {"offload": setup.offload, "bf16": setup.bf16}
    if alone:
        layout = {"bf16": setup.bf16}
    stage = setup.zero_stage if stage is None else stage
    session = build_session(info, config, stage, freeze=config.train.freeze, **layout)
    return take_steps(info, session, config, 0, steps)


def poisoned_curve(
    info, arguments: dict[str, Any], stage: int, offload: bool = False, bf16: bool = False, poisoned_rank: int = 0
) -> list[Any]:
    """A job: five steps, one whose activations are nan on one rank, five more; also whether that one was skipped."""
    config = run_config(**arguments)
    session = build_session(info, config, stage, offload, bf16, [])
    curve = take_steps(info, session, config, 0, 5)
    handle = None
    if info.rank == poisoned_rank:
        handle = session.module.final_norm.register_forward_hook(lambda _module, _inputs, output: output * float("nan"))
    norm = take_steps(info, session, config, 5, 6)[0][1]
    if handle is not None:
        handle.remove()
    return [norm != norm, *curve, *take_steps(info, session, config, 5, 10)]


def tapped_curve(info, arguments: dict[str, Any], stage: int = 1, **layout: Any) -> dict[str, Any]:
    """A job: three steps in which every pass leaves taps; the curve, and sums of each pass's states by layer."""
    config = run_config(**arguments)
    session = build_session(info, config, stage, **layout)
    documents = torch.tensor([[0, 2]]).expand(2, 1, 2)
    request = TapRequest((0, 1, 3), torch.tensor([0, 5, 9]), documents)
    sampler, curve, states = (
        PlanSampler(config.model, config.elastic, config.train.seed, steps=config.train.steps),
        [],
        [],
    )
    numbers = range(MICRO_BATCHES)
    for step in range(3):
        session.set_learning_rates(learning_rate_factor(config.optimizer, step, config.train.steps))
        report = session.train_step(
            MicroStep(
                **micro_batch(step, number),
                plan=sampler.micro_batch_plan(step, number, MICRO_BATCHES),
                taps=request,
                share=share,
            )
            for number, share in zip(numbers, shares_of(step, numbers))
        )
        curve.append((report.losses.mean().item(), report.result.grad_norm))
        for taps in report.taps:
            assert not any(taps.layer(layer).requires_grad for layer in request.layers)
            states.append([taps.layer(layer).double().sum(-1).tolist() for layer in request.layers])
            states[-1].append(taps.mean_embeddings.double().sum(-1).tolist())
    return {"curve": curve, "states": states}
