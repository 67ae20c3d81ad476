"""Pipelines: how long their ranks wait, beside the schedules' ideal, and what it saves to cut them by cost.

Two stages run for real in DeepSpeed's engine; a rank that waits uses no processor time, so what a step takes beyond it
is the bubble (sending included). More stages than there are cores are replayed: the time of every chunk's forward and
backward, measured alone, goes through the very schedule that the engine runs.
"""

from __future__ import annotations

import os
import statistics
import time

import torch

from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.blueprint.stages import StagePlan, plan_stages
from megatron_adamba.commands.benchmarks.common import Row, require_close, seconds
from megatron_adamba.commands.benchmarks.ranks import on_ranks
from megatron_adamba.config.ds_config import complete_ds_config
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.config.root import AdambaConfig
from megatron_adamba.config.sections import OptimizerConfig, ParallelConfig, TrainConfig
from megatron_adamba.elastic.plan import full_plan
from megatron_adamba.model.adamba import AdambaModel

RANKS, MICRO_BATCHES = 2, 16
SCHEDULES = ("1f1b", "dualpipev")


def measure(quick: bool) -> list[Row]:
    """Real runs on two ranks, then replays of four and eight stages."""
    rows = on_ranks(_measure_rank, RANKS, quick, max(1, torch.get_num_threads() // RANKS))
    return rows + _replays(quick)


def _sizes(quick: bool) -> tuple[ResolvedModel, int]:
    """A hybrid whose head is worth several blocks, and the length of its sequences."""
    hidden, seq = (32, 16) if quick else (256, 256)
    config = ModelConfig(
        hidden_size=hidden,
        block_pattern="(TM)x8",
        vocab_size=64 if quick else 16384,
        head_dim=hidden // 4,
        ffn_granule=16,
        mamba_head_dim=hidden // 4,
        mamba_use_mlp=True,
    )
    return resolve_model(config), seq


def _batches(config: ResolvedModel, seq: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, config.vocab_size, (MICRO_BATCHES, 1, seq + 1), generator=generator)
    return [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in tokens]


def _measure_rank(rank: int, store: str, quick: bool, threads: int) -> list[Row]:
    import torch.distributed as dist

    from megatron_adamba.engine.launch import start_distributed
    from megatron_adamba.parallel.topology import RankGrid, build_topology

    torch.set_num_threads(threads)
    port = _agree_on_port(rank, store)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    info = start_distributed()
    topology = build_topology(RankGrid(RANKS, pp=RANKS))
    model_config, seq = _sizes(quick)
    expected = _loss_alone(model_config, seq)
    rows = []
    for schedule in SCHEDULES:
        parallel = ParallelConfig(pp=RANKS, pipeline_schedule=schedule)
        stages = plan_stages(model_config, parallel, seq)
        session = _session(model_config, stages, info, topology)
        steps, busy = [], []
        for number in range(2 if quick else 7):
            dist.barrier()
            start, worked = time.perf_counter(), time.process_time()
            report = session.train_step(_micro_steps(model_config, seq))
            if number == 0:
                require_close(f"{schedule}, loss", report.losses.mean(), expected, 1e-4)
                continue
            used = torch.tensor([(time.process_time() - worked) / threads, time.perf_counter() - start])
            dist.all_reduce(used)
            busy.append(used[0].item() / RANKS)
            steps.append(used[1].item() / RANKS)
        bubble = 1 - statistics.median(one / step for one, step in zip(busy, steps))
        rows.append(Row(f"2 ranks, {schedule}, step", 1e3 * statistics.median(steps), None, "ms", None))
        name = f"2 ranks, {schedule}, measured bubble, and the ideal"
        rows.append(Row(name, 100 * bubble, 100 * stages.bubble(MICRO_BATCHES), "%", None))
    return rows


def _agree_on_port(rank: int, store: str) -> str:
    """A free port that the first rank finds and the others read."""
    import socket

    from torch.distributed import FileStore

    shared = FileStore(store, RANKS)
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            shared.set("port", str(probe.getsockname()[1]))
    return shared.get("port").decode()


def _session(model_config: ResolvedModel, stages: StagePlan, info, topology):
    from megatron_adamba.blueprint.manifest import manifest
    from megatron_adamba.engine.pipeline import PipelineSession

    train = TrainConfig(micro_batch_size=1, global_batch_size=MICRO_BATCHES)
    config = AdambaConfig(model=model_config, train=train, optimizer=OptimizerConfig(lr=1e-5))
    settings = complete_ds_config({"zero_optimization": {"stage": 1}}, config, 1, "the benchmark")
    model = AdambaModel(model_config, chunks=stages.chunks_of(topology.place("pp"))).initialize(0)
    elsewhere = [spec for spec in manifest(model_config) if spec not in model.specs]
    arguments = (model, model.specs, config.optimizer, settings, info, topology)
    return PipelineSession(*arguments, stages=stages, elsewhere=elsewhere)


def _micro_steps(config: ResolvedModel, seq: int) -> list:
    from megatron_adamba.engine.session import MicroStep

    plan = full_plan(config)
    return [MicroStep(tokens, labels, None, plan) for tokens, labels in _batches(config, seq)]


def _loss_alone(config: ResolvedModel, seq: int) -> torch.Tensor:
    model = AdambaModel(config).initialize(0)
    with torch.no_grad():
        return torch.stack([model(tokens, labels) for tokens, labels in _batches(config, seq)]).mean()


def _replays(quick: bool) -> list[Row]:
    """One thread, as a core of a real stage would have."""
    config, seq = _sizes(quick)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for pp in (4, 8):
            for schedule in SCHEDULES:
                rows += _replay(config, seq, pp, schedule, 2 if quick else 5)
        return rows
    finally:
        torch.set_num_threads(threads)


def _replay(config: ResolvedModel, seq: int, pp: int, schedule: str, repeats: int) -> list[Row]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from megatron_adamba.engine.launch import import_deepspeed

    import_deepspeed()
    from megatron_adamba.engine.replay import replay

    found = {}
    for split in ("cost", "layers"):
        stages = plan_stages(config, ParallelConfig(pp=pp, pipeline_schedule=schedule, stage_split=split), seq)
        forward, backward = _chunk_times(config, seq, stages, repeats)
        found[split] = replay(stages, MICRO_BATCHES, forward, backward)
    name = f"{pp} stages, {schedule}"
    ours, equal = found["cost"].duration, found["layers"].duration
    bubble = Row(
        f"{name}, bubble, and the ideal", 100 * found["cost"].bubble, 100 * stages.bubble(MICRO_BATCHES), "%", None
    )
    return [bubble, Row(f"{name}, step, cut by cost vs equal layers", 1e3 * ours, 1e3 * equal, "ms", equal / ours)]


def _chunk_times(config: ResolvedModel, seq: int, stages: StagePlan, repeats: int) -> tuple[list[float], list[float]]:
    """Median seconds of each chunk's forward and backward, each measured alone."""
    model = AdambaModel(config).initialize(0)
    tokens, labels = _batches(config, seq)[0]
    context, plan = model.training_context(tokens, None), full_plan(config)
    forward, backward = [], []
    for chunk in stages.chunks:
        x = None if chunk.embedding else torch.randn(1, seq, config.hidden_size, requires_grad=True)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats + 1):
            outs: list[torch.Tensor] = []
            run = lambda: outs.append(model.run_chunk(chunk, x, tokens, labels, context, plan, False))  # noqa: B023
            times[0].append(seconds(run))
            grad = torch.ones_like(outs[0])
            times[1].append(seconds(lambda: outs[0].backward(grad)))  # noqa: B023
        forward.append(statistics.median(times[0][1:]))
        backward.append(statistics.median(times[1][1:]))
    return forward, backward
