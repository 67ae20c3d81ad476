"""Where numbers go: metrics.jsonl, TensorBoard, and W&B if asked; rank 0 only."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_adamba.config.root import AdambaConfig
from megatron_adamba.errors import ConfigError


class MetricsWriter:
    """One JSON object a line, flushed at once; a resumed run drops lines from steps that will be taken again."""

    def __init__(self, config: AdambaConfig, run_dir: Path, first_step: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        _truncate(self.path, first_step, first_step >= config.train.steps)
        self._file = open(self.path, "a")  # noqa: SIM115 - lives as long as the run
        self._board = _tensorboard(run_dir, first_step) if config.logging.tensorboard else None
        self._wandb = _wandb(config, run_dir) if config.logging.wandb_project else None

    def write(self, record: dict[str, Any]) -> None:
        """record: has `step`; values that are not finite become null, as JSON has no word for them."""
        clean = {key: _finite(value) for key, value in record.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        numbers = {key: value for key, value in clean.items() if isinstance(value, (int, float)) and key != "step"}
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _truncate(path: Path, first_step: int, final: bool) -> None:
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record.get("step", 0) <= first_step] if first_step else []
    if final:
        # a finished run that is started again evaluates its last step once more
        of_it = lambda record: (
            record["step"] == first_step and not record.keys().isdisjoint(("eval_width", "eval_exit"))
        )
        kept = [record for record in kept if not of_it(record)]
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(record) + "\n" for record in kept))
    aside.replace(path)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard(run_dir: Path, first_step: int):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)


def _wandb(config: AdambaConfig, run_dir: Path):
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            "--logging.wandb_project: wandb is not installed; pip install wandb, or leave it out"
        ) from None
    return wandb.init(project=config.logging.wandb_project, dir=str(run_dir), config=config.to_dict(), resume="allow")
