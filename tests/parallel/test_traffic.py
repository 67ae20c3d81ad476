"""The formula of what tensor parallelism moves against what torch's dispatcher sees go to collectives."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import pytest
import torch.distributed as dist
from distributed.grids import slow
from distributed.traffic_jobs import issued

from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.parallel.traffic import Traffic, micro_batch_traffic

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
SHAPE = {
    "hidden_size": 32,
    "vocab_size": 53,
    "head_dim": 4,
    "num_heads": 16,
    "num_kv_groups": 8,
    "ffn_size": 96,
    "ffn_granule": 8,
    "widths": [4, 20, 32],
    "mamba_d_state": 6,
    "mamba_head_dim": 4,
    "mamba_chunk_size": 4,
    "linear_bias": True,
    "mamba_use_mlp": True,
}
MODELS = {
    "T": {"block_pattern": "TT"},
    "T and Mamba-2": {"block_pattern": "TMT", "mamba_num_groups": 8, "activation": "swiglu"},
    "T and Mamba-1": {"block_pattern": "TMT", "mamba_version": 1, "tie_embeddings": True, "embedding_norm": True},
    "Mamba-1 without MLP": {"block_pattern": "MT", "mamba_version": 1, "mamba_use_mlp": False, "norm_weight": False},
    "ends in Mamba-2": {"block_pattern": "TM", "mamba_num_groups": 8, "mamba_use_mlp": False, "linear_bias": False},
}


def plans(depth: int) -> list[tuple[list[int], int]]:
    """Every uniform width, mixed ones, and every exit."""
    mixed = ([20, 4, 32] * depth)[:depth]
    uniform = [([width] * depth, depth) for width in SHAPE["widths"]]
    return [*uniform, *((mixed, exit_layer) for exit_layer in range(depth + 1))]


def formula(model: dict, plan, batch: int, seq: int, tp: int, dtype: str, **flags) -> dict[str, int]:
    config = resolve_model(ModelConfig(**model))
    widths, exit_layer = plan
    return asdict(
        micro_batch_traffic(config, widths, exit_layer, batch, seq, tp=tp, element_bytes=BYTES[dtype], **flags)
    )


def totals(calls: list[list]) -> dict[str, int]:
    assert all(size > 0 for _, size in calls), "unknown collectives, and empty ones, are not part of the formula"
    found = Counter({"all_reduce": 0, "all_gather": 0, "reduce_scatter": 0})
    for kind, size in calls:
        found[kind] += size
    return dict(found)


def compare(answers: list, model: dict, wanted: list, batch: int, seq: int, tp: int, dtype: str, **flags) -> None:
    for rank, by_plan in enumerate(answers):
        assert by_plan == answers[0], f"rank {rank} issues other collectives than rank 0"
        for plan, calls in zip(wanted, by_plan, strict=True):
            assert totals(calls) == formula(model, plan, batch, seq, tp, dtype, **flags), (plan, flags)


@pytest.mark.parametrize(
    ("dtype", "seq", "recompute"),
    [
        slow("float32", 6, False),
        ("float32", 6, True),
        ("bfloat16", 7, False),
        slow("bfloat16", 7, True),
        slow("float64", 1, False),
        ("float64", 1, True),
    ],
)
@pytest.mark.parametrize("sp", [False, True], ids=["whole", "sequence shared"])
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_move_what_the_formula_says(workers, name, sp, dtype, seq, recompute):
    model = SHAPE | MODELS[name]
    wanted = plans(len(model["block_pattern"]))
    flags = {"sp": sp, "recompute": recompute}
    answers = workers(2).run(
        "traffic_jobs", "issued", model=model, dtype=dtype, batch=2, seq=seq, plans=wanted, **flags
    )
    compare(answers, model, wanted, 2, seq, 2, dtype, **flags)


@pytest.mark.parametrize("sp", [False, True], ids=["whole", "sequence shared"])
@pytest.mark.parametrize("batch", [0, 1])
def test_idle_blocks_and_empty_batches(workers, sp, batch):
    model = SHAPE | MODELS["T and Mamba-1"]
    wanted = plans(3)
    for all_take_part in (True, False):
        flags = {"sp": sp, "all_take_part": all_take_part}
        answers = workers(2).run(
            "traffic_jobs", "issued", model=model, dtype="float32", batch=batch, seq=4, plans=wanted, **flags
        )
        compare(answers, model, wanted, batch, 4, 2, "float32", sp=sp)


@pytest.mark.parametrize("sp", [False, True], ids=["whole", "sequence shared"])
def test_a_head_in_chunks_moves_the_same(workers, sp):
    """4,100 rows of vocabulary and 4,092 tokens a chunk: two chunks of statistics."""
    model = SHAPE | MODELS["T"] | {"vocab_size": 4100, "hidden_size": 8, "widths": [8], "num_layers": None}
    wanted = [([8, 8], 0)]
    answers = workers(2).run(
        "traffic_jobs", "issued", model=model, dtype="bfloat16", batch=1, seq=4093, plans=wanted, sp=sp
    )
    assert len([kind for kind, _ in answers[0][0] if kind == "all_gather"]) > 1
    compare(answers, model, wanted, 1, 4093, 2, "bfloat16", sp=sp)


@pytest.mark.parametrize("sp", [False, True], ids=["whole", "sequence shared"])
@pytest.mark.parametrize("name", ["T and Mamba-2", "T and Mamba-1"])
@pytest.mark.parametrize("tp", [4, 8])
def test_more_ranks_each_by_itself(name, tp, sp):
    """Torch's fake process group issues for real and delivers nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = SHAPE | MODELS[name]
    wanted = plans(3)
    answers = []
    for rank in (0, tp - 1):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp)
        try:
            answers.append(issued(None, model, sp, "float32", 2, 6, wanted, recompute=True))
        finally:
            dist.destroy_process_group()
    compare(answers, model, wanted, 2, 6, tp, "float32", sp=sp, recompute=True)


def test_one_rank_moves_nothing():
    config = resolve_model(ModelConfig(**SHAPE, **MODELS["T"]))
    for sp in (False, True):
        assert micro_batch_traffic(config, [32, 32], 2, 2, 8, tp=1, sp=sp, element_bytes=4) == Traffic()


def test_a_narrow_width_moves_its_share():
    """Of what the blocks move; the ends are static."""
    config = resolve_model(ModelConfig(hidden_size=2048, num_layers=4, vocab_size=1000, widths=[128, 512, 1024, 2048]))
    moved = {
        width: micro_batch_traffic(config, [width] * 4, 4, 1, 512, tp=2, sp=False, element_bytes=2).all_reduce
        for width in config.widths
    }
    ends = 2 * 512 * 2048 * 2
    assert [moved[width] - ends for width in config.widths] == [4 * 2 * 2 * 512 * width * 2 for width in config.widths]
