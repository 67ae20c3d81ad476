"""Tensors of a `.pt` file: a dict as torch.save writes it, read without running anything that it holds."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_adamba.checkpoint.shards import TensorInfo
from megatron_adamba.errors import CheckpointError
from megatron_adamba.surgery.sources import Entry

COMPILED_PREFIX = "_orig_mod."
"""in front of every name of a model that was saved from within torch.compile"""


class TorchFile:
    """A dict of tensors under their names without COMPILED_PREFIX, memory-mapped.

    Raises CheckpointError for a file that is missing, damaged, or holds anything else than tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self._keys: dict[str, str] = {}
        for key, tensor in _load(path).items():
            if not isinstance(key, str):
                shown = repr(key)[:80]
                raise CheckpointError(f"{path}: holds something under {shown}; must be a dict of tensors by name")
            name = key.removeprefix(COMPILED_PREFIX)
            if name in self._keys:
                raise CheckpointError(f"{path}: holds both {self._keys[name]} and {key}; one of them is too many")
            _check_plain(path, key, tensor)
            self.entries[name] = Entry(path, TensorInfo(tuple(tensor.shape), tensor.dtype))
            self._keys[name] = key

    def read(self, name: str) -> Tensor:
        # loaded anew for every tensor: a mapping that stays open keeps every page that was read from it
        return _load(self.path)[self._keys[name]].detach()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 of the leading axis; no more is read."""
        return self.read(name)[start:stop]


def _load(path: Path) -> dict[Any, Any]:
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: damaged, or not written by torch.save (is no regular file)")
    try:
        with warnings.catch_warnings():
            # of archives of programs, which are refused right behind it
            warnings.simplefilter("ignore")
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give the folder of a checkpoint") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = found[1] if found else "an instruction"
        raise CheckpointError(
            f"{path}: holds {what} beside tensors, which could run code; nothing was run; save the plain state dict"
        ) from None
    except Exception as error:  # the bytes of a damaged pickle may lead anywhere
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{path}: damaged, or not written by torch.save ({first})") from None
    if not isinstance(held, dict):
        raise CheckpointError(f"{path}: holds a {type(held).__name__}; must be a dict of tensors by name")
    return held


def _check_plain(path: Path, key: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{path}: {key} is a {type(value).__name__}; must be a tensor")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise CheckpointError(f"{path}: {key} is no plain tensor ({value.layout}, on {value.device}); save it as one")
    # one value may stand for any number of them: a small file would fill the memory
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        shape, held = list(value.shape), value.untyped_storage().nbytes()
        raise CheckpointError(
            f"{path}: tensor {key} of shape {shape} repeats itself, as {held:,} bytes hold it; save it as contiguous"
        )
