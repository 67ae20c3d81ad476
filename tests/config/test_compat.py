"""What is refused in combination, with a value that then works; and the ds_config that our values are written into."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_adamba.blueprint.compat import RULES, RunSetup, check_combination
from megatron_adamba.config.cli import parse_arguments
from megatron_adamba.config.ds_config import (
    bf16_enabled,
    complete_ds_config,
    default_ds_config,
    offload_enabled,
    read_ds_config,
    zero_stage,
)
from megatron_adamba.config.root import AdambaConfig
from megatron_adamba.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass
class Case:
    """A broken combination, the message, and the same with the setting that the message names."""

    rule: str
    words: list[str]
    message: str
    then: list[str] = field(default_factory=list)
    setup: dict[str, Any] = field(default_factory=dict)
    then_setup: dict[str, Any] = field(default_factory=dict)


MUON, PP2 = ["--optimizer.name", "muon"], ["--parallel.pp", "2"]
FOLDED, SANDWICH = ["--parallel.pipeline_schedule", "dualpipev"], ["--elastic.width_sampling", "sandwich"]
EXPERTS = ["--model.block_pattern", "EE", "--model.num_experts", "6"]
EP_DEGREE = "an expert-parallel degree that does not fit"
MODEL_DEGREES = "a tensor-parallel degree that the model does not have"
TWO_LAYERS = ["--model.num_layers", "2"]
TP2, HYBRID = ["--parallel.tp", "2"], ["--model.block_pattern", "TM", "--model.num_kv_groups", "2"]
CASES = [
    Case(
        "a tensor-parallel degree that the ranks do not have", ["--parallel.tp", "3", *TWO_LAYERS],
        "--parallel.tp 3: must divide the 2 ranks that the launcher starts; one of [1, 2]", TP2,
    ),
    Case(
        MODEL_DEGREES, [*TP2, *TWO_LAYERS, "--model.num_kv_groups", "1"],
        "does not divide --model.num_kv_groups (1); this model takes [1]", ["--model.num_kv_groups", "2"],
    ),
    Case(
        MODEL_DEGREES, [*TP2, *HYBRID], "does not divide --model.mamba_num_groups (1); this model takes [1]",
        ["--model.mamba_num_groups", "2"],
    ),
    Case(
        MODEL_DEGREES, [*TP2, *TWO_LAYERS, "--model.ffn_granule", "1024"],
        "leaves ranks without a unit of --model.ffn_granule (1 units); this model takes [1]",
        ["--model.ffn_granule", "512"],
    ),
    Case(
        MODEL_DEGREES, ["--parallel.tp", "4", *TWO_LAYERS, "--model.num_kv_groups", "2"],
        "does not divide --model.num_kv_groups (2); this model takes [1, 2]", TP2, {"world_size": 4},
    ),
    Case(
        "sequence parallelism without tensor parallelism", ["--parallel.sp", "true", *TWO_LAYERS],
        "give --parallel.tp 2", TP2,
    ),
    Case(
        "a pipeline that the ranks do not have", ["--parallel.pp", "4", "--model.num_layers", "8"],
        "--parallel.pp 4 x --parallel.tp 1: must divide the 2 ranks that the launcher starts; with this tp, pp may be "
        "one of [1, 2]", [*PP2, "--train.global_batch_size", "8"],
    ),
    Case(
        "a pipeline with more chunks than blocks", [*PP2, "--model.num_layers", "1"],
        "1f1b runs 2 chunks, and the pattern has 1 blocks; use --parallel.pp 1", ["--parallel.pp", "1"],
    ),
    Case(
        "a pipeline with more chunks than blocks", [*PP2, *FOLDED, *TWO_LAYERS],
        "dualpipev runs 4 chunks, and the pattern has 2 blocks; use --parallel.pipeline_schedule 1f1b",
        ["--parallel.pipeline_schedule", "1f1b"],
    ),
    Case(
        "a pipeline with other ZeRO stages than 1", [*PP2, *TWO_LAYERS], "use --deepspeed_config zero1",
        [], {"zero_stage": 2}, {"zero_stage": 1},
    ),
    Case(
        "a pipeline with too few micro-batches", [*PP2, *TWO_LAYERS, "--train.global_batch_size", "4"],
        "1f1b needs 2 passes of micro-batches in a step, and there are 1; use --train.global_batch_size 8",
        ["--train.global_batch_size", "8"],
    ),
    Case(
        "a pipeline with too few micro-batches",
        [*PP2, *FOLDED, "--model.num_layers", "4", *SANDWICH, "--train.global_batch_size", "4"],
        "dualpipev needs 4 passes of micro-batches in a step, and there are 2; use --train.global_batch_size 8",
        ["--train.global_batch_size", "8"],
    ),
    Case(EP_DEGREE, ["--parallel.ep", "2", *TWO_LAYERS], "the 0 experts and", ["--parallel.ep", "1"]),
    Case(
        EP_DEGREE, ["--parallel.ep", "4", "--train.global_batch_size", "16", *EXPERTS],
        "must divide the 6 experts and the 4 ranks of dp x tp; one of [1, 2]",
        ["--parallel.ep", "2"], {"world_size": 4},
    ),
    Case(
        EP_DEGREE, ["--parallel.ep", "3", *EXPERTS],
        "must divide the 6 experts and the 2 ranks of dp x tp; one of [1, 2]",
        ["--parallel.ep", "2"],
    ),
    Case("ZeRO 0 on several processes", [], "zero stage 0 on 2 processes", [], {"zero_stage": 0}, {"zero_stage": 1}),
    Case(
        "ZeRO 0 with bf16", [], "zero stage 0 keeps no fp32 weights under bf16; use stage 1", [],
        {"zero_stage": 0, "world_size": 1, "bf16": True}, {"zero_stage": 1},
    ),
    Case(
        "phase 1 at other widths than the full one",
        ["--train.phase", "1", "--elastic.width_sampling", "per_layer"],
        "use --elastic.width_sampling full", ["--elastic.width_sampling", "full"],
    ),
    Case(
        "distillation without a full pass", ["--distill.share", "0.5", "--elastic.width_sampling", "uniform"],
        "use sandwich, or --distill.share 0", SANDWICH,
    ),
    Case("Muon with ZeRO 3", MUON, "use zero stage 2 or adamw", [], {"zero_stage": 3}, {"zero_stage": 2}),
    Case("Muon with ZeRO 3", MUON, "or adamw", ["--optimizer.name", "adamw"], {"zero_stage": 3}),
    Case(
        "Muon with offload", MUON, "use zero stage 2 without offload, or adamw", [],
        {"zero_stage": 2, "offload": True}, {"offload": False},
    ),
    Case(
        "offload with ZeRO 0 or 1", [], "offload_optimizer with zero stage 1; use stage 2 or 3", [],
        {"offload": True}, {"zero_stage": 2},
    ),
    Case(
        "a batch that does not divide", ["--train.global_batch_size", "9"],
        "must be a multiple of micro_batch_size x replicas = 4 x 2; try 16", ["--train.global_batch_size", "16"],
    ),
    Case(
        "a batch that does not divide", ["--train.global_batch_size", "4"], "try 8",
        ["--train.global_batch_size", "8"],
    ),
    Case(
        "plans that do not divide the accumulation",
        ["--train.global_batch_size", "48", "--elastic.plans_per_step", "4"],
        "must divide the 6 accumulation steps; one of [1, 2, 3, 6]", ["--elastic.plans_per_step", "3"],
    ),
]  # fmt: skip


def run_setup(words: list[str], **changes: Any) -> RunSetup:
    values = {"zero_stage": 1, "offload": False, "world_size": 2, "bf16": False, **changes}
    return RunSetup(parse_arguments(words).config, **values)


@pytest.mark.parametrize("case", CASES, ids=[f"{case.rule} {i}" for i, case in enumerate(CASES)])
def test_a_broken_combination_is_refused_and_its_remedy_works(case):
    broken = run_setup(case.words, **case.setup)
    assert next(rule.name for rule in RULES if rule.broken(broken)) == case.rule
    with pytest.raises(ConfigError, match=re.escape(case.message)) as caught:
        check_combination(broken)
    assert "--" in str(caught.value) and "\n" not in str(caught.value)
    check_combination(run_setup(case.words + case.then, **{**case.setup, **case.then_setup}))


def test_every_rule_is_tested():
    assert {case.rule for case in CASES} == {rule.name for rule in RULES}


@pytest.mark.parametrize("words", [[], MUON, ["--train.micro_batch_size", "1", "--elastic.plans_per_step", "4"]])
@pytest.mark.parametrize("stage", [1, 2])
def test_ordinary_runs_are_not_refused(words, stage):
    check_combination(run_setup(words, zero_stage=stage, bf16=True))


def completed(raw: dict[str, Any], words: list[str] = (), world_size: int = 2) -> dict[str, Any]:
    return complete_ds_config(raw, parse_arguments(list(words)).config, world_size, "zero.json")


def test_our_values_are_written_into_a_copy():
    raw = {
        "zero_optimization": {"stage": 2},
        "train_batch_size": "auto",
        "gradient_clipping": 0.5,
        "steps_per_print": 7,
    }
    words = ["--train.global_batch_size", "48", "--train.gradient_clipping", "0.5"]
    result = completed(raw, words)
    assert raw["train_batch_size"] == "auto" and "train_micro_batch_size_per_gpu" not in raw
    assert result["train_batch_size"] == 48 and result["train_micro_batch_size_per_gpu"] == 4
    assert result["gradient_accumulation_steps"] == 6 and result["gradient_clipping"] == 0.5
    assert result["zero_optimization"] == {"stage": 2} and result["steps_per_print"] == 7


def test_every_pass_of_a_sandwich_is_a_micro_step():
    words = [
        "--elastic.width_sampling",
        "sandwich",
        "--elastic.sandwich_passes",
        "3",
        "--train.global_batch_size",
        "16",
    ]
    result = completed({}, words)
    assert (result["gradient_accumulation_steps"], result["train_batch_size"]) == (6, 48)
    assert result["train_micro_batch_size_per_gpu"] * result["gradient_accumulation_steps"] * 2 == 48
    # a file repeats what the user asked for, not what the engine is told
    assert completed({"train_batch_size": 16, "gradient_accumulation_steps": 2}, words) == result


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"train_batch_size": 9}, "zero.json says train_batch_size 9, but --train.global_batch_size gives 8"),
        (
            {"train_micro_batch_size_per_gpu": 1},
            "micro_batch_size_per_gpu 1, but --train.micro_batch_size gives 4",
        ),
        (
            {"gradient_accumulation_steps": 3},
            "gradient_accumulation_steps 3, but --train.global_batch_size and --train.micro_batch_size gives 1",
        ),
        ({"gradient_clipping": 0.1}, "gradient_clipping 0.1, but --train.gradient_clipping gives 1.0; take it out"),
        (
            {"optimizer": {"type": "Adam"}},
            "zero.json has a section 'optimizer': it is set by --optimizer.*; take",
        ),
        ({"scheduler": {}}, "zero.json has a section 'scheduler': it is set by --optimizer.schedule"),
    ],
)
def test_a_value_given_twice_must_agree(raw, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        completed(raw)
    key = next(iter(raw))
    if key in completed({}):
        assert completed({key: completed({})[key]}) == completed({})


def test_the_file_is_read(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}))
    values = read_ds_config(str(path))
    assert (zero_stage(values), offload_enabled(values), bf16_enabled(values)) == (3, True, False)
    assert read_ds_config(None) == default_ds_config()
    values = default_ds_config()
    assert (zero_stage(values), offload_enabled(values), bf16_enabled(values)) == (1, False, True)
    assert zero_stage({}) == 0
    assert not offload_enabled({"zero_optimization": {"offload_optimizer": {"device": "none"}}})


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), ("{", "not JSON"), ("[]", "a JSON object")])
def test_a_file_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(f"--deepspeed_config {path}")) as caught:
        read_ds_config(str(path))
    assert message in str(caught.value) and "try zero1" in str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_the_files_that_come_along_agree_with_every_run(path):
    values = read_ds_config(str(path))
    result = completed(values)
    assert result["train_batch_size"] == 8
    alone = {"world_size": 1, "bf16": bf16_enabled(values)}
    check_combination(run_setup([], zero_stage=zero_stage(values), offload=offload_enabled(values), **alone))


def test_fp16_is_refused():
    with pytest.raises(ConfigError, match=r'ds.json enables fp16.*"bf16"'):
        complete_ds_config({"fp16": {"enabled": True}}, AdambaConfig(), 1, "ds.json")
