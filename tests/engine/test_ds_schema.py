"""Files for DeepSpeed: what DeepSpeed would drop, coerce or not read is refused, with the nearest that works."""

from __future__ import annotations

import copy
import importlib.util
import json
import random
from pathlib import Path

import pytest

from megatron_adamba.config.ds_config import read_ds_config
from megatron_adamba.engine.ds_schema import check_ds_config
from megatron_adamba.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
HUGGING_FACE = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": 5e8,
        "stage3_prefetch_bucket_size": 50000000,
        "stage3_param_persistence_threshold": 100000,
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    },
}
"""the form of a user of Hugging Face's Trainer, with the values that nobody fills in here written out"""


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_the_files_that_come_along_are_in_order(path):
    check_ds_config(json.loads(path.read_text()), str(path))


def test_a_file_of_a_trainers_user_is_in_order():
    check_ds_config(HUGGING_FACE, "FILE")
    monitors = {"tensorboard": {"enabled": True, "output_path": "x"}, "csv_monitor": {"enabled": False}}
    others = {"flops_profiler": {"enabled": True, "profile_step": 5, "output_file": None}}
    others |= {"timers": {"throughput": {"enabled": False}}, "communication_data_type": "fp32"}
    others |= {
        "data_types": {"grad_accum_dtype": "fp32"},
        "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
    }
    check_ds_config(monitors | others, "FILE")


def at(path: str, value):
    """HUGGING_FACE with one value changed."""
    values = copy.deepcopy(HUGGING_FACE)
    *sections, key = path.split(".")
    holder = values
    for section in sections:
        holder = holder.setdefault(section, {})
    holder[key] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("bf16.enabled", "auto", 'bf16.enabled "auto": nothing fills it in here'),
        ("bf16.enabled", "true", 'bf16.enabled "true": Input should be a valid boolean'),
        ("bf16.enabled", 1, "bf16.enabled 1: Input should be a valid boolean"),
        ("bf16.enable", True, "bf16.enable: DeepSpeed knows no such key; did you mean enabled?"),
        ("bf16", True, "bf16 must be an object"),
        ("zero_optimisation", {}, "did you mean zero_optimization?"),
        ("zero_optimization.stages", 1, "zero_optimization.stages: DeepSpeed knows no such key; did you mean stage?"),
        ("zero_optimization.stage", 4, "zero_optimization.stage 4"),
        ("zero_optimization.stage", "1", "zero_optimization.stage"),
        ("zero_optimization.stage", True, "zero_optimization.stage true"),
        ("zero_optimization.reduce_bucket_size", "auto", "reduce_bucket_size"),
        ("zero_optimization.reduce_bucket_size", -1, "reduce_bucket_size -1: Input should be greater than 0"),
        ("zero_optimization.reduce_bucket_size", 0.5, "reduce_bucket_size 0.5"),
        ("zero_optimization.overlap_comm", "yes", "overlap_comm"),
        ("zero_optimization.cpu_offload", True, "zero_optimization.cpu_offload: DeepSpeed knows no such key"),
        ("zero_optimization.offload_optimizer.devise", "cpu", "did you mean device?"),
        ("zero_optimization.mics_shard_size", 2, "MiCS"),
        ("data_types.grad_accum_dtype", "auto", "grad_accum_dtype"),
        ("data_types.grad_accum_dtype", "float", "grad_accum_dtype"),
        ("data_types.grad_acum_dtype", "fp32", "did you mean grad_accum_dtype?"),
        ("communication_data_type", "float32", "communication_data_type"),
        ("fp16.enabled", "auto", "fp16.enabled"),
        ("fp16.loss_scale", -3, "fp16"),
        ("prescale_gradients", "no", "prescale_gradients"),
        ("steps_per_print", -1, "steps_per_print -1"),
        ("amp", {"enabled": True}, "removed"),
        ("elasticity", {}, "removed"),
        ("activation_checkpointing", {}, "--train.activation_checkpointing"),
        ("tensor_parallel", {"autotp_size": 2}, "--parallel.tp"),
        ("wandb.enabled", "auto", "wandb.enabled"),
        ("torch_autocast", {"enabled": True, "dtype": "bf16"}, "torch_autocast"),
        ("bf16.bf16_master_weights_and_grads", True, "bf16.bf16_master_weights_and_grads true: is not supported"),
        ("zero_optimization.offload_optimizer.ratio", 0.3, "ratio 0.3: is not supported here; write 1"),
        ("zero_optimization.zero_quantized_weights", True, "zero_quantized_weights"),
        ("zero_allow_untested_optimizer", False, "zero_allow_untested_optimizer false"),
        ("gradient_clipping", "1.0", "gradient_clipping"),
        ("gradient_predivide_factor", 2.0, "gradient_predivide_factor 2.0: does not go with reduce_scatter at ZeRO 3"),
        ("prescale_gradients", True, "prescale_gradients true: does not go with reduce_scatter at ZeRO 3; write false"),
        ("zero_optimization.legacy_stage1", True, "zero_optimization.legacy_stage1 true: is not supported here"),
        ("zero_optimization.stage3_module_granularity_threshold", 10**6, "is not supported here; write 0"),
        ("zero_optimization.module_granularity_threshold", 10**6, "module_granularity_threshold 1000000: is not"),
        ("aio.use_gds", True, "aio.use_gds true: is not supported here; write false"),
        ("compile", {"deepcompile": True}, "section 'compile' is not used here; take it out of the file"),
        (
            "zero_optimization.param_persistence_threshold",
            10,
            "zero_optimization.param_persistence_threshold: is zero_optimization.stage3_param_persistence_threshold, "
            "which is given, too; take one out",
        ),
        ("zero_optimization.prefetch_bucket_size", 10, "zero_optimization.prefetch_bucket_size: is zero_optimization."),
    ],
)
def test_what_would_do_something_else_than_it_says_is_refused(tmp_path, path, value, message):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(at(path, value)))
    with pytest.raises(ConfigError) as caught:
        check_ds_config(read_ds_config(str(file)), f"--deepspeed_config {file}")
    assert message in str(caught.value) and f"--deepspeed_config {file}" in str(caught.value)


@pytest.mark.parametrize("stage", [1, 2])
def test_buckets_of_an_odd_size(stage):
    """DeepSpeed asserts it as its optimizer is made."""
    zero = {"stage": stage, "allgather_bucket_size": 1001, "reduce_bucket_size": 1001}
    with pytest.raises(ConfigError, match=r"allgather_bucket_size 1001: must be even at ZeRO \d, for example 1002"):
        check_ds_config({"zero_optimization": zero}, "FILE")
    check_ds_config({"zero_optimization": zero | {"allgather_bucket_size": 1002}}, "FILE")
    check_ds_config({"zero_optimization": zero | {"stage": 3}}, "FILE")


@pytest.mark.parametrize("zero", [{"stage": 1}, {"stage": 2, "reduce_scatter": False}, {"stage": 3}], ids=str)
def test_values_that_one_stage_does_not_take_and_another_does(zero):
    scaled = {"gradient_predivide_factor": 2.0, "prescale_gradients": True}
    allowed = zero["stage"] < 3
    check_ds_config({"zero_optimization": zero} | (scaled if allowed else {}), "FILE")
    check_ds_config({"zero_optimization": zero | {"module_granularity_threshold": 0}}, "FILE")


@pytest.mark.parametrize(
    ("section", "package"), [("wandb", "wandb"), ("comet", "comet_ml"), ("tensorboard", "tensorboard")]
)
def test_monitors_whose_package_is_not_there(section, package, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(ConfigError, match=f"{section}.enabled true: {package} is not installed; pip install {package}"):
        check_ds_config({section: {"enabled": True}}, "FILE")
    check_ds_config({section: {"enabled": False}}, "FILE")


@pytest.mark.parametrize("path", ["FOLDER/file", "FOLDER/file/deep", "x" * 300, "a\0b"], ids=repr)
def test_paths_where_nothing_can_be_written(path, tmp_path):
    (tmp_path / "file").write_text("")
    path = path.replace("FOLDER", str(tmp_path))
    for section, key in (
        ("csv_monitor", "output_path"),
        ("tensorboard", "output_path"),
        ("flops_profiler", "output_file"),
    ):
        path = path + "/x" * (key == "output_file" and path.endswith("file"))
        values = {section: {"enabled": True, key: path}}
        with pytest.raises(ConfigError, match=rf"FILE: {section}\.{key}.*; for example runs/") as caught:
            check_ds_config(values, "FILE")
        assert "\n" not in str(caught.value) and "\0" not in str(caught.value)
        values[section]["enabled"] = False
        check_ds_config(values, "FILE")


def test_the_profilers_file_is_no_folder_and_monitors_make_theirs(tmp_path):
    with pytest.raises(ConfigError, match=r"output_file .*: is a folder; name a file, for example .*/flops\.txt"):
        check_ds_config({"flops_profiler": {"enabled": True, "output_file": str(tmp_path)}}, "FILE")
    check_ds_config({"flops_profiler": {"enabled": True, "output_file": str(tmp_path / "new" / "x.txt")}}, "FILE")
    check_ds_config({"csv_monitor": {"enabled": True, "output_path": str(tmp_path / "a" / "b")}}, "FILE")
    assert list(tmp_path.iterdir()) == []


def test_a_key_given_twice_is_refused(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"bf16": {"enabled": true, "enabled": false}}')
    with pytest.raises(ConfigError, match="enabled is given twice"):
        read_ds_config(str(file))


def test_a_thousand_mutations_are_taken_or_refused(tmp_path):
    from mutations import mutated_json

    file, source = tmp_path / "ds.json", random.Random(11)
    for _ in range(1000):
        file.write_bytes(content := mutated_json(source, HUGGING_FACE))
        try:
            check_ds_config(read_ds_config(str(file)), f"--deepspeed_config {file}")
        except ConfigError as error:
            assert "\n" not in str(error), content
