"""How far two models are apart on real tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.config.root import read_model_config, read_run_config
from megatron_adamba.data.loader import MicroBatch, to_micro_batch
from megatron_adamba.data.packed import UNSCORED, Sample
from megatron_adamba.elastic.plan import ElasticPlan
from megatron_adamba.errors import ConfigError, TokenizerError
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.surgery.requested import requested_plan

_ROWS = 64
"""positions whose logits are compared at once"""


@dataclass(frozen=True)
class Comparison:
    """Over all scored positions; not-a-number in either model shows in every number that it enters."""

    tokens: int
    vocab_size: int
    max_logit_difference: float
    mean_logit_difference: float
    """of the absolute values"""
    first_loss: float
    """nats per token"""
    second_loss: float

    @property
    def loss_difference(self) -> float:
        """second - first"""
        return self.second_loss - self.first_loss


def comparable_plans(
    folders: tuple[Path, Path], width: int | None, widths: list[int] | None, exit_layer: int | None
) -> tuple[ElasticPlan, ElasticPlan]:
    """What to run of each of two canonical checkpoints (`requested_plan`); no weights are read.

    Raises ConfigError where the vocabularies differ or one of them has no such plan, TokenizerError where one was
    trained with another tokenizer.
    """
    first, second = folders
    configs = [resolve_model(read_model_config(folder)) for folder in folders]
    sizes = [config.vocab_size for config in configs]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{second}: has a vocabulary of {sizes[1]}, {first} of {sizes[0]}; compare models of one vocabulary"
        )
    hashes = [read_run_config(folder).get("tokenizer_hash") for folder in folders]
    if None not in hashes and hashes[0] != hashes[1]:
        raise TokenizerError(f"{second}: was trained with another tokenizer than {first}; compare models of one")
    plans = [requested_plan(config, folder, width, widths, exit_layer) for config, folder in zip(configs, folders)]
    return plans[0], plans[1]


def compare_models(
    models: tuple[AdambaModel, AdambaModel],
    plans: tuple[ElasticPlan, ElasticPlan],
    batches: Iterable[Sample],
    device: torch.device,
) -> Comparison:
    """Run one model after the other on each batch; both are on `device`, in fp32.

    batches: as `EvaluationBatches` yields them. Memory beside the models: the logits of one batch, twice.
    """
    # sums stay tensors: Python's max() would lose a not-a-number
    worst = torch.zeros((), dtype=torch.float64, device=device)
    total, losses, tokens = torch.zeros_like(worst), worst.new_zeros(2), 0
    for sample in batches:
        batch = to_micro_batch(sample)
        labels = batch["labels"].to(device).flatten()
        places = (labels != UNSCORED).nonzero().squeeze(1)
        first, second = (_logits(model, plan, batch, device) for model, plan in zip(models, plans))
        for some in places.split(_ROWS):
            pair = torch.stack([first[some], second[some]])
            difference = (pair[0] - pair[1]).abs()
            worst = torch.maximum(worst, difference.max())
            total += difference.sum(dtype=torch.float64)
            losses += _losses(pair, labels[some])
        tokens += places.numel()
    vocab = models[0].config.vocab_size
    mean = total / max(tokens * vocab, 1)
    losses = losses / max(tokens, 1)
    return Comparison(tokens, vocab, worst.item(), mean.item(), losses[0].item(), losses[1].item())


def _logits(model: AdambaModel, plan: ElasticPlan, batch: MicroBatch, device: torch.device) -> Tensor:
    """[batch * seq, vocab] in fp32."""
    tokens = batch["tokens"].to(device)
    seq_idx = batch["seq_idx"].to(device) if batch["packed"] else None
    with torch.no_grad():
        return model(tokens, None, seq_idx, plan, all_take_part=False).flatten(0, 1)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums in nats, [2] in float64. logits: [2, positions, vocab]; labels: [positions]."""
    logits = logits.double()
    chosen = logits.gather(-1, labels.expand(2, -1).unsqueeze(-1)).squeeze(-1)
    return (logits.logsumexp(-1) - chosen).sum(-1)
