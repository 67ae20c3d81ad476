"""All ranks of a job run with the same settings: what differs would train another model on each, or hang."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_adamba.checkpoint.training import from_first_rank, together
from megatron_adamba.config.root import AdambaConfig
from megatron_adamba.errors import ConfigError

_OF_A_MACHINE = ("data.train", "data.validation", "data.tokenizer", "checkpoint.init_from", "logging.run_dir")
"""paths, which may lead to the same files by other names"""


def check_same_settings(config: AdambaConfig) -> None:
    """Every rank calls this alike. Raises ConfigError on all ranks where one was started with other settings."""
    first = from_first_rank(config.to_dict)
    together(lambda: _compare(first, config.to_dict()))


def _compare(first: dict[str, Any], mine: dict[str, Any]) -> None:
    for section, values in mine.items():
        for key, value in values.items():
            name = f"{section}.{key}"
            if name not in _OF_A_MACHINE and value != first[section][key]:
                raise ConfigError(
                    f"--{name}: rank {dist.get_rank()} was started with {value}, rank 0 with {first[section][key]}; "
                    "give all ranks the same command line and the same files"
                )
