"""TensorBoard and Weights & Biases: every number of a run under a tag of its own, its config and layout as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from megatron_adamba.config.root import AdambaConfig
from megatron_adamba.config.sections import OptimizerConfig
from megatron_adamba.errors import ConfigError

_TAGS = {
    "loss": "train/loss",
    "loss_full": "train/loss_full_width",
    "grad_norm": "train/gradient_norm",
    "skipped": "train/skipped_steps",
    "gate_error": "gates/gate_error",
    "expansion_error": "gates/expansion_error",
    "predictor_error": "gates/predictor_error",
    "tokens": "speed/tokens",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "seconds": "speed/seconds_per_step",
}
_EVALUATED = {"eval_nats_per_token": "held_out_nats_per_token", "eval_bits_per_byte": "held_out_bits_per_byte"}
_RATES = ("lr", "embedding_lr", "head_lr", "vector_lr", "muon_lr")


def tagged(record: dict[str, Any], optimizer: OptimizerConfig) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by tag: those of an evaluation under their width or exit."""
    for key in ("eval_width", "eval_exit"):
        if key in record:
            place = f"{key.removeprefix('eval_')}_{record[key]}"
            named = {f"{tag}/{place}": record.get(name) for name, tag in _EVALUATED.items()}
            return {tag: value for tag, value in named.items() if value is not None}
    found = {tag: record.get(name) for name, tag in _TAGS.items()}
    if (peak := record.get("peak_memory_bytes")) is not None:
        found["memory/peak_gib"] = peak / 2**30
    if (factor := record.get("lr_factor")) is not None:
        found |= {f"learning_rate/{name}": _times(factor, getattr(optimizer, name)) for name in _RATES}
    for block, shares in (record.get("expert_load") or {}).items():
        found[f"experts/largest_load_block_{block}"] = max(shares)
    return {tag: float(value) for tag, value in found.items() if value is not None}


def _times(factor: float, rate: float | None) -> float | None:
    return None if rate is None else factor * rate


class Dashboard(Protocol):
    """Where tagged numbers go beside metrics.jsonl. Raises OSError where they cannot be written."""

    def write(self, step: int, numbers: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard; charts that hold all widths, and all exits, are under Custom Scalars."""

    def __init__(self, config: AdambaConfig, run_dir: Path, first_step: int, description: Sequence[str]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what a run wrote behind the step that it goes on from is taken back
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        charts = {}
        for tag in _EVALUATED.values():
            charts[f"{tag}, all widths"] = ["Multiline", [f"{tag}/width_.*"]]
            charts[f"{tag}, all exits"] = ["Multiline", [f"{tag}/exit_.*"]]
        self._writer.add_custom_scalars({"held out": charts})
        for name, text in _texts(config, description).items():
            # four spaces make it a block that keeps its lines
            self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), first_step)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for tag, value in numbers.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run with our own run's id, so that a run that is resumed goes on in the same one."""

    def __init__(self, config: AdambaConfig, run_dir: Path, run_id: str, description: Sequence[str]) -> None:
        """Raises ConfigError where wandb is not installed."""
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "--logging.wandb_project: wandb is not installed; pip install wandb, or leave it out"
            ) from None
        self._run = wandb.init(
            project=config.logging.wandb_project,
            id=run_id,
            resume="allow",
            name=run_dir.name,
            dir=str(run_dir),
            config=config.to_dict(),
            notes="\n".join(description),
        )

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


def _texts(config: AdambaConfig, description: Sequence[str]) -> dict[str, str]:
    return {
        "config": yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True),
        "layout": "\n".join(description),
    }
