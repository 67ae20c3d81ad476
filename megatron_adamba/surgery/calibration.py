"""Text that orders are chosen on: windows from all over a dataset, in two halves that each order has to convince."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_adamba.data.loader import MicroBatch, to_micro_batch
from megatron_adamba.data.packed import UNSCORED, EvaluationBatches
from megatron_adamba.elastic.plan import uniform_plan
from megatron_adamba.model.adamba import AdambaModel


class Calibration:
    """Batches evenly spread over `batches`, up to about `max_tokens` tokens (all of them where None).

    report: called whenever the model is done with a batch.
    """

    def __init__(
        self,
        batches: EvaluationBatches,
        max_tokens: int | None = None,
        report: Callable[[], None] = lambda: None,
    ) -> None:
        count = len(batches)
        if max_tokens is not None:
            count = min(count, max(2, round(max_tokens * len(batches) / max(batches.num_tokens, 1))))
        self._batches, self._chosen = batches, [index * len(batches) // count for index in range(count)]
        self._report = report

    def __iter__(self) -> Iterator[MicroBatch]:
        for index in self._chosen:
            yield to_micro_batch(self._batches[index])
            # whoever asks for the next one is done with this one
            self._report()

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def num_tokens(self) -> int:
        """Scored tokens."""
        return sum(int((self._batches[index]["labels"] != UNSCORED).sum()) for index in self._chosen)

    def narrow_losses(self, model: AdambaModel) -> tuple[float, float]:
        """Nats per token, a mean over the widths below the largest, of every other batch and of those between them.
        The same twice where there is one batch alone."""
        sums = torch.zeros(2, dtype=torch.float64)
        tokens = torch.zeros(2, dtype=torch.float64)
        widths: Sequence[int] = model.config.widths[:-1]
        with torch.no_grad():
            for number, batch in enumerate(self):
                seq_idx = batch["seq_idx"] if batch["packed"] else None
                half = number % 2
                tokens[half] += (batch["labels"] != UNSCORED).sum()
                for width in widths:
                    plan = uniform_plan(model.config, width)
                    losses = model(batch["tokens"], batch["labels"], seq_idx, plan, reduction="none")
                    sums[half] += losses.sum(dtype=torch.float64) / len(widths)
        first, second = (sums / tokens.clamp(min=1)).tolist()
        return (first, first) if len(self._chosen) == 1 else (first, second)
