"""The whole configuration of a run."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Required

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from megatron_adamba.config.distill import DistillConfig
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.sections import (
    CheckpointConfig,
    DataConfig,
    ElasticConfig,
    GatesConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from megatron_adamba.errors import ConfigError
from megatron_adamba.schema import JsonObject, check_value, read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer.tiktoken")
"""names under which a checkpoint carries its tokenizer, where config.json names no other"""
TOKENIZER_NOTE = ".meta.json"
"""behind the name of a tokenizer file: what lies beside it and says what the file itself cannot"""


@dataclass
class AdambaConfig:
    """All sections; `--SECTION.FIELD VALUE` sets one of them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    gates: GatesConfig = field(default_factory=GatesConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def check(self) -> None:
        """Rules within sections. Raises ConfigError."""
        for section in dataclasses.fields(self):
            check = getattr(getattr(self, section.name), "check", None)
            if check is not None:
                check()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@with_config(ConfigDict(extra="allow"))
class StoredData(TypedDict, total=False):
    """The data section of a checkpoint's config.json, as far as others than the run look at it."""

    tokenizer: str | None


@with_config(ConfigDict(extra="allow"))
class StoredConfig(TypedDict, total=False):
    """`config.json` of a checkpoint: the sections of the run, the model's among them."""

    model: Required[JsonObject]
    data: StoredData
    train: JsonObject
    gates: JsonObject
    elastic: JsonObject
    tokenizer_hash: str | None
    run_id: str


def model_config_from_dict(values: dict[str, Any], source: str) -> ModelConfig:
    """A ModelConfig from a checkpoint's `config.json`. Raises ConfigError naming what is unknown or of another type."""
    known = {entry.name for entry in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            f"{source}: unknown model setting {unknown[0]}; this version knows {', '.join(sorted(known))}"
        )
    config = check_value(values, ModelConfig, source, ConfigError, "restore the file", "the model section")
    config.check()
    return config


def read_run_config(folder: str | Path) -> StoredConfig:
    """`FOLDER/config.json`, which has a model section. Raises ConfigError."""
    path = Path(folder) / "config.json"
    try:
        values = read_json(path, Any, ConfigError, "")
    except ConfigError as error:
        why = str(error).removeprefix(f"{path}: ").rstrip("; ")
        raise ConfigError(f"{path}: cannot be read as JSON ({why}); give a folder that holds a checkpoint") from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise ConfigError(f"{path}: has no `model` section; give a folder that holds a canonical checkpoint")
    return check_value(values, StoredConfig, str(path), ConfigError, "restore the file")


def read_model_config(folder: str | Path) -> ModelConfig:
    """The model section of `FOLDER/config.json`."""
    return model_config_from_dict(read_run_config(folder)["model"], str(Path(folder) / "config.json"))


def find_tokenizer(folder: Path) -> str | None:
    """What `--data.tokenizer` would be for the canonical checkpoint in a folder: a file beside the weights, the one
    that config.json names or one of the usual names; else what config.json says; None where it says nothing.

    Raises ConfigError where config.json cannot be read.
    """
    values = read_run_config(folder)
    named = values.get("data", {}).get("tokenizer")
    names = [*([] if named is None else [Path(named.removeprefix("tiktoken:")).name]), *TOKENIZER_FILES]
    return next((str(folder / name) for name in names if os.path.isfile(folder / name)), named)
