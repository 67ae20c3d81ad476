"""What is printed of a pipeline: each stage's blocks, parameters, FLOPs, and the wait to expect."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_forked

from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.blueprint.stages import plan_stages
from megatron_adamba.blueprint.summary import summarize, summarize_stages
from megatron_adamba.blueprint.training_flops import training_costs
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.sections import ParallelConfig

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_stages_add_up_to_the_model(schedule, tied):
    config = resolve_model(ModelConfig(hidden_size=64, block_pattern="TMTMTM", vocab_size=512, tie_embeddings=tied))
    stages = plan_stages(config, ParallelConfig(pp=2, pipeline_schedule=schedule), 64)
    rows = summarize_stages(config, stages, 64)
    held_twice = 64 * 512 if tied and schedule == "1f1b" else 0
    assert sum(row["parameters"] for row in rows) == summarize(config, 64)["total_without_gains"] + held_twice
    assert sum(row["training_flops"] for row in rows) == training_costs(config, 64).of((64,) * 6)
    head = {"head.weight", "embedding.weight"}
    less = summarize_stages(config, stages, 64, frozen=head)
    saved = sum(row["training_flops"] for row in rows) - sum(row["training_flops"] for row in less)
    # of the gradient of the head itself alone: the first gain is in front of all other products
    assert saved == 2 * 64 * 512


def test_the_script_prints_them():
    words = ["--preset", "tiny-hybrid", "--parallel.pp", "2", "--train.global_batch_size", "16", "--summary"]
    words += ["--model.block_pattern", "TM|TMTM", "--data.tokenizer", "bytes"]
    done = run_forked(ROOT / "pretrain_adamba.py", words)
    assert done.returncode == 0, done.stderr
    assert (
        "pipeline of 2 stages, 1f1b" in done.stdout and "embedding, 0-1" in done.stdout and "2-5, head" in done.stdout
    )
    assert "expected bubble 11.1% with 8 passes a step and equal stages" in done.stdout
