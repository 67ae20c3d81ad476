"""A ds_config held against what DeepSpeed itself knows of it, before anything starts.

DeepSpeed leaves unknown sections unread, drops "auto" and takes "true" for true; a run would then do something else
than its file says. Here types are strict, names have to be known, and what DeepSpeed has removed is refused in its own
words.
"""

from __future__ import annotations

import enum
import functools
import importlib
import json
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from megatron_adamba.config.rules import nearest
from megatron_adamba.engine.ds_values import check_values
from megatron_adamba.engine.launch import import_deepspeed
from megatron_adamba.errors import ConfigError

_Dtype = Literal["fp32", "fp16", "bf16"]
_Name = Literal["debug", "info", "warning", "error", "critical"]
_FILLED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
"""by our config, so "auto" has a meaning there"""
_NOT_USED = {
    "tensor_parallel": "--parallel.tp",
    "expert_parallel": "--parallel.ep",
    "pipeline": "--parallel.pp",
    "activation_checkpointing": "--train.activation_checkpointing",
    "checkpoint": "--checkpoint.*",
    "data_efficiency": "--data.train",
    "curriculum_learning": "--data.train",
    "hybrid_engine": None,
    "autotuning": None,
    "compile": None,
    "weight_quantization": None,
    "torch_autocast": None,
    "datastates_config": None,
}
"""sections that DeepSpeed knows and that nothing reads here: what is set instead"""
_SECTIONS = {
    "zero_optimization": ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig"),
    "bf16": ("deepspeed.runtime.precision_config", "DeepSpeedBF16Config"),
    "fp16": ("deepspeed.runtime.precision_config", "DeepSpeedFP16Config"),
    "comms_logger": ("deepspeed.comm.config", "CommsLoggerConfig"),
    "tensorboard": ("deepspeed.monitor.config", "TensorBoardConfig"),
    "wandb": ("deepspeed.monitor.config", "WandbConfig"),
    "csv_monitor": ("deepspeed.monitor.config", "CSVConfig"),
    "comet": ("deepspeed.monitor.config", "CometConfig"),
}
"""those that DeepSpeed describes by a class"""
_NOT_NEGATIVE = Annotated[int, Field(ge=0)]
_PLAIN: dict[str, Any] = {
    "train_batch_size": Annotated[int, Field(ge=1)],
    "train_micro_batch_size_per_gpu": Annotated[int, Field(ge=1)],
    "gradient_accumulation_steps": Annotated[int, Field(ge=1)],
    "gradient_clipping": Annotated[float, Field(ge=0)],
    "steps_per_print": _NOT_NEGATIVE | None,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "prescale_gradients": bool,
    "gradient_predivide_factor": Annotated[float, Field(gt=0)],
    "communication_data_type": _Dtype | None,
    "seq_parallel_communication_data_type": _Dtype | None,
    "disable_allgather": bool,
    "disable_python_gc": bool,
    "dataloader_drop_last": bool,
    "managed_gradient_accumulation": bool,
    "gradient_allreduce_op": Literal["mean", "sum"],
    "use_data_before_expert_parallelism": bool,
    "log_level": _Name,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "optimizer": dict[str, Any],
    "scheduler": dict[str, Any],
}
_SMALL: dict[str, dict[str, Any]] = {
    "data_types": {"grad_accum_dtype": _Dtype | None},
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": Annotated[float, Field(ge=0)],
        "profile_step": Annotated[int, Field(ge=1)],
        "module_depth": int,
        "top_modules": Annotated[int, Field(ge=1)],
        "detailed": bool,
        "output_file": str | None,
    },
    "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    "aio": {
        "block_size": Annotated[int, Field(ge=1)],
        "queue_depth": Annotated[int, Field(ge=1)],
        "intra_op_parallelism": Annotated[int, Field(ge=1)],
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
}


def check_ds_config(values: dict[str, Any], source: str) -> None:
    """Raises ConfigError naming the first key that is unknown, removed, unused here, of another type or out of range.

    source: what the message begins with.
    """
    import_deepspeed()
    _refuse_removed(values, source)
    for key, flag in _NOT_USED.items():
        if key in values:
            instead = f"set {flag} instead, and " if flag else ""
            raise ConfigError(f"{source}: section {key!r} is not used here; {instead}take it out of the file")
    values = {key: value for key, value in values.items() if not (key in _FILLED and value == "auto")}
    try:
        _schema().model_validate(_whole_numbers(values))
    except ValidationError as failure:
        raise ConfigError(f"{source}: {_described(failure, values)}") from None
    _refuse_two_names(values, source)
    check_values(values, source)
    _ask_deepspeed(values, source)


def _refuse_removed(values: dict[str, Any], source: str) -> None:
    config = importlib.import_module("deepspeed.runtime.config")
    try:
        config._reject_removed_config_keys(values)
    except config.DeepSpeedConfigError as error:
        raise ConfigError(f"{source}: {error} Take it out of the file") from None


def _refuse_two_names(values: dict[str, Any], source: str) -> None:
    """DeepSpeed's own name of a field and the one that files use: it takes either, not both."""
    for key, (module, name) in _SECTIONS.items():
        for own, field in getattr(importlib.import_module(module), name).model_fields.items():
            if field.alias and {own, field.alias} <= values.get(key, {}).keys():
                raise ConfigError(f"{source}: {key}.{own}: is {key}.{field.alias}, which is given, too; take one out")


def _ask_deepspeed(values: dict[str, Any], source: str) -> None:
    """Rules between the values of a section."""
    for key, (module, name) in _SECTIONS.items():
        try:
            if key in values:
                getattr(importlib.import_module(module), name)(**values[key])
        except (ValueError, AssertionError) as error:
            text, place = str(error), key
            if isinstance(error, ValidationError):
                found = error.errors(include_url=False)[0]
                text, place = found["msg"], ".".join([key, *map(str, found["loc"])])
            raise ConfigError(f"{source}: {place}: {text}; see ds_configs/zero1.json") from None


@functools.cache
def _schema() -> type[BaseModel]:
    """The whole file."""
    fields: dict[str, Any] = {key: (kind, None) for key, kind in _PLAIN.items()}
    fields |= {key: (_small(key, parts), None) for key, parts in _SMALL.items()}
    for key, (module, name) in _SECTIONS.items():
        fields[key] = (_mirrored(getattr(importlib.import_module(module), name)), None)
    return _model("ds_config", fields)


def _model(name: str, fields: dict[str, Any]) -> type[BaseModel]:
    rules = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, protected_namespaces=())
    return create_model(name, __config__=rules, **fields)


def _small(name: str, parts: dict[str, Any]) -> type[BaseModel]:
    kinds = {key: _small(key, kind) if isinstance(kind, dict) else kind for key, kind in parts.items()}
    return _model(name, {key: (kind, None) for key, kind in kinds.items()})


def _mirrored(model: type[BaseModel]) -> type[BaseModel]:
    """The same fields under the names that files use, without the leniency of DeepSpeed's constructor."""
    fields = {}
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated"):
            continue
        kind = _strict(field.annotation)
        for mark in field.metadata:
            kind = Annotated[kind, mark]
        fields[field.alias or name] = (kind, None)
        if field.alias:
            # DeepSpeed takes both names
            fields[name] = (kind, None)
    return _model(model.__name__, fields)


def _strict(kind: Any) -> Any:
    """A kind whose parts that are DeepSpeed's models are mirrored, and whose choices are given by value."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return _mirrored(kind)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        values = [member.value for member in kind]
        if all(isinstance(value, int) for value in values):
            # a Literal would take true for 1
            return Annotated[int, Field(ge=min(values), le=max(values))]
        return Literal[tuple(values)]
    if get_origin(kind) in (Union, types.UnionType):
        return Union[tuple(_strict(part) for part in get_args(kind))]  # noqa: UP007 - built from parts
    if kind in (bool, int, float, str, type(None)) or get_origin(kind) in (list, dict):
        return kind
    return str if getattr(kind, "__name__", "") == "Path" else Any


def _whole_numbers(value: Any) -> Any:
    """5e8 is how DeepSpeed's own examples write an integer."""
    if isinstance(value, dict):
        return {key: _whole_numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _described(failure: ValidationError, values: dict[str, Any]) -> str:
    """Place, value, what is wrong, and what would do."""
    found = failure.errors(include_url=False)[0]
    kept, value = [], values
    for part in found["loc"]:
        # pydantic also names the member of a union that it tried
        if not isinstance(value, dict) or part not in value:
            continue
        kept.append(part)
        value = value[part]
    name = ".".join(kept)
    if found["type"] == "extra_forbidden":
        near = nearest(kept[-1], _known(kept[:-1]))
        return f"{name}: DeepSpeed knows no such key; " + (f"did you mean {near}?" if near else "take it out")
    shown = json.dumps(value)[:60]
    if value == "auto":
        return (
            f'{name} "auto": nothing fills it in here; write the value, or leave the key out for DeepSpeed\'s default'
        )
    example = " (true or false, without quotes)" if found["type"].startswith("bool") else ""
    return f"{name} {shown}: {found['msg']}{example}; see ds_configs/zero1.json"


def _known(place: list[str]) -> list[str]:
    """Keys of the section at a place."""
    model: Any = _schema()
    for part in place:
        kinds = [model.model_fields[part].annotation]
        while not any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds):
            kinds = [inner for kind in kinds for inner in get_args(kind)]
            if not kinds:
                return []
        model = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)
