"""Values of a ds_config that DeepSpeed's own description allows, and at which a run would fail once it has started."""

from __future__ import annotations

import importlib.util
import json
import os
from typing import Any

from megatron_adamba.config.rules import LONGEST_NAME
from megatron_adamba.errors import ConfigError

_ALONE = {
    ("zero_allow_untested_optimizer",): True,
    ("zero_force_ds_cpu_optimizer",): False,
    ("bf16", "check_grad_overflow"): False,
    ("bf16", "bf16_master_weights_and_grads"): False,
    ("bf16", "bf16_optimizer_states"): False,
    ("bf16", "immediate_grad_update"): False,
    ("zero_optimization", "offload_optimizer", "ratio"): 1,
    ("zero_optimization", "offload_optimizer", "super_offload"): False,
    ("zero_optimization", "zenflow"): None,
    ("zero_optimization", "zero_quantized_weights"): False,
    ("zero_optimization", "zero_quantized_nontrainable_weights"): False,
    ("zero_optimization", "zero_quantized_gradients"): False,
    ("zero_optimization", "zero_hpz_partition_size"): 1,
    ("zero_optimization", "legacy_stage1"): False,
    ("zero_optimization", "module_granularity_threshold"): 0,
    ("zero_optimization", "stage3_module_granularity_threshold"): 0,
    ("aio", "use_gds"): False,
    ("managed_gradient_accumulation",): True,
    ("gradient_allreduce_op",): "mean",
}
"""what a run needs, or was never tried without: the one value that may stand there"""
_MONITORS = {"wandb": "wandb", "comet": "comet_ml", "tensorboard": "tensorboard", "csv_monitor": None}
"""sections of what writes figures, and the package of each"""
_SCATTERED = {"gradient_predivide_factor": 1, "prescale_gradients": False}
"""what a reduce-scatter of gradients takes alone"""


def check_values(values: dict[str, Any], source: str) -> None:
    """values: of the right types. Raises ConfigError naming the first that cannot work, and what can."""
    for place, only in _ALONE.items():
        found: Any = values
        for part in place:
            found = found.get(part, only) if isinstance(found, dict) else only
        if found != only:
            name, shown, wanted = ".".join(place), json.dumps(found)[:60], json.dumps(only)
            raise ConfigError(f"{source}: {name} {shown}: is not supported here; write {wanted}, or leave it out")
    _check_buckets(values, source)
    for name, package in _MONITORS.items():
        section = values.get(name) or {}
        if not section.get("enabled"):
            continue
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{source}: {name}.enabled true: {package} is not installed; pip install {package}, or write false"
            )
        if name in ("tensorboard", "csv_monitor"):
            path = os.path.join(section.get("output_path", ""), section.get("job_name", "DeepSpeedJobName"))
            _check_folder(f"{source}: {name}.output_path", path, f"runs/{name}")
    profiler = values.get("flops_profiler") or {}
    if profiler.get("enabled") and (path := profiler.get("output_file")):
        name = f"{source}: flops_profiler.output_file"
        if os.path.isdir(path) or path.endswith("/"):
            raise ConfigError(f"{name} {path}: is a folder; name a file, for example {os.path.join(path, 'flops.txt')}")
        _check_folder(name, path, "runs/flops.txt", of_file=True)


def _check_folder(name: str, path: str, example: str, of_file: bool = False) -> None:
    """It, or the folder of the file that it names, can be made and written in."""
    if "\0" in path or any(len(os.fsencode(part)) > LONGEST_NAME for part in path.split("/")):
        raise ConfigError(f"{name}: is no path, or has a name longer than {LONGEST_NAME} bytes; for example {example}")
    there = os.path.abspath(os.path.dirname(path) if of_file else path)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{name} {path}: {there} is no folder that can be written in; for example {example}")


def _check_buckets(values: dict[str, Any], source: str) -> None:
    """What DeepSpeed's optimizers of ZeRO assert as they are made."""
    zero = values.get("zero_optimization") or {}
    stage, size = zero.get("stage", 0), zero.get("allgather_bucket_size", 0)
    if stage in (1, 2) and size % 2:
        raise ConfigError(
            f"{source}: zero_optimization.allgather_bucket_size {size}: must be even at ZeRO {stage}, for example "
            f"{size + 1}"
        )
    for name, only in _SCATTERED.items():
        if stage >= 2 and zero.get("reduce_scatter", True) and values.get(name, only) != only:
            raise ConfigError(
                f"{source}: {name} {json.dumps(values[name])}: does not go with reduce_scatter at ZeRO {stage}; write "
                f"{json.dumps(only)}, or zero_optimization.reduce_scatter false"
            )
