"""nanochat checkpoints, its own .pt files and transformers' folders, as canonical ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_adamba.blueprint.manifest import ParamSpec, manifest
from megatron_adamba.checkpoint.history import extended_history
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.data.rank_encodings import NANOCHAT
from megatron_adamba.errors import CheckpointError, ConfigError
from megatron_adamba.surgery.end_tokens import named_end_tokens, published_end_tokens
from megatron_adamba.surgery.importing import (
    Claims,
    ImportedTokenizer,
    Source,
    TokenizerChoice,
    as_choice,
    import_tokenizer,
    new_gain,
    tied_head,
    with_nest,
)
from megatron_adamba.surgery.nanochat import OWN, TRANSFORMERS, Layout
from megatron_adamba.surgery.nanochat_config import CodeSettings, read_metadata, read_transformers_config
from megatron_adamba.surgery.nanochat_extras import idle_extras
from megatron_adamba.surgery.sources import TensorFolder, read_settings
from megatron_adamba.surgery.torch_file import TorchFile
from megatron_adamba.surgery.writing import Job, PlannedTensor

PROMISE = "the logits at full width are the source's; gains are new and one"


def import_nanochat(
    source: Path,
    step: int | None = None,
    code: CodeSettings | None = None,
    widths: Sequence[int] | None = None,
    tokenizer: Path | TokenizerChoice | None = None,
) -> Job:
    """Check a folder of model_NNNNNN.pt and meta_NNNNNN.json and plan its canonical checkpoint.

    step: None takes the last; code: what the files do not say; widths, tokenizer: as in `import_gpt_oss`.
    Raises CheckpointError, ConfigError (flags), TokenizerError.
    """
    path, metadata = find_step(source, step)
    values = read_settings(metadata)
    file = TorchFile(path)
    idle = idle_extras(file)
    config = read_metadata(metadata, values, code or CodeSettings(), min(idle, default=None))
    config = with_nest(config, metadata, widths)
    claims = Claims(file, path, metadata.name, idle)
    plan = _plan(file, claims, OWN, config)
    promise = PROMISE
    if padding := file.entries[OWN.place("embedding.weight")].info.shape[0] - config.vocab_size:
        promise += f"; {padding} padding rows of the vocabulary are left out"
    arguments: dict[str, Any] = {"step": int(re.sub(r"\D", "", path.stem)), "rope_base": config.rope_theta}
    arguments |= {"softcap": config.logit_softcap, "window": config.sliding_window and config.sliding_window - 1}
    found = import_tokenizer([source], as_choice(tokenizer), config.vocab_size, NANOCHAT)
    # at these its own code ends a turn
    config = replace(config, end_tokens=named_end_tokens(found.id_of, ("<|assistant_end|>", "<|bos|>")))
    return _job(source, "import nanochat", plan, config, promise, arguments, OWN, found)


def import_hugging_face_nanochat(
    source: Path, widths: Sequence[int] | None = None, tokenizer: Path | TokenizerChoice | None = None
) -> Job:
    """Check a folder of transformers' NanoChatForCausalLM and plan its canonical checkpoint. Raises as above."""
    config_path = source / "config.json"
    folder = TensorFolder(source)
    values = read_settings(config_path)
    config = with_nest(read_transformers_config(config_path, values), config_path, widths)
    found = import_tokenizer([source], as_choice(tokenizer), config.vocab_size, NANOCHAT)
    config = replace(config, end_tokens=published_end_tokens(source, values, config.vocab_size, found.id_of))
    places = TRANSFORMERS.ends
    copied = set()
    if config.tie_embeddings:
        copied = tied_head(folder, source, places["head.weight"], places["embedding.weight"])
    plan = _plan(folder, Claims(folder, source, "config.json", copied), TRANSFORMERS, config)
    return _job(source, "import hf", plan, config, PROMISE, {}, TRANSFORMERS, found)


def find_step(folder: Path, step: int | None) -> tuple[Path, Path]:
    """Weights and metadata of a step, None being the last. Raises CheckpointError, ConfigError (step)."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give one that holds model_NNNNNN.pt")
    found = ((path, re.fullmatch(r"model_(\d+)\.pt", path.name)) for path in sorted(folder.iterdir()))
    steps = {int(name[1]): path for path, name in found if name}
    if not steps:
        raise CheckpointError(f"{folder}: holds no model_NNNNNN.pt; give the folder of a nanochat checkpoint")
    if step is None:
        step = max(steps)
    if step not in steps:
        raise ConfigError(
            f"--step {step}: {folder} holds {', '.join(map(str, sorted(steps)))}; try --step {max(steps)}"
        )
    digits = steps[step].stem.removeprefix("model_")
    return steps[step], folder / f"meta_{digits}.json"


def _job(
    source: Path,
    operation: str,
    plan: tuple[PlannedTensor, ...],
    config: ResolvedModel,
    promise: str,
    arguments: dict[str, Any],
    layout: Layout,
    found: ImportedTokenizer,
) -> Job:
    values = {"model": asdict(config), **found.settings}
    arguments |= {"widths": config.widths, "tokenizer": found.name}
    history = extended_history(source, operation, arguments, layout.title)
    return Job(plan, values, history, promise, contents=found.contents, note=found.note)


def _plan(source: Source, claims: Claims, layout: Layout, config: ResolvedModel) -> tuple[PlannedTensor, ...]:
    """Every canonical tensor; every tensor of the source is used, or the first that is not is named."""
    planned = tuple(
        new_gain(spec) if spec.group == "gain" else _tensor(source, claims, layout, spec) for spec in manifest(config)
    )
    claims.finish("nanochat")
    return planned


def _tensor(source: Source, claims: Claims, layout: Layout, spec: ParamSpec) -> PlannedTensor:
    name, padded = layout.place(spec.name), layout.padded_vocabulary and spec.kind == "table"

    def fits(shape: tuple[int, ...]) -> bool:
        if padded and len(shape) == 2:
            return shape[0] >= spec.shape[0] and shape[1] == spec.shape[1]
        return shape == spec.shape

    info = claims.take(name, fits, spec.shape).info
    if info.shape == spec.shape:
        return PlannedTensor(spec.name, spec.shape, info.dtype, name, partial(source.read, name))
    origin = f"{name}, rows 0 to {spec.shape[0] - 1} of {info.shape[0]}"
    return PlannedTensor(spec.name, spec.shape, info.dtype, origin, partial(source.rows, name, 0, spec.shape[0]))
