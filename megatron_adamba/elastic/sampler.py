"""Plans of a training run: a pure function of (seed, step, plan number), the same on every rank and after a restart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_adamba.blueprint.phases import PHASES_WITH_EXITS
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.config.sections import ElasticConfig
from megatron_adamba.elastic.plan import ElasticPlan, MixedExits, full_plan, uniform_plan
from megatron_adamba.errors import ConfigError

DEFAULT_EXIT_FRACTION = 0.3
"""of the plans, in the phases that train exits"""
_STREAM = 0x504C414E  # keeps plans apart from the data order, which draws from the same seed


def counter_generator(seed: int, step: int, number: int) -> np.random.Generator:
    """A generator whose whole state is its arguments (Philox, Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=[seed, _STREAM], counter=[0, 0, step, number]))


def earliest_exit(num_layers: int) -> int:
    """Blocks that run before the first exit, where nobody says."""
    return max(1, num_layers // 4)


class PlanSampler:
    """Draws the plans of each step. Holds no state that moves."""

    def __init__(self, model: ResolvedModel, elastic: ElasticConfig, seed: int, phase: int | None = None) -> None:
        """phase: `--train.phase`. Raises ConfigError where exits are asked for that the model does not have."""
        self.model, self.elastic, self.seed = model, elastic, seed
        self.widths = [row.width for row in model.nest]
        usual = DEFAULT_EXIT_FRACTION if phase in PHASES_WITH_EXITS and model.num_layers > 1 else 0.0
        self.exit_fraction = usual if elastic.exit_fraction is None else elastic.exit_fraction
        self.min_exit_layer = elastic.min_exit_layer or earliest_exit(model.num_layers)
        if self.exit_fraction and not 1 <= self.min_exit_layer < model.num_layers:
            raise ConfigError(
                f"--elastic.min_exit_layer {self.min_exit_layer}: must leave a layer out of the model's "
                f"{model.num_layers}; try {max(1, model.num_layers // 2)}, or --elastic.exit_fraction 0"
            )

    @property
    def passes(self) -> int:
        """Forward passes of one micro-batch."""
        return self.elastic.sandwich_passes if self.elastic.width_sampling == "sandwich" else 1

    def micro_batch_plan(self, step: int, micro_batch: int, num_micro_batches: int, pass_index: int = 0) -> ElasticPlan:
        """Plan of pass k of micro-batch j of M in `step`: plan number floor(j P / M) * K + k."""
        number = micro_batch * self.elastic.plans_per_step // num_micro_batches
        return self.plan(step, number * self.passes + pass_index)

    def plan(self, step: int, number: int) -> ElasticPlan:
        """The first pass of a sandwich is full width to the last layer; any other plan may leave early, half of those
        of a sandwich at full width, and some of them with tokens that leave earlier still."""
        mode = self.elastic.width_sampling
        if mode == "sandwich" and number % self.passes == 0:
            return full_plan(self.model)
        generator = counter_generator(self.seed, step, number)
        plan = self._widths(mode, generator)
        if generator.random() >= self.exit_fraction:
            return plan
        layer = int(generator.integers(self.min_exit_layer, self.model.num_layers))
        if mode == "sandwich" and generator.random() < 0.5:
            plan = full_plan(self.model)
        mixed_fraction = self.elastic.mixed_exit_fraction
        if mixed_fraction and generator.random() < mixed_fraction:
            mixed = MixedExits(layer, float(generator.random()), int(generator.integers(2**63)))
            return replace(plan, exit_layer=int(generator.integers(layer + 1, self.model.num_layers + 1)), mixed=mixed)
        return replace(plan, exit_layer=layer)

    def _widths(self, mode: str, generator: np.random.Generator) -> ElasticPlan:
        if mode == "full":
            return full_plan(self.model)
        if mode == "uniform":
            return uniform_plan(self.model, self.widths[generator.integers(len(self.widths))])
        picks = generator.integers(len(self.widths), size=self.model.num_layers)
        return ElasticPlan(tuple(self.widths[pick] for pick in picks), self.model.num_layers)
