"""Training from Python: settings, a run, its metrics as they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_adamba.api.wording import naming_arguments, reworded
from megatron_adamba.config.cli import ParsedArguments, parse_arguments
from megatron_adamba.config.root import AdambaConfig
from megatron_adamba.errors import AdambaError
from megatron_adamba.evaluation.widths import EvaluationRow

Config = AdambaConfig
Metrics = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """What a run left behind."""

    folder: Path
    """metrics.jsonl, checkpoints, logs"""
    model: Path
    """canonical folder, for `load`"""
    evaluation: list[EvaluationRow]
    """the last one, a row for each width and exit; empty without validation data"""


@naming_arguments
def make_config(
    preset: str | None = None, settings: Mapping[str, Any] | None = None, *, file: str | Path | None = None
) -> Config:
    """Settings of a run, checked: later wins of defaults, preset, file and settings.

    Args:
        preset: such as tiny-hybrid; `adamba train --help` lists them.
        settings: by dotted name, as flags of `adamba train`: {"model.hidden_size": 64, "train.steps": 20}.
        file: YAML with the same sections as the presets.

    Raises ConfigError for a name that is not known, with the nearest, and for a value that cannot be.
    """
    words = [] if preset is None else ["--preset", preset]
    words += [] if file is None else ["--config", str(file)]
    for name, value in (settings or {}).items():
        words.append(f"--{name}={_as_word(value)}")
    return parse_arguments(words).config


def train(
    config: Config,
    *,
    on_metrics: Metrics | None = None,
    deepspeed_config: str | Path | None = None,
    quiet: bool = True,
) -> TrainedRun:
    """Trains in this process, to the last step; under a launcher, as this process's rank.

    Args:
        config: of `make_config`.
        on_metrics: is called on rank 0 with each record of metrics.jsonl: losses, rates, evaluations.
        deepspeed_config: what DeepSpeed owns: a JSON file, or a shipped one by name (zero2).
        quiet: shows no progress.

    Raises AdambaError: of settings, data, checkpoints, the disk, values that are not finite, a signal.
    """
    # DeepSpeed takes seconds to import
    from megatron_adamba.training.job import run_job
    from megatron_adamba.training.progress import RunConsole

    sources = {
        f"{section.name}.{entry.name}": "argument"
        for section in dataclasses.fields(config)
        for entry in dataclasses.fields(getattr(config, section.name))
    }
    named = None if deepspeed_config is None else str(deepspeed_config)
    parsed = ParsedArguments(config, sources, named)
    failures: list[AdambaError] = []
    try:
        config.check()
        done = run_job(parsed, RunConsole(quiet=quiet), lambda error, _: failures.append(error), on_metrics, stay=True)
    except AdambaError as error:
        raise reworded(error) from None
    if done is None:
        raise reworded(failures[0]) from None
    return TrainedRun(done.folder, done.folder / "model", done.rows)


def _as_word(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("\n").removesuffix("\n...")
