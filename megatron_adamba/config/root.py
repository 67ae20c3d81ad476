"""The whole configuration of a run."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_adamba.config.model import ModelConfig, NestRow
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

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer.tiktoken")
"""names under which a checkpoint carries its tokenizer, where config.json names no other"""
TOKENIZER_NOTE = ".meta.json"
"""behind the name of a tokenizer file: what lies beside it and says what the file itself cannot"""


@dataclass
class AdambaConfig:
    """All sections; `--SECTION.FIELD VALUE` sets one of them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)
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


def model_config_from_dict(values: dict[str, Any], source: str) -> ModelConfig:
    """A ModelConfig from a checkpoint's `config.json`. Raises ConfigError naming what is unknown or missing."""
    known = {entry.name for entry in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            f"{source}: unknown model setting {unknown[0]}; this version knows {', '.join(sorted(known))}"
        )
    values = dict(values)
    try:
        if values.get("nest") is not None:
            values["nest"] = [NestRow(**row) for row in values["nest"]]
        config = ModelConfig(**values)
        config.check()
    except TypeError as error:
        raise ConfigError(f"{source}: the model section is damaged ({error}); restore the file") from None
    return config


def read_run_config(folder: str | Path) -> dict[str, Any]:
    """`FOLDER/config.json`, which has a model section. Raises ConfigError."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); give a folder that holds a checkpoint") from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise ConfigError(f"{path}: has no `model` section; give a folder that holds a canonical checkpoint")
    return values


def read_model_config(folder: str | Path) -> ModelConfig:
    """The model section of `FOLDER/config.json`."""
    return model_config_from_dict(read_run_config(folder)["model"], str(Path(folder) / "config.json"))


def find_tokenizer(folder: Path) -> str | None:
    """What `--data.tokenizer` would be for the canonical checkpoint in a folder: a file beside the weights, the one
    that config.json names or one of the usual names; else what config.json says; None where it says nothing.

    Raises ConfigError where config.json cannot be read.
    """
    values = read_run_config(folder)
    data = values.get("data")
    named = data.get("tokenizer") if isinstance(data, dict) else None
    named = named if isinstance(named, str) else None
    names = [*([] if named is None else [Path(named.removeprefix("tiktoken:")).name]), *TOKENIZER_FILES]
    return next((str(folder / name) for name in names if os.path.isfile(folder / name)), named)
