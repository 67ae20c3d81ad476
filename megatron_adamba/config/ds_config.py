"""The ds_config: a file for what DeepSpeed owns, into which our config's batch sizes and clipping are written."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

from megatron_adamba.config.root import AdambaConfig
from megatron_adamba.config.rules import nearest
from megatron_adamba.errors import ConfigError
from megatron_adamba.schema import read_regular

OURS = {
    "train_batch_size": "--train.global_batch_size",
    "train_micro_batch_size_per_gpu": "--train.micro_batch_size",
    "gradient_accumulation_steps": "--train.global_batch_size and --train.micro_batch_size",
    "gradient_clipping": "--train.gradient_clipping",
}
"""ds_config keys that our config owns; a file may repeat them only with the same value"""

_NOT_OURS_TO_READ = {"optimizer": "--optimizer.*", "scheduler": "--optimizer.schedule"}


def default_ds_config(bf16: bool = True) -> dict[str, Any]:
    """What runs when no file is given: ZeRO 1, bf16 with fp32 master weights and fp32 gradient sums; fp32 where the
    machine has no bf16."""
    if not bf16:
        return {"zero_optimization": {"stage": 1}}
    return {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 1},
    }


def shipped_ds_configs() -> dict[str, Path]:
    """The files that come with the package, by name: zero1, zero2_offload, ..."""
    folder = Path(str(importlib.resources.files("megatron_adamba.config").joinpath("ds_configs")))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def read_ds_config(path: str | None, bf16: bool = True) -> dict[str, Any]:
    """The user's file, a shipped one by its name, or the default; bf16: whether that may be in bf16.

    Raises ConfigError when the file is missing or not a JSON object.
    """
    if path is None:
        return default_ds_config(bf16)
    shipped = shipped_ds_configs()
    advice = "try zero1"
    if not Path(path).exists() and path not in shipped and (near := nearest(path, list(shipped))):
        advice = f"did you mean {near}?"
    file = shipped.get(path, Path(path))
    content = read_regular(file, ConfigError, advice, flag="--deepspeed_config")
    try:
        values = json.loads(content, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--deepspeed_config {path}: not JSON ({error}); try zero1") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--deepspeed_config {path}: must hold a JSON object; try zero1")
    _check_sections(values, f"--deepspeed_config {path}")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is given twice")
    return dict(pairs)


def _check_sections(values: dict[str, Any], source: str) -> None:
    """What this project reads of the file has to have the form that it reads."""
    if "bfloat16" in values:
        raise ConfigError(f'{source}: "bfloat16" is the old name; write "bf16": {{"enabled": true}}')
    for key in ("zero_optimization", "bf16", "fp16", "data_types"):
        if not isinstance(values.get(key, {}), dict):
            raise ConfigError(f"{source}: {key} must be an object; compare with ds_configs/zero1.json")
    zero = values.get("zero_optimization", {})
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ConfigError(f"{source}: zero_optimization.stage {zero['stage']!r} must be 0, 1, 2 or 3; for example 1")
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key) is not None and not isinstance(zero[key], dict):
            raise ConfigError(f'{source}: {key} must be an object, for example {{"device": "cpu"}}')
        if (zero.get(key) or {}).get("device", "none") not in ("none", "cpu"):
            raise ConfigError(f'{source}: {key}.device {zero[key]["device"]!r} is not supported; use "cpu"')


def zero_stage(ds_config: dict[str, Any]) -> int:
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def offload_enabled(ds_config: dict[str, Any]) -> bool:
    zero = ds_config.get("zero_optimization", {})
    return any((zero.get(key) or {}).get("device", "none") != "none" for key in ("offload_optimizer", "offload_param"))


def bf16_enabled(ds_config: dict[str, Any]) -> bool:
    return bool(ds_config.get("bf16", {}).get("enabled", False))


def complete_ds_config(ds_config: dict[str, Any], config: AdambaConfig, dp: int, source: str) -> dict[str, Any]:
    """Write our values into a copy of the user's ds_config.

    dp: data-parallel ranks. Under `sandwich` every pass is a micro-step of the engine, so its accumulation
    and batch grow by the number of passes.
    Raises ConfigError, naming both sources, where a value is given twice and differs.
    """
    passes = config.elastic.passes
    train = config.train
    accumulation = train.global_batch_size // (train.micro_batch_size * dp)
    plain = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.gradient_clipping,
    }
    for key, flag in OURS.items():
        given = ds_config.get(key, "auto")
        if given != "auto" and given != plain[key]:
            raise ConfigError(f"{source} says {key} {given}, but {flag} gives {plain[key]}; take it out of the file")
    for key, flag in _NOT_OURS_TO_READ.items():
        if key in ds_config:
            raise ConfigError(f"{source} has a section {key!r}: it is set by {flag}; take it out of the file")
    if ds_config.get("fp16", {}).get("enabled"):
        raise ConfigError(f'{source} enables fp16: loss scaling is not built here; use "bf16": {{"enabled": true}}')
    if config.optimizer.name == "muon":
        for key in ("round_robin_gradients", "parameter_alignment"):
            if ds_config.get("zero_optimization", {}).get(key):
                raise ConfigError(f"{source} sets {key}: Muon reads flat partitions in order; take it out of the file")
    result = {**ds_config, **plain}
    result["gradient_accumulation_steps"] = accumulation * passes
    result["train_batch_size"] = train.global_batch_size * passes
    result["zero_allow_untested_optimizer"] = True
    result["zero_force_ds_cpu_optimizer"] = False
    result.setdefault("steps_per_print", 10**9)
    if bf16_enabled(ds_config):
        # non-finite steps are found and skipped by us, alike at every stage; DeepSpeed's own way out of one leaves nan
        # behind in the gradient buffers of ZeRO 2 with offload
        result["bf16"] = {**ds_config["bf16"], "check_grad_overflow": False}
    return result
