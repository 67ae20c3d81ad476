"""Fixed widths, fixed exits and the model's own choices on the same tokens: one row each, quality beside compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_adamba.data.indexed_dataset import IndexedDataset
from megatron_adamba.data.tokenizer import Tokenizer
from megatron_adamba.elastic.plan import full_plan
from megatron_adamba.inference.items import Item, ItemResult, evaluate_mode
from megatron_adamba.inference.load import LoadedModel
from megatron_adamba.inference.modes import Mode


@dataclass(frozen=True)
class PolicyRow:
    """What one policy costs and how good it is; over the tokens that are scored, but FLOPs over all."""

    kind: str
    """width | exit | adaptive"""
    name: str
    nats_per_token: float
    bits_per_byte: float | None
    """None where bytes are not known"""
    token_accuracy: float
    """share of tokens that were the most likely ones"""
    exact_match: float
    """share of items of which all were"""
    flops_per_token: float
    """active forward FLOPs, prompts, propagation, gates and head included"""
    saved: float
    """share of the whole model's FLOPs"""
    mean_exit: float
    """blocks that ran at scored positions"""
    mean_width: float
    """of the last block that ran there"""


def document_items(
    indexed: IndexedDataset, tokenizer: Tokenizer, seq_len: int, read: int, max_tokens: int | None = None
) -> tuple[list[Item], int]:
    """Documents, or the first max_tokens of their tokens, in pieces of at most seq_len inputs, each by itself, and the
    number of UTF-8 bytes that are scored.

    read: tokens at the beginning of a piece that are not scored, at most half of it; the estimator may read them.
    """
    items, num_bytes, taken = [], 0, 0
    offsets = indexed.document_offsets
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
        if max_tokens is not None:
            end = min(end, start + max_tokens - taken)
        if end <= start:
            continue
        taken += end - start
        tokens = [tokenizer.eod_id, *(int(token) for token in indexed.tokens(start, end))]
        for first in range(0, len(tokens) - 1, seq_len):
            piece = tokens[first : first + seq_len + 1]
            kept = max(1, min(read, len(piece) // 2))
            items.append(Item(tuple(piece[:kept]), tuple(piece[kept:])))
            texts = [tokenizer.decode(part).encode() for part in (piece[:kept], piece)]
            num_bytes += len(texts[1]) - len(texts[0])
    return items, num_bytes


def fixed_modes(loaded: LoadedModel, exits: int) -> list[tuple[str, str, Mode]]:
    """(kind, name, mode) of every width, and of so many exits at full width."""
    config = loaded.model.config
    rows = [("width", f"width {row.width}", Mode(width=row.width)) for row in config.nest]
    layers = range(loaded.min_exit_layer, config.num_layers)
    count = min(exits, len(layers))
    chosen = sorted({layers[round(i * (len(layers) - 1) / max(count - 1, 1))] for i in range(count)})
    full = max(full_plan(config).widths)
    return rows + [("exit", f"exit {layer}", Mode(width=full, exit_layer=layer)) for layer in chosen]


def adaptive_modes(
    thresholds: Sequence[float], prices: Sequence[float | None], settings: dict, predict: bool
) -> list[tuple[str, str, Mode]]:
    """(kind, name, mode) of every pair; a price of None is the look-up."""
    rows = []
    for price in prices if predict else [None]:
        for threshold in thresholds:
            name = f"exit {threshold:g}" + ("" if price is None else f", price {price:g}")
            mode = Mode("adaptive", None, {**settings, "exit_threshold": threshold}, price, predict)
            rows.append(("adaptive", name, mode))
    return rows


def evaluate_modes(
    loaded: LoadedModel,
    items: Sequence[Item],
    modes: Sequence[tuple[str, str, Mode]],
    num_bytes: int | None,
    batch_size: int,
    report: Callable[[int], None] = lambda done: None,
) -> list[PolicyRow]:
    """Every mode on every item. report: called with the items of each batch under each mode."""
    rows = []
    for kind, name, mode in modes:
        results = evaluate_mode(loaded, items, mode, batch_size, report)
        rows.append(policy_row(kind, name, results, num_bytes, items))
    return rows


def policy_row(
    kind: str, name: str, results: Sequence[ItemResult], num_bytes: int | None, items: Sequence[Item]
) -> PolicyRow:
    """The figures of one policy."""
    scored = sum(len(result.losses) for result in results)
    nats = sum(sum(result.losses) for result in results)
    spent, whole = sum(result.flops for result in results), sum(result.full_flops for result in results)
    return PolicyRow(
        kind=kind,
        name=name,
        nats_per_token=nats / scored,
        bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else None,
        token_accuracy=sum(result.hits for result in results) / scored,
        exact_match=sum(result.right for result in results) / len(results),
        flops_per_token=spent / sum(len(item.inputs) for item in items),
        saved=1 - spent / whole,
        mean_exit=sum(sum(result.answer_exits) for result in results) / scored,
        mean_width=sum(sum(result.answer_widths) for result in results) / scored,
    )


def over_widths(rows: Sequence[PolicyRow]) -> dict[str, float]:
    """By name, how far each adaptive row lies over the curve of the fixed widths at its own FLOPs (under it: negative):
    bits per byte, or nats per token where bytes are not known. Rows beside the curve's ends are left out."""
    value = lambda row: row.nats_per_token if row.bits_per_byte is None else row.bits_per_byte
    curve = sorted((row.flops_per_token, value(row)) for row in rows if row.kind == "width")
    flops, values = [point[0] for point in curve], [point[1] for point in curve]
    gaps = {}
    for row in rows:
        if row.kind == "adaptive" and flops[0] <= row.flops_per_token <= flops[-1]:
            gaps[row.name] = value(row) - float(np.interp(row.flops_per_token, flops, values))
    return gaps
