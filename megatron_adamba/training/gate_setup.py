"""What the gates of a run learn from: which passes, layers, positions and documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_adamba.blueprint.gates import expansion_layers
from megatron_adamba.blueprint.phases import PHASES_WITH_EXITS
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.config.root import AdambaConfig
from megatron_adamba.config.sections import GatesConfig, default_predictor
from megatron_adamba.data.documents import prompt_spans
from megatron_adamba.data.loader import MicroBatch
from megatron_adamba.elastic.sampler import counter_generator
from megatron_adamba.model.taps import TapRequest

_POSITIONS = 0x54415053
"""keeps sampled positions apart from the plans"""


def gates_train(config: AdambaConfig) -> bool:
    """What --gates.train comes to."""
    return config.train.phase in PHASES_WITH_EXITS if config.gates.train is None else config.gates.train


@dataclass(frozen=True)
class GateSetup:
    """The same on every rank; holds no state that moves."""

    model: ResolvedModel
    gates: GatesConfig
    trains: bool
    """False: the gates are carried along as they are"""
    min_exit_layer: int
    passes: int
    """of one micro-batch; more than one is a sandwich"""
    seq_len: int
    seed: int
    eod_id: int
    prompt_end: int | None

    @property
    def predictor(self) -> str:
        """relative | original | none"""
        return self.gates.predictor or default_predictor("sandwich" if self.passes > 1 else None)

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks behind which states are kept."""
        first = min(self.min_exit_layer, expansion_layers(self.model).start)
        return tuple(range(first, self.model.num_layers))

    def spans(self, batch: MicroBatch) -> Tensor:
        """[batch, documents, 3] of a micro-batch on the CPU, as `prompt_spans` makes them."""
        gates = self.gates
        most = gates.documents if self.predictor != "none" else 0
        tokens, seq_idx = batch["tokens"].numpy(), batch["seq_idx"].numpy()
        marks = self.eod_id, self.prompt_end
        return torch.from_numpy(prompt_spans(tokens, seq_idx, *marks, most, gates.prompt_tokens, gates.rest_tokens))

    def begun(self, step: int) -> bool:
        """Whether the gates take a step of their own in this one."""
        return self.trains and step >= self.gates.warmup_steps

    def request(self, step: int, spans: Tensor, device: torch.device) -> TapRequest:
        """What every pass of a micro-batch keeps. The positions are a function of (seed, step)."""
        generator = counter_generator(self.seed, step, _POSITIONS)
        count = min(self.gates.positions, self.seq_len)
        chosen = np.sort(generator.choice(self.seq_len, size=count, replace=False))
        documents = spans[..., :2].to(device) if spans.shape[1] else None
        end = self.model.num_layers if self.gates.target == "divergence" else None
        return TapRequest(self.layers, torch.from_numpy(chosen).to(device), documents, end)
