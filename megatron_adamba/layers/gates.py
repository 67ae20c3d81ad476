"""Gates and the difficulty estimator: small maps of a token's own state, in float32, that the model never waits for."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_adamba.blueprint.gates import expansion_layers
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.ops.rms_norm import rms_norm


class Gate(nn.Module):
    """down(silu(up rms_norm(x))): the norm is that of the static parts, without a weight, so that channels of zero that
    surgery adds change nothing. Parameters stay as allocated until they are filled from outside."""

    def __init__(self, config: ResolvedModel, outputs: int, device=None) -> None:
        super().__init__()
        self.norm_size, self.eps = config.static_norm_size, config.norm_eps
        self.up = _Linear(config.hidden_size, config.gate_size, device=device)
        self.down = _Linear(config.gate_size, outputs, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size] of any dtype; returns [..., outputs] in the gate's."""
        x = rms_norm(x.to(self.up.weight.dtype), None, self.norm_size, self.eps)
        return self.down(F.silu(self.up(x)))


class _Linear(nn.Linear):
    def reset_parameters(self) -> None:
        pass


class BlockGates(nn.Module):
    """The gates that read the residual behind one block; one for expansion where the next block may widen."""

    def __init__(self, config: ResolvedModel, block: int, device=None) -> None:
        super().__init__()
        self.confidence_gate = Gate(config, 1, device)
        if block + 1 in expansion_layers(config):
            self.expansion_gate = Gate(config, 1, device)


class Gates(nn.Module):
    """All gates of a model, named as in `blueprint.gates`. config: resolved, with a `gate_size`."""

    def __init__(self, config: ResolvedModel, device=None) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(BlockGates(config, block, device) for block in range(config.num_layers - 1))
        self.predictor = Gate(config, config.num_layers, device)

    def leaving(self, blocks: int, x: Tensor) -> Tensor:
        """Raw output of the confidence gate behind so many blocks, [...]; x: [..., hidden_size]."""
        return self._behind(blocks).confidence_gate(x).squeeze(-1)

    def widening(self, blocks: int, x: Tensor) -> Tensor:
        """Raw output of the expansion gate behind so many blocks, [...]; x: [..., hidden_size]."""
        return self._behind(blocks).expansion_gate(x).squeeze(-1)

    def _behind(self, blocks: int) -> BlockGates:
        return cast(BlockGates, self.blocks[blocks - 1])

    def scores(self, mean_embedding: Tensor) -> Tensor:
        """Difficulty of each layer in [0, 1], [..., num_layers]; mean_embedding: [..., hidden_size]."""
        return torch.sigmoid(self.predictor(mean_embedding))
