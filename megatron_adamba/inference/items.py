"""Prompts with known answers: who is right, and what it took, teacher-forced.

Greedy decoding gives the answer exactly where every token of it is the most likely one behind those before, so one pass
over prompt and answer tells whether the model is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_adamba.blueprint.flops import forward_flops
from megatron_adamba.data.tokenizer import Tokenizer
from megatron_adamba.elastic.plan import ElasticPlan
from megatron_adamba.errors import DataError
from megatron_adamba.inference.adaptive import AdaptiveTrace, run_adaptively
from megatron_adamba.inference.compute import ComputeMeter
from megatron_adamba.inference.load import LoadedModel
from megatron_adamba.inference.modes import Mode
from megatron_adamba.inference.policy import ComputePolicy
from megatron_adamba.inference.text_stream import clean_text
from megatron_adamba.schema import JsonObject, check_value, parse_json, read_regular


@dataclass(frozen=True)
class Item:
    """Token ids."""

    prompt: tuple[int, ...]
    """begins with the end-of-document token"""
    answer: tuple[int, ...]
    """ends with the end-of-document token"""

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: all but the last token."""
        return (*self.prompt, *self.answer)[:-1]

    @property
    def first(self) -> int:
        """Position whose logits give the answer's first token."""
        return len(self.prompt) - 1


@dataclass(frozen=True)
class ItemResult:
    """One item under one policy."""

    right: bool
    flops: int
    """active, of all its tokens, prompt included"""
    full_flops: int
    """of the whole model on the same tokens"""
    answer_exits: tuple[int, ...]
    """blocks that ran at the positions that give the answer"""
    answer_widths: tuple[float, ...]
    """mean of the blocks that ran there"""
    losses: tuple[float, ...]
    """nats of the answer's tokens"""
    hits: int
    """tokens of the answer that were the most likely ones"""


def read_items(path: Path, tokenizer: Tokenizer) -> list[Item]:
    """Lines of {"prompt", "answer"}. Raises DataError."""
    advice = 'give lines of {"prompt": "...", "answer": "..."}'
    items = []
    for number, line in enumerate(read_regular(path, DataError, advice).splitlines(), 1):
        where = f"--items {path}: line {number}"
        values = parse_json(line, JsonObject, where, DataError, advice)
        texts = [
            check_value(values.get(name), str, f"{where}: {name}", DataError, advice) for name in ("prompt", "answer")
        ]
        prompt, answer = (tokenizer.encode(clean_text(text)) for text in texts)
        items.append(Item((tokenizer.eod_id, *prompt), (*answer, tokenizer.eod_id)))
    if not items:
        raise DataError(f"--items {path}: holds no items")
    return items


def batches(items: Sequence[Item], size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Items of like length together: (their places, tokens [batch, seq] padded behind with token 0)."""
    order = sorted(range(len(items)), key=lambda place: len(items[place].inputs))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        inputs = [torch.tensor(items[place].inputs) for place in places]
        yield places, torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)


def evaluate_mode(
    loaded: LoadedModel,
    items: Sequence[Item],
    mode: Mode,
    batch_size: int = 64,
    report: Callable[[int], None] = lambda done: None,
) -> list[ItemResult]:
    """Every item under a mode, in the order of the items. report: called with the items of each batch."""
    results: dict[int, ItemResult] = {}
    for places, tokens in batches(items, batch_size):
        policies = [mode.policy(loaded, items[place].prompt) for place in places]
        x, trace = mode_residual(loaded, tokens.to(loaded.device), policies)
        for row, place in enumerate(places):
            item = items[place]
            logits = _answer_logits(loaded, x[row], item)
            predicted = mode.asks_estimator(loaded)
            results[place] = _result(loaded, item, policies[row], logits, trace, row, predicted)
        report(len(places))
    return [results[place] for place in range(len(items))]


def mode_residual(
    loaded: LoadedModel, tokens: Tensor, policies: Sequence[ComputePolicy]
) -> tuple[Tensor, AdaptiveTrace | None]:
    """[batch, seq, hidden_size] where each token left; no trace for fixed plans, which are then all the same."""
    adaptive = policies[0].adaptive
    if adaptive is not None:
        plans = [policy.plan for policy in policies]
        return run_adaptively(loaded.model, loaded.require_gates(), loaded.reading, tokens, plans, adaptive)
    return residuals(loaded.model, tokens, policies[0].plan)[-1], None


@torch.no_grad()
def residuals(model, tokens: Tensor, plan: ElasticPlan, keep: Callable[[int], bool] = lambda run: False):
    """The streams [batch, seq, hidden_size] behind the numbers of blocks to keep, and behind the last that runs."""
    context = model.training_context(tokens, None)
    x, kept = model.embedding(tokens), []
    for index in range(plan.exit_layer):
        x = model.blocks[index](x, model.rows[index][plan.widths[index]], context)
        if index + 1 < plan.exit_layer and keep(index + 1):
            kept.append(x)
    return [*kept, x]


@torch.no_grad()
def _answer_logits(loaded: LoadedModel, x: Tensor, item: Item) -> Tensor:
    """[answer, vocab] fp32; x: [seq, hidden_size]."""
    return loaded.model.logits(x[None, item.first : len(item.inputs)])[0]


def _result(
    loaded: LoadedModel,
    item: Item,
    policy: ComputePolicy,
    logits: Tensor,
    trace: AdaptiveTrace | None,
    row: int,
    predicted: bool,
) -> ItemResult:
    count = len(item.inputs)
    answer = torch.tensor(item.answer, device=logits.device)
    meter = ComputeMeter(loaded.model.config, policy, count, predicted)
    if trace is None:
        exits = [policy.plan.exit_layer] * count
        widened = [loaded.model.config.num_layers] * count
    else:
        exits, widened = trace.exit_layers[row, :count].tolist(), trace.widened_at[row, :count].tolist()
    spans = list(zip(exits, widened))[item.first :]
    hits = int((logits.argmax(-1) == answer).sum())
    return ItemResult(
        right=hits == len(item.answer),
        flops=meter.total(exits, widened),
        full_flops=meter.full * count,
        answer_exits=tuple(exits[item.first :]),
        answer_widths=tuple(meter.mean_width(*span) for span in spans),
        losses=tuple(F.cross_entropy(logits, answer, reduction="none").tolist()),
        hits=hits,
    )


@dataclass(frozen=True)
class GridCell:
    """All items at one width, left behind one layer."""

    width: int
    exit_layer: int
    right: tuple[bool, ...]
    flops: int
    """active, of all tokens of all items"""

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


@torch.no_grad()
def evaluate_grid(loaded: LoadedModel, items: Sequence[Item], batch_size: int = 64) -> list[GridCell]:
    """Every pair of a uniform width and an exit layer: one pass at each width serves all its exits."""
    config = loaded.model.config
    depth = config.num_layers
    counts = Counter(len(item.inputs) for item in items)
    cells = []
    for width in (row.width for row in config.nest):
        right = torch.zeros(depth, len(items), dtype=torch.bool)
        plan = ElasticPlan((width,) * depth, depth)
        for places, tokens in batches(items, batch_size):
            chosen = [items[place] for place in places]
            lengths = [len(item.answer) for item in chosen]
            rows = torch.arange(len(chosen)).repeat_interleave(torch.tensor(lengths))
            where = torch.cat([torch.arange(item.first, len(item.inputs)) for item in chosen])
            answers = torch.tensor([token for item in chosen for token in item.answer], device=loaded.device)
            for layer, x in enumerate(residuals(loaded.model, tokens.to(loaded.device), plan, lambda run: True)):
                hits = (loaded.model.logits(x[None, rows, where])[0].argmax(-1) == answers).cpu()
                right[layer, places] = torch.stack([part.all() for part in hits.split(lengths)])
        for layer in range(depth):
            flops = sum(forward_flops(config, plan.widths, n, layer + 1) * n * times for n, times in counts.items())
            cells.append(GridCell(width, layer + 1, tuple(right[layer].tolist()), flops))
    return cells
