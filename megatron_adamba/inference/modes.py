"""What a user's mode comes to for a prompt: a fixed width, or widths and exits that the model chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_adamba.blueprint.flops import block_flops, forward_flops
from megatron_adamba.blueprint.nest import block_rows, mode_width
from megatron_adamba.blueprint.resolve import attention_windows
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.config.rules import at_least
from megatron_adamba.elastic.plan import ElasticPlan, full_plan, uniform_plan
from megatron_adamba.inference.load import LoadedModel
from megatron_adamba.inference.policy import AdaptivePolicy, ComputePolicy, predicted_widths

ADAPTIVE = "adaptive"


@dataclass(frozen=True)
class Mode:
    """How much a prompt may take."""

    name: str = "think"
    """full | adaptive | a mode of the model (ghost, whisper, normal, think)"""
    width: int | None = None
    """a width of the nest instead"""
    adaptive: Mapping[str, Any] = field(default_factory=dict)
    """of `adaptive`: fields of its policy that are not the defaults"""
    energy_price: float | None = None
    """of `adaptive`: nats that all compute for a token is worth, infinite: the least width; None: widths by lookup"""
    predict: bool = True
    """of `adaptive`: whether the estimator chooses the widths; else they are full"""
    exit_layer: int | None = None
    """of a width: blocks that run; None: all of them"""

    def policy(self, loaded: LoadedModel, prompt: Sequence[int]) -> ComputePolicy:
        """For one prompt, [n] token ids. Raises ConfigError."""
        config = loaded.model.config
        if self.width is not None:
            return ComputePolicy(uniform_plan(config, self.width, self.exit_layer))
        if self.name == "full":
            return ComputePolicy(full_plan(config))
        if self.name != ADAPTIVE:
            return ComputePolicy(uniform_plan(config, mode_width(config, self.name)))
        policy = replace(AdaptivePolicy(min_exit_layer=loaded.min_exit_layer), **self.adaptive)
        policy.check()
        loaded.require_gates()
        if self.energy_price is not None:
            at_least("--energy-price", self.energy_price, 0, 0.1, infinite=True)
        plan = full_plan(config)
        if self.asks_estimator(loaded):
            plan = ElasticPlan(self._widths(loaded, prompt, policy.min_width), config.num_layers)
        return ComputePolicy(plan, policy)

    def asks_estimator(self, loaded: LoadedModel) -> bool:
        """Whether the widths come from the prompt."""
        chooses = self.width is None and self.name == ADAPTIVE and self.predict
        return chooses and loaded.gate_config.predictor != "none"

    def _widths(self, loaded: LoadedModel, prompt: Sequence[int], min_width: int) -> tuple[int, ...]:
        config = loaded.model.config
        scores = prompt_scores(loaded, prompt)
        shares = width_shares(config, max(len(prompt), 1)) if self.energy_price is not None else torch.zeros(0)
        return predicted_widths(config, scores, loaded.gate_config.regret_scale, shares, self.energy_price, min_width)


@torch.no_grad()
def prompt_scores(loaded: LoadedModel, prompt: Sequence[int]) -> Tensor:
    """Difficulty of each layer, [num_layers] in [0, 1], from the mean embedding of a prompt's first tokens."""
    read = torch.tensor([list(prompt[: loaded.gate_config.prompt_tokens])], device=loaded.device)
    return loaded.require_gates().scores(loaded.model.embedding(read)[0].float().mean(0))


def width_shares(config: ResolvedModel, seq_len: int) -> Tensor:
    """[num_layers, widths] of the whole model's FLOPs a token at full width, float64."""
    rows, windows = block_rows(config), attention_windows(config)
    total = forward_flops(config, full_plan(config).widths, seq_len)
    shares = [
        [block_flops(config, letter, rows[index][row.width], windows[index], seq_len) / total for row in config.nest]
        for index, letter in enumerate(config.block_pattern)
    ]
    return torch.tensor(shares, dtype=torch.float64)
