"""Checkpoints read by code of the tests' own, changed and damaged."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from training.runs import ROOT

from megatron_adamba.blueprint.manifest import ParamSpec, manifest
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.checkpoint.canonical import write_canonical
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.root import model_config_from_dict

TOOL = ROOT / "tools" / "checkpoint.py"
SIZES = {"model__mamba_num_groups": 2, "train__steps": 10}
FP32 = ["--deepspeed_config", str(ROOT / "ds_configs" / "zero1_fp32.json")]
INDEX = "model.safetensors.index.json"
GAIN, BIG = "blocks.0.mlp_norm.gain", "blocks.1.mixer.in_proj.weight"
Call = Callable[..., tuple[int, str, str]]
"""call(words...): exit code, stdout and stderr"""


def model_of(folder: Path) -> ModelConfig:
    """Of a canonical folder."""
    return resolve_model(model_config_from_dict(config_of(folder)["model"], "test"))


def specs_of(folder: Path) -> tuple[ParamSpec, ...]:
    return manifest(model_of(folder))


def refused(result: tuple[int, str, str], code: int, *fragments: object) -> None:
    got, out, err = result
    assert (got, out) == (code, ""), result
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for fragment in fragments:
        assert str(fragment) in err, err


def reassemble(folder: Path) -> dict[str, Tensor]:
    """All tensors of a training checkpoint from `metadata.json` and the bytes it points to, every element once."""
    whole = {}
    for name, entry in json.loads((folder / "metadata.json").read_text())["tensors"].items():
        tensor = torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"].removeprefix("torch.")))
        times = torch.zeros(entry["shape"], dtype=torch.int64)
        for chunk in entry["chunks"]:
            content = (folder / chunk["file"]).read_bytes()[chunk["start"] : chunk["start"] + chunk["length"]]
            part = torch.load(io.BytesIO(content), weights_only=True)
            assert list(part.shape) == chunk["size"] and part.dtype == tensor.dtype
            box = tuple(slice(low, low + size) for low, size in zip(chunk["offset"], chunk["size"]))
            tensor[box] = part
            times[box] += 1
        assert bool((times == 1).all()), name
        whole[name] = tensor
    return whole


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Of a canonical folder, through its index, by safetensors' own reader."""
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    held = {name: tensor for shard in set(places.values()) for name, tensor in load_file(folder / shard).items()}
    assert set(held) == set(places)
    return held


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and tensor.shape == second[name].shape, name
        bits = lambda t: t.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(bits(tensor), bits(second[name])), name


def only_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("weight/"): t for name, t in tensors.items() if name.startswith("weight/")}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def seal(folder: Path) -> None:
    """Make files.json agree with the files again, as a forger would."""
    marks = {}
    for path in sorted(folder.iterdir()):
        if path.name != "files.json":
            content = path.read_bytes()
            marks[path.name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    (folder / "files.json").write_text(json.dumps(marks))


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def save_as(source: Path, target: Path, change: Callable[[str, Tensor], Tensor | None]) -> Path:
    """A copy of a canonical checkpoint with other values; a tensor that becomes None is left out."""
    changed = ((name, change(name, tensor)) for name, tensor in sorted(weights_of(source).items()))
    write_canonical(target, config_of(source), [(n, t) for n, t in changed if t is not None], max_shard_bytes=40_000)
    return target


def spoil_value(name: str, place: tuple[int, ...], value: float) -> Callable[[str, Tensor], Tensor]:
    def change(here: str, tensor: Tensor) -> Tensor:
        if here == name:
            tensor[place] = value
        return tensor

    return change
