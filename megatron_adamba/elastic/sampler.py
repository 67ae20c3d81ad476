"""Plans of a training run: a pure function of (seed, step, plan number), the same on every rank and after a restart."""

from __future__ import annotations

import numpy as np

from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.sections import ElasticConfig
from megatron_adamba.elastic.plan import ElasticPlan, full_plan, uniform_plan

_STREAM = 0x504C414E  # keeps plans apart from the data order, which draws from the same seed


def counter_generator(seed: int, step: int, number: int) -> np.random.Generator:
    """A generator whose whole state is its arguments (Philox, Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=[seed, _STREAM], counter=[0, 0, step, number]))


class PlanSampler:
    """Draws the plans of each step. Holds no state that moves."""

    def __init__(self, model: ModelConfig, elastic: ElasticConfig, seed: int) -> None:
        self.model, self.elastic, self.seed = model, elastic, seed
        self.widths = [row.width for row in model.nest]

    @property
    def passes(self) -> int:
        """Forward passes of one micro-batch."""
        return self.elastic.sandwich_passes if self.elastic.width_sampling == "sandwich" else 1

    def micro_batch_plan(self, step: int, micro_batch: int, num_micro_batches: int, pass_index: int = 0) -> ElasticPlan:
        """Plan of pass k of micro-batch j of M in `step`: plan number floor(j P / M) * K + k."""
        number = micro_batch * self.elastic.plans_per_step // num_micro_batches
        return self.plan(step, number * self.passes + pass_index)

    def plan(self, step: int, number: int) -> ElasticPlan:
        mode = self.elastic.width_sampling
        if mode == "full" or (mode == "sandwich" and number % self.passes == 0):
            return full_plan(self.model)
        generator = counter_generator(self.seed, step, number)
        if mode == "uniform":
            return uniform_plan(self.model, self.widths[generator.integers(len(self.widths))])
        picks = generator.integers(len(self.widths), size=self.model.num_layers)
        return ElasticPlan(tuple(self.widths[pick] for pick in picks), self.model.num_layers)
