"""GPT-OSS checkpoints (OpenAI's and transformers', bf16, fp32 and MXFP4) as canonical ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_adamba.blueprint.manifest import ParamSpec, manifest
from megatron_adamba.checkpoint.history import extended_history
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.errors import CheckpointError
from megatron_adamba.surgery.end_tokens import published_end_tokens
from megatron_adamba.surgery.gpt_oss import LAYOUTS, Layout, Place, fused_rows, source_shape
from megatron_adamba.surgery.gpt_oss_config import OPENAI, read_gpt_oss_config
from megatron_adamba.surgery.importing import (
    TokenizerChoice,
    as_choice,
    import_tokenizer,
    new_gain,
    tied_head,
    with_nest,
)
from megatron_adamba.surgery.mxfp4 import BLOCK_VALUES, dequantize
from megatron_adamba.surgery.sources import DTYPE_NAMES, TensorFolder, read_settings
from megatron_adamba.surgery.writing import Job, PlannedTensor

PROMISE = "the logits at full width are the source's; gains are new and one"


def import_gpt_oss(
    source: Path, widths: Sequence[int] | None = None, tokenizer: Path | TokenizerChoice | None = None
) -> Job:
    """Check a GPT-OSS folder from headers alone and plan its canonical checkpoint.

    widths: of the nest; None takes 1/16, 1/4, 1/2 and all of the hidden size where these are whole numbers, else
    all of it. tokenizer: file to take along; None takes the source's own where there is one.
    Raises CheckpointError, ConfigError (widths), TokenizerError.
    """
    config_path = source / "config.json"
    tensors = TensorFolder(source)
    told = read_settings(config_path)
    layout_name, config = read_gpt_oss_config(config_path, told)
    config = with_nest(config, config_path, widths)
    plan = _Importer(tensors, LAYOUTS[layout_name], config).plan()
    folders = _folders(source, layout_name)
    found = import_tokenizer(folders, as_choice(tokenizer), config.vocab_size, "o200k_harmony")
    config = replace(config, end_tokens=published_end_tokens(folders[-1], told, config.vocab_size, found.id_of))
    values = {"model": asdict(config), **found.settings}
    arguments = {"widths": config.widths, "tokenizer": found.name}
    history = extended_history(source, "import gpt-oss", arguments, layout_name)
    return Job(plan, values, history, PROMISE, contents=found.contents, note=found.note)


def _folders(source: Path, layout: str) -> list[Path]:
    """Where the source's text files are: a release keeps those of its `original` folder beside that."""
    return [source, source.parent] if layout == OPENAI and source.name == "original" else [source]


@dataclass
class _Importer:
    source: TensorFolder
    layout: Layout
    config: ResolvedModel

    def plan(self) -> tuple[PlannedTensor, ...]:
        """Every canonical tensor; every tensor of the source is used, or the first that is not is named."""
        places = self.layout.ends
        used: set[str] = set()
        if self.config.tie_embeddings:
            used = tied_head(self.source, self.source.folder, places["head.weight"], places["embedding.weight"])
        planned = []
        for spec in manifest(self.config):
            if spec.group == "gain":
                planned.append(new_gain(spec))
                continue
            place = self.layout.place(spec.name)
            planned.append((self._expert_matrix if place.expert_matrix else self._plain)(spec, place, used))
        if extra := sorted(set(self.source.entries) - used):
            more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
            raise CheckpointError(f"{self.source.folder}: tensor {extra[0]}{more} has no place in a GPT-OSS model")
        return tuple(planned)

    def _claim(self, name: str, shape: tuple[int, ...], used: set[str], dtypes: tuple[torch.dtype, ...]) -> torch.dtype:
        """Check the tensor and mark it as used; returns its dtype."""
        entry = self.source.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.source.folder}: has no tensor {name}")
        found = entry.info
        if found.dtype not in dtypes:
            wanted = " or ".join(DTYPE_NAMES[dtype] for dtype in dtypes)
            raise CheckpointError(f"{entry.path}: {name} is {DTYPE_NAMES[found.dtype]}, must be {wanted}")
        if found.shape != shape:
            raise CheckpointError(f"{entry.path}: {name} has shape {found.shape}, config.json makes it {shape}")
        used.add(name)
        return found.dtype

    def _plain(self, spec: ParamSpec, place: Place, used: set[str]) -> PlannedTensor:
        shape = source_shape(self.config, spec, place, transposed=False)
        dtype = self._claim(place.name, shape, used, (torch.bfloat16, torch.float32))
        origin = _origin(place, place.name)
        make: Callable[[], Tensor] = partial(self.source.read, place.name)
        if place.part in ("q", "k", "v"):
            first, stop = fused_rows(self.config, place.part)
            origin = f"{place.name}, rows {first} to {stop - 1}"
            make = partial(self.source.rows, place.name, first, stop)
        elif place.part in ("gate", "up"):
            make = lambda: self.source.read(place.name)[:, _rows(place)]
        return PlannedTensor(spec.name, spec.shape, dtype, origin, make)

    def _expert_matrix(self, spec: ParamSpec, place: Place, used: set[str]) -> PlannedTensor:
        """What the tensor is, its dtype says: names ending in `_blocks` were given to bf16 tensors too."""
        packed, scales = place.name + self.layout.blocks_suffix, place.name + self.layout.scales_suffix
        held = [name for name in (place.name, packed) if name in self.source.entries]
        if len(held) > 1:
            raise CheckpointError(f"{self.source.folder}: holds both {held[0]} and {held[1]}; one of them is too many")
        name = held[0] if held else place.name
        if name == packed and self.source.entries[name].info.dtype == torch.uint8:
            return self._packed_matrix(spec, place, packed, scales, used)
        transposed = self.layout.transposed
        shape = source_shape(self.config, spec, place, transposed)
        dtype = self._claim(name, shape, used, (torch.bfloat16, torch.float32))
        origin = _origin(place, name) + (", transposed" if transposed else "")
        read = partial(self._expert, name, _rows(place), transposed)
        return PlannedTensor(spec.name, spec.shape, dtype, origin, partial(_all_experts, spec.shape, dtype, read))

    def _packed_matrix(self, spec: ParamSpec, place: Place, packed: str, scales: str, used: set[str]) -> PlannedTensor:
        experts, rows, inputs = source_shape(self.config, spec, place, transposed=False)
        if inputs % BLOCK_VALUES:
            raise CheckpointError(f"{self.source.folder}: {packed} is MXFP4, but {inputs} inputs are no multiple of 32")
        shape = (experts, rows, inputs // BLOCK_VALUES)
        self._claim(packed, (*shape, BLOCK_VALUES // 2), used, (torch.uint8,))
        self._claim(scales, shape, used, (torch.uint8,))
        read = partial(self._dequantized_expert, packed, scales, _rows(place))
        make = partial(_all_experts, spec.shape, torch.bfloat16, read)
        return PlannedTensor(spec.name, spec.shape, torch.bfloat16, _origin(place, packed) + ", MXFP4", make)

    def _expert(self, name: str, rows: slice, transposed: bool, expert: int) -> Tensor:
        matrix = self.source.rows(name, expert, expert + 1)[0]
        return (matrix.T if transposed else matrix)[rows]

    def _dequantized_expert(self, packed: str, scales: str, rows: slice, expert: int) -> Tensor:
        values, powers = (self.source.rows(name, expert, expert + 1)[0, rows] for name in (packed, scales))
        return dequantize(values, powers, torch.bfloat16, f"{self.source.folder}: {scales}")


def _all_experts(shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[int], Tensor]) -> Tensor:
    out = torch.empty(shape, dtype=dtype)
    for expert in range(shape[0]):
        out[expert] = read(expert)
    return out


def _rows(place: Place) -> slice:
    """Of an expert's outputs: gate and up take turns."""
    return {"all": slice(None), "gate": slice(0, None, 2), "up": slice(1, None, 2)}[place.part]


def _origin(place: Place, name: str) -> str:
    return name if place.part == "all" else f"{name}, {'odd' if place.part == 'up' else 'even'} rows"
