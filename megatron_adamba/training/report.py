"""What a run prints before it starts: the config with its sources, the model's sizes, what was chosen and why."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from megatron_adamba.blueprint.stages import StagePlan
from megatron_adamba.blueprint.summary import summarize, summarize_stages
from megatron_adamba.blueprint.training_flops import training_costs
from megatron_adamba.config.cli import ParsedArguments
from megatron_adamba.config.depth import REASONS
from megatron_adamba.config.model import NestRow
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.config.root import AdambaConfig, read_run_config
from megatron_adamba.config.sections import ElasticStage, TrainConfig
from megatron_adamba.elastic.plan import full_plan
from megatron_adamba.evaluation.widths import EvaluationRow
from megatron_adamba.ops.dispatch import available_kernels
from megatron_adamba.parallel.topology import RankGrid
from megatron_adamba.training.freeze import frozen_names
from megatron_adamba.training.phase_change import describe_phase_change
from megatron_adamba.training.run import Run

_PLANS_FOR_COST = 200
"""that are drawn to tell what a stage of a run costs"""


def print_config(console: Console, config: AdambaConfig, sources: dict[str, str]) -> None:
    """Every value and where it came from, as YAML that `--config` reads; values that were derived say so."""
    for section in dataclasses.fields(AdambaConfig):
        values = getattr(config, section.name)
        console.print(f"{section.name}:", highlight=False)
        for entry in dataclasses.fields(values):
            value = getattr(values, entry.name)
            source = sources.get(f"{section.name}.{entry.name}", "default")
            console.print(
                f"  {entry.name}: {_as_yaml(value)}  # {source}", highlight=False, soft_wrap=True, markup=False
            )


def _as_yaml(value: Any) -> str:
    """In one line."""
    if isinstance(value, list):
        value = [dataclasses.asdict(item) if isinstance(item, NestRow | ElasticStage) else item for item in value]
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def print_summary(console: Console, config: ResolvedModel, train: TrainConfig) -> None:
    """Parameters by component and FLOPs per token at every width."""
    summary = summarize(config, train.seq_len, frozen_names(config, train))
    table = Table(title=f"{config.num_layers} blocks, hidden size {config.hidden_size}: {summary['blocks']}")
    table.add_column("component")
    table.add_column("parameters", justify="right", no_wrap=True)
    for group, count in summary["parameters"].items():
        if group != "gain":
            table.add_row(group, f"{count:,}")
    table.add_row("total", f"{summary['total_without_gains']:,}")
    if summary["trained_in_phase_1"]:
        share = summary["trained_in_phase_1"] / summary["total_without_gains"]
        table.add_row("trained in phase 1", f"{summary['trained_in_phase_1']:,} ({share:.1%})")
    table.add_row("gains, counted apart", f"{summary['parameters'].get('gain', 0):,}")
    console.print(table)
    table = Table(title=f"FLOPs per token at {train.seq_len} tokens")
    for name in ("width", "KV groups", "FFN rows", "forward", "training", "of full"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary["widths"]:
        table.add_row(
            str(row["width"]),
            str(row["kv_groups"]),
            str(row["ffn"]),
            f"{row['forward_flops']:.3e}",
            f"{row['training_flops']:.3e}",
            f"{row['share_of_full']:.1%}",
        )
    console.print(table)


def print_stages(
    console: Console, config: ResolvedModel, stages: StagePlan, train: TrainConfig, micro_steps: int
) -> None:
    """What each rank of a pipeline holds, and how long it waits."""
    rows = summarize_stages(config, stages, train.seq_len, frozen_names(config, train))
    dearest = max(row["training_flops"] for row in rows)
    table = Table(title=f"pipeline of {stages.pp} stages, {stages.schedule}")
    for name in ("stage", "blocks", "parameters", "FLOPs", "of most", "passes kept"):
        numbers = name != "blocks"
        table.add_column(name, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    for row in rows:
        table.add_row(
            str(row["rank"]),
            row["blocks"],
            f"{row['parameters']:,}",
            f"{row['training_flops']:.3e}",
            f"{row['training_flops'] / dearest:.0%}",
            str(stages.in_flight(row["rank"], micro_steps)),
        )
    console.print(table)
    uneven = sum(row["training_flops"] for row in rows) / (dearest * stages.pp)
    bubble = stages.bubble(micro_steps)
    console.print(
        f"expected bubble {bubble:.1%} with {micro_steps} passes a step and equal stages; "
        f"{1 - (1 - bubble) * uneven:.1%} with these",
        highlight=False,
    )


def start_lines(run: Run, parsed: ParsedArguments) -> list[str]:
    """The choices of this run, one line each."""
    config, info = run.plan.config, run.session.rank_info
    grid = run.plan.grid
    accumulation = config.train.global_batch_size // (config.train.micro_batch_size * grid.dp)
    summary = summarize(config.model, config.train.seq_len)
    lines = [
        f"model      {config.model.block_pattern}, hidden {config.model.hidden_size}, widths {config.model.widths}, "
        f"{summary['total_without_gains']:,} parameters" + (f", {run.frozen:,} frozen" if run.frozen else ""),
        f"layout     {describe_grid(grid, config.parallel.sp)}, ZeRO {run.plan.zero_stage}, "
        f"{_precision(run, parsed)}, {info.device.type}, {info.backend}",
        f"batch      {config.train.global_batch_size} x {config.train.seq_len} tokens = {grid.dp} replicas x "
        f"{accumulation} micro-batches of {config.train.micro_batch_size}",
        *_sampling(run),
        f"optimizer  {config.optimizer.name}, {config.optimizer.schedule}, {config.train.steps} steps",
    ]
    lines += _untrained_widths(config)
    if config.checkpoint.init_from is not None:
        start = config.checkpoint.init_from
        lines.append(f"weights    of {start}, where there is nothing to resume; optimizer state starts anew")
        change = describe_phase_change(run.plan.specs, read_run_config(start).get("train"), config.train)
        lines += [f"phase      {change}"] if change else []
    lines += [f"tokenizer  {run.plan.tokenizer_note}"] if run.plan.tokenizer_note else []
    if grid.pp > 1:
        stages, passes = run.plan.stages, accumulation * run.sampler.passes
        held = " | ".join(row["blocks"] for row in summarize_stages(config.model, stages, config.train.seq_len))
        bubble = f"expected bubble {stages.bubble(passes):.1%} of {passes} passes a step"
        lines.append(f"pipeline   {stages.schedule}, blocks {held}; {bubble}")
    lines += [f"kernel     {name}: {choice}" for name, choice in available_kernels().items()]
    lines += [f"--depth {parsed.depth}   {key} = {value}  ({REASONS[key]})" for key, value in parsed.derived.items()]
    return lines


def _untrained_widths(config: AdambaConfig) -> list[str]:
    widths = config.model.widths or []
    if config.elastic.samples_widths or len(widths) < 2:
        return []
    *narrow, full = widths
    return [
        f"widths     {full} alone trains, with elastic.width_sampling full; {', '.join(map(str, narrow))} stay as they "
        "are. --elastic.width_sampling uniform trains all of them"
    ]


def _sampling(run: Run) -> list[str]:
    """A line for each stage of the schedule: how plans are drawn, and what a micro-batch costs in full passes."""
    config, sampler = run.plan.config, run.sampler
    costs = training_costs(config.model, config.train.seq_len, frozen_names(config.model, config.train))
    full = full_plan(config.model)
    lines, first = [], 1
    for end, stage in sampler.stages:
        last = min(int(end), config.train.steps) if math.isfinite(end) else config.train.steps
        if first > last:
            break
        some = range(first - 1, last, max(1, (last - first + 1) // _PLANS_FOR_COST))
        plans = [sampler.plan(step, number) for step in some for number in range(sampler.passes)]
        cost = sum(costs.of(plan.widths, plan.exit_layer) for plan in plans) * sampler.passes / len(plans)
        cost += costs.lesson * (sampler.passes - 1) if config.distill.on else 0
        cost /= costs.of(full.widths, full.exit_layer)
        weights = f" by {':'.join(f'{weight:g}' for weight in stage.width_weights)}" if stage.width_weights else ""
        steps = "" if len(sampler.stages) == 1 else f"steps {first} to {last}: "
        lines.append(
            f"{'sampling':11}{steps}{stage.width_sampling}{weights}, {sampler.passes} pass(es) of each micro-batch, as "
            f"dear as {cost:.2f} full ones"
        )
        first = last + 1
    distill = config.distill
    if distill.on:
        lines.append(
            f"{'distill':11}{distill.share:g} of a narrow pass's loss is the {distill.divergence} divergence from the "
            f"full pass, at temperature {distill.temperature:g}"
        )
    return lines


def _precision(run: Run, parsed: ParsedArguments) -> str:
    if run.plan.bf16:
        return "bf16 with fp32 master weights"
    return "fp32" if parsed.deepspeed_config is not None else "fp32 (this processor has no bf16 products)"


def describe_grid(grid: RankGrid, sequence_parallel: bool) -> str:
    """`2 x data parallel x 4 x tensor parallel with sequence parallel`, degrees of one left out."""
    names = {"data": grid.dp, "tensor": grid.tp, "pipeline": grid.pp, "expert": grid.ep}
    parts = [f"{degree} x {name} parallel" for name, degree in names.items() if degree > 1 or name == "data"]
    return ", ".join(parts) + (", sequence parallel" if sequence_parallel else "")


def print_rows(console: Console, rows: list[EvaluationRow]) -> None:
    """The table of an evaluation at every width, and at every exit where there are any."""
    exits = any(row.exit_layer is not None for row in rows)
    table = Table(title=f"{rows[0].tokens:,} held-out tokens")
    for name in ("width", *(["blocks"] if exits else []), "nats / token", "bits / byte", "forward FLOPs / token"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        bits = "-" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
        blocks = ["all" if row.exit_layer is None else str(row.exit_layer)] if exits else []
        table.add_row(str(row.width), *blocks, f"{row.nats_per_token:.4f}", bits, f"{row.flops_per_token:.3e}")
    console.print(table)
