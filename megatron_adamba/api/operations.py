"""Operations on checkpoints that keep what the model computes: each reads a folder and makes a new one.

They stream tensor by tensor, so that memory is bounded by the largest tensor. What an operation keeps, it says in what
it returns. Errors: ConfigError for arguments that do not fit, CheckpointError for damaged sources, StorageError for the
disk; nothing is written over, and nothing half-made stays behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_adamba.api.wording import naming_arguments
from megatron_adamba.config.rules import one_of
from megatron_adamba.data.blend import open_dataset
from megatron_adamba.data.packed import evaluation_batches
from megatron_adamba.data.tokenizer import folder_tokenizer
from megatron_adamba.inference.load import load_model
from megatron_adamba.surgery.calibration import Calibration
from megatron_adamba.surgery.compare import Comparison, comparable_plans, compare_models
from megatron_adamba.surgery.expand import Noise
from megatron_adamba.surgery.expand import expand as _expand
from megatron_adamba.surgery.expand_config import Sizes
from megatron_adamba.surgery.export_hf import export_by_blocks
from megatron_adamba.surgery.export_nanochat import export_nanochat
from megatron_adamba.surgery.extract import extract as _extract
from megatron_adamba.surgery.graft import graft as _graft
from megatron_adamba.surgery.import_gpt_oss import import_gpt_oss
from megatron_adamba.surgery.import_hf import import_hugging_face
from megatron_adamba.surgery.import_nanochat import import_nanochat
from megatron_adamba.surgery.importing import TokenizerChoice
from megatron_adamba.surgery.merge_average import merge_average as _merge_average
from megatron_adamba.surgery.nanochat_config import CodeSettings
from megatron_adamba.surgery.nanochat_writing import write_nanochat
from megatron_adamba.surgery.reorder import reorder as _reorder
from megatron_adamba.surgery.writing import Job, check_target, write_job

Folder = str | Path
_SHARD_BYTES = 4 * 10**9
_KINDS = ("hidden", "ffn", "heads", "experts")


@dataclass(frozen=True)
class Made:
    """What an operation made."""

    folder: Path
    num_tensors: int
    num_bytes: int
    promise: str
    """what it keeps of the source's function"""


@naming_arguments
def import_checkpoint(
    source: Folder,
    target: Folder,
    kind: str,
    *,
    widths: Sequence[int] | None = None,
    tokenizer: Folder | None = None,
    step: int | None = None,
) -> Made:
    """A published checkpoint as a canonical one.

    Args:
        kind: gpt-oss (OpenAI's or transformers' folder, bf16, fp32 or MXFP4) | hf (transformers' NanoChat or GptOss) |
            nanochat (its folder of model_NNNNNN.pt).
        widths: of the nest; 1/16, 1/4, 1/2 and all by default.
        tokenizer: to take along; the one in `source` by default.
        step: of nanochat: which of several; the last by default.
    """
    one_of("kind", kind, ("gpt-oss", "hf", "nanochat"))
    choice = TokenizerChoice(None if tokenizer is None else Path(tokenizer), None, None)
    nest = None if widths is None else list(widths)
    if kind == "nanochat":
        return _write(import_nanochat(Path(source), step, CodeSettings(), widths=nest, tokenizer=choice), target)
    made = import_gpt_oss if kind == "gpt-oss" else import_hugging_face
    return _write(made(Path(source), widths=nest, tokenizer=choice), target)


@naming_arguments
def graft(
    source: Folder, target: Folder, pattern: str, *, mamba: Mapping[str, Any] | None = None, seed: int = 1234
) -> Made:
    """New Mamba blocks between the old ones; they add zero, so that the logits stay.

    Args:
        pattern: of all blocks, such as "(TM)x10".
        mamba: sizes of the new blocks: {"mamba_num_heads": 32, "mamba_d_state": 64}.
        seed: of the new weights.
    """
    return _write(_graft(Path(source), pattern, dict(mamba or {}), seed), target)


@naming_arguments
def expand(
    source: Folder,
    target: Folder,
    hidden_size: int,
    *,
    heads: str = "add-heads",
    rank: int = 16,
    std: float = 0.01,
    seed: int = 1234,
    sizes: Mapping[str, int] | None = None,
) -> Made:
    """A wider model that computes what the source does, at the new full width and, with add-heads, at every old one.

    Args:
        heads: add-heads | grow-dim.
        rank: of new weights that read: A @ B.
        std: standard deviation of A.
        seed: of the new weights.
        sizes: num_kv_groups, ffn_size, expert_ffn_size, mamba_num_groups; in proportion by default.
    """
    one_of("heads", heads, ("add-heads", "grow-dim"))
    noise = Noise(rank, std, seed)
    return _write(_expand(Path(source), hidden_size, heads, noise, Sizes(**(sizes or {}))), target)


@naming_arguments
def reorder(
    source: Folder,
    target: Folder,
    data: Folder,
    *,
    tokens: int = 65536,
    seq_len: int = 512,
    batch_size: int = 8,
    orders: Sequence[str] = _KINDS,
) -> Made:
    """The same model with its important channels and units first; an order is kept where narrow widths gain by it.

    Args:
        data: prefix of a dataset of calibration text.
        tokens: of it, from all over.
        orders: kinds to try: hidden, ffn, heads, experts.
    """
    for kind in orders:
        one_of("orders", kind, _KINDS)
    tokenizer = folder_tokenizer(Path(source))
    batches = evaluation_batches(open_dataset(str(data), tokenizer, "data"), seq_len, batch_size, tokenizer.eod_id)
    calibration = Calibration(batches, tokens)
    recorded = {"data": str(data), "tokens": calibration.num_tokens, "seq_len": seq_len}
    return _write(_reorder(Path(source), calibration, recorded, list(orders))[0], target)


@naming_arguments
def extract(
    source: Folder,
    target: Folder,
    *,
    width: int | None = None,
    widths: Sequence[int] | None = None,
    exit_layer: int | None = None,
) -> Made:
    """What runs at one width, or at one for each block up to an exit, as a model of its own."""
    each = None if widths is None else list(widths)
    return _write(_extract(Path(source), width, each, exit_layer), target)


@naming_arguments
def merge_average(sources: Sequence[Folder], target: Folder, *, weights: Sequence[float] | None = None) -> Made:
    """The mean of several checkpoints of one model; weights: one a source, alike by default."""
    return _write(_merge_average([Path(source) for source in sources], weights), target)


@naming_arguments
def export(source: Folder, target: Folder, kind: str = "hf", *, dtype: str | None = None, step: int = 0) -> Made:
    """A canonical checkpoint for other software.

    Args:
        kind: hf (transformers' NanoChat or GptOss, by what the model is) | nanochat.
        dtype: bf16 | fp32 of all tensors; the source's by default.
        step: of nanochat: what it calls itself.
    """
    one_of("kind", kind, ("hf", "nanochat"))
    one_of("dtype", dtype, (None, "bf16", "fp32"))
    kinds = {"bf16": torch.bfloat16, "fp32": torch.float32}
    chosen = None if dtype is None else kinds[dtype]
    if kind == "hf":
        return _write(export_by_blocks(Path(source), chosen), target)
    check_target(Path(target))
    job = export_nanochat(Path(source), step, chosen)
    write_nanochat(job, Path(target), lambda *_: None)
    return Made(Path(target), len(job.tensors), job.num_bytes, job.promise)


@naming_arguments
def compare(
    first: Folder,
    second: Folder,
    data: Folder,
    *,
    tokens: int | None = None,
    seq_len: int = 512,
    width: int | None = None,
    exit_layer: int | None = None,
) -> Comparison:
    """How far logits and losses of two models are apart on real tokens, in fp32.

    Args:
        data: prefix of a dataset.
        tokens: only the first so many.
        width: of the first where the second was extracted from it; of both otherwise.
        exit_layer: likewise.
    """
    folders = (Path(first), Path(second))
    plans = comparable_plans(folders, width, None, exit_layer)
    left, right = (load_model(folder, "fp32") for folder in folders)
    indexed = open_dataset(str(data), left.tokenizer, "data")
    batches = evaluation_batches(indexed, seq_len, 1, left.tokenizer.eod_id, tokens)
    return compare_models((left.model, right.model), plans, batches, left.device)


def _write(job: Job, target: Folder) -> Made:
    check_target(Path(target))
    write_job(job, Path(target), _SHARD_BYTES, lambda *_: None)
    return Made(Path(target), len(job.tensors), job.num_bytes, job.promise)
