"""What gates learn from in tests. Used by both sides."""

from __future__ import annotations

import torch

from megatron_adamba.config.sections import GatesConfig
from megatron_adamba.elastic.sampler import PlanSampler
from megatron_adamba.training.gate_setup import GateSetup

SPANS = torch.tensor([[[0, 3, 8], [8, 2, 13]], [[1, 2, 12], [0, 0, 0]]])
"""documents of both sequences of every micro-batch: first place, tokens to read, end"""


def gate_setup(config, seq_len: int, predictor: str | None = None, target: str = "relative") -> GateSetup:
    """Of a run of `curve.run_config`."""
    gates = GatesConfig(positions=5, documents=2, lr=0.01, gradient_clipping=0.5, target=target, predictor=predictor)
    passes = PlanSampler(config.model, config.elastic, config.train.seed).passes
    return GateSetup(config.model, gates, True, 1, passes, seq_len, config.train.seed, 0, None)
