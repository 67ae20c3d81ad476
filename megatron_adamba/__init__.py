"""Elastic hybrid language models: train one, get a family.

`import megatron_adamba as adamba`, then `adamba.load("RUN/model").generate("...")`. The names below are the public API;
each is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_adamba.api import operations as operations
    from megatron_adamba.api.datasets import Dataset as Dataset
    from megatron_adamba.api.datasets import load_tokenizer as load_tokenizer
    from megatron_adamba.api.datasets import open_dataset as open_dataset
    from megatron_adamba.api.datasets import train_tokenizer as train_tokenizer
    from megatron_adamba.api.datasets import write_dataset as write_dataset
    from megatron_adamba.api.model import Model as Model
    from megatron_adamba.api.model import Score as Score
    from megatron_adamba.api.model import Token as Token
    from megatron_adamba.api.model import load as load
    from megatron_adamba.api.training import Config as Config
    from megatron_adamba.api.training import TrainedRun as TrainedRun
    from megatron_adamba.api.training import make_config as make_config
    from megatron_adamba.api.training import train as train
    from megatron_adamba.errors import AdambaError as AdambaError

__version__ = "0.2.0"
_HOMES = {
    "AdambaError": "megatron_adamba.errors",
    "Config": "megatron_adamba.api.training",
    "Dataset": "megatron_adamba.api.datasets",
    "Model": "megatron_adamba.api.model",
    "Score": "megatron_adamba.api.model",
    "Token": "megatron_adamba.api.model",
    "TrainedRun": "megatron_adamba.api.training",
    "load": "megatron_adamba.api.model",
    "load_tokenizer": "megatron_adamba.api.datasets",
    "make_config": "megatron_adamba.api.training",
    "open_dataset": "megatron_adamba.api.datasets",
    "train": "megatron_adamba.api.training",
    "train_tokenizer": "megatron_adamba.api.datasets",
    "write_dataset": "megatron_adamba.api.datasets",
}
__all__ = ["__version__", "operations", *_HOMES]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for: the commands' `--help` waits for no torch."""
    if name == "operations":
        return importlib.import_module("megatron_adamba.api.operations")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *globals()])
