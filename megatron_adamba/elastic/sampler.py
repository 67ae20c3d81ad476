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

    def __init__(
        self,
        model: ResolvedModel,
        elastic: ElasticConfig,
        seed: int,
        phase: int | None = None,
        steps: int | None = None,
    ) -> None:
        """phase, steps: `--train.phase`, `--train.steps`; steps is needed where a schedule names shares of a run.

        Raises ConfigError where exits are asked for that the model does not have, weights do not fit the widths, or a
        stage of the schedule ends before it begins.
        """
        self.model, self.elastic, self.seed = model, elastic, seed
        self.widths = [row.width for row in model.nest]
        self.stages = elastic.parts(steps)
        """(the step with which it ends, its settings) of each part of the run"""
        exits = phase in PHASES_WITH_EXITS and model.num_layers > 1
        self._usual_exit_fraction = DEFAULT_EXIT_FRACTION if exits else 0.0
        self.exit_fraction = max(self._exit_fraction(stage) for _, stage in self.stages)
        """the largest of the run"""
        self.min_exit_layer = elastic.min_exit_layer or earliest_exit(model.num_layers)
        if self.exit_fraction and not 1 <= self.min_exit_layer < model.num_layers:
            raise ConfigError(
                f"--elastic.min_exit_layer {self.min_exit_layer}: must leave a layer out of the model's "
                f"{model.num_layers}; try {max(1, model.num_layers // 2)}, or --elastic.exit_fraction 0"
            )
        self._shares = [self._checked_shares(stage.width_weights) for _, stage in self.stages]

    def _exit_fraction(self, stage: ElasticConfig) -> float:
        return self._usual_exit_fraction if stage.exit_fraction is None else stage.exit_fraction

    def _checked_shares(self, weights: list[float] | None) -> np.ndarray | None:
        """[widths]: the share of the draws up to each width."""
        if weights is None:
            return None
        if len(weights) != len(self.widths):
            example = [1.0] * (len(self.widths) - 1) + [2.0]
            raise ConfigError(
                f"--elastic.width_weights {weights}: {len(weights)} for the {len(self.widths)} widths {self.widths}; "
                f"give one for each, for example {example}"
            )
        return np.cumsum(weights) / sum(weights)

    @property
    def passes(self) -> int:
        """Forward passes of one micro-batch."""
        return self.elastic.passes

    def stage_at(self, step: int) -> int:
        """The number of the stage that `step` (from 0) belongs to."""
        return next(number for number, (end, _) in enumerate(self.stages) if step < end)

    def micro_batch_plan(self, step: int, micro_batch: int, num_micro_batches: int, pass_index: int = 0) -> ElasticPlan:
        """Plan of pass k of micro-batch j of M in `step`: plan number floor(j P / M) * K + k."""
        number = micro_batch * self.elastic.plans_per_step // num_micro_batches
        return self.plan(step, number * self.passes + pass_index)

    def plan(self, step: int, number: int) -> ElasticPlan:
        """The first pass of a sandwich is full width to the last layer; any other plan may leave early, half of those
        of a sandwich at full width, and some of them with tokens that leave earlier still."""
        place = self.stage_at(step)
        stage = self.stages[place][1]
        mode = stage.width_sampling
        if mode == "sandwich" and number % self.passes == 0:
            return full_plan(self.model)
        generator = counter_generator(self.seed, step, number)
        plan = self._widths(place, generator)
        if generator.random() >= self._exit_fraction(stage):
            return plan
        layer = int(generator.integers(self.min_exit_layer, self.model.num_layers))
        if mode == "sandwich" and generator.random() < 0.5:
            plan = full_plan(self.model)
        mixed_fraction = stage.mixed_exit_fraction
        if mixed_fraction and generator.random() < mixed_fraction:
            mixed = MixedExits(layer, float(generator.random()), int(generator.integers(2**63)))
            return replace(plan, exit_layer=int(generator.integers(layer + 1, self.model.num_layers + 1)), mixed=mixed)
        return replace(plan, exit_layer=layer)

    def _widths(self, place: int, generator: np.random.Generator) -> ElasticPlan:
        stage = self.stages[place][1]
        mode = stage.width_sampling
        if mode == "full":
            return full_plan(self.model)
        # nothing is drawn for a setting that is off: plans of old runs stay what they were
        alike = mode == "uniform" or (stage.uniform_share > 0 and generator.random() < stage.uniform_share)
        picks = self._picks(self._shares[place], 1 if alike else self.model.num_layers, generator)
        if alike:
            return uniform_plan(self.model, self.widths[picks[0]])
        return ElasticPlan(tuple(self.widths[pick] for pick in picks), self.model.num_layers)

    def _picks(self, shares: np.ndarray | None, count: int, generator: np.random.Generator) -> np.ndarray:
        """[count] indices of widths."""
        if shares is None:
            return generator.integers(len(self.widths), size=count)
        return np.minimum(np.searchsorted(shares, generator.random(count), side="right"), len(self.widths) - 1)
