"""What a token costs that leaves early or widens: blocks that it runs, state for those that it skips, gates."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from megatron_adamba.blueprint.flops import block_flops
from megatron_adamba.blueprint.gates import expansion_layers
from megatron_adamba.blueprint.manifest import mamba1_dt_rank
from megatron_adamba.blueprint.nest import block_rows
from megatron_adamba.blueprint.resolve import attention_windows, mamba_inner_size
from megatron_adamba.config.model import NestRow
from megatron_adamba.config.resolved import ResolvedModel


@dataclass(frozen=True)
class TokenCosts:
    """Sums over the leading blocks, [num_layers + 1] FLOPs each; entry b is what blocks 0 .. b - 1 cost.

    A token that leaves behind e blocks and widens from block d on costs
    narrow[min(d, e)] + wide[e] - wide[min(d, e)] + skipped[-1] - skipped[e] + gates[e] + head.
    """

    narrow: tuple[int, ...]
    wide: tuple[int, ...]
    skipped: tuple[int, ...]
    gates: tuple[int, ...]
    head: int

    def of(self, exit_layer: int, widened_at: int) -> int:
        """FLOPs of one token."""
        narrow = min(widened_at, exit_layer)
        blocks = self.narrow[narrow] + self.wide[exit_layer] - self.wide[narrow]
        return blocks + self.skipped[-1] - self.skipped[exit_layer] + self.gates[exit_layer] + self.head


def token_costs(
    config: ResolvedModel, widths: tuple[int, ...], wide_widths: tuple[int, ...], seq_len: int, min_exit_layer: int
) -> TokenCosts:
    """widths, wide_widths: of each block, as chosen and doubled; attention is counted at its mean over seq_len."""
    rows, windows, widened = block_rows(config), attention_windows(config), expansion_layers(config)
    narrow, wide, skipped, gates = [], [], [], []
    for index, letter in enumerate(config.block_pattern):
        own, doubled = rows[index][widths[index]], rows[index][wide_widths[index]]
        two_sets = index in widened and doubled.width != own.width
        costs = [block_flops(config, letter, row, windows[index], seq_len) for row in (own, doubled)]
        state = [_state_flops(config, letter, row) for row in (own, doubled)]
        # a token fills both sets of keys and values, whichever it reads
        both = letter in "TE" and two_sets
        narrow.append(costs[0] + (state[1] if both else 0))
        wide.append((costs[1] + (state[0] if both else 0)) if two_sets else costs[0])
        skipped.append(sum(state) if both else state[0])
        behind = index + 1
        count = (behind >= min_exit_layer) + (behind in widened) if behind < config.num_layers else 0
        gates.append(count * 2 * config.gate_size * (config.hidden_size + 1))
    sums = lambda costs: tuple(accumulate(costs, initial=0))
    head = 2 * config.hidden_size * config.vocab_size
    return TokenCosts(sums(narrow), sums(wide), sums(skipped), sums(gates), head)


def _state_flops(config: ResolvedModel, letter: str, row: NestRow) -> int:
    """What later tokens need of one that does not run the block: keys and values, or the Mamba state."""
    if letter in "TE":
        return 2 * row.width * 2 * row.kv_groups * config.head_dim
    hidden, inner, state = config.hidden_size, mamba_inner_size(config), config.mamba_d_state
    if config.mamba_version == 1:
        rank = mamba1_dt_rank(config)
        # dt, B and the state; no gate, no C, no output
        return 2 * hidden * inner + 2 * inner * config.mamba_d_conv + 2 * inner * (2 * rank + state) + 5 * inner * state
    groups = config.mamba_num_groups * state
    # C is projected, as later tokens' convolutions read it, and neither convolved nor used
    projected, convolved = inner + 2 * groups + config.mamba_num_heads, inner + groups
    return 2 * hidden * projected + 2 * convolved * config.mamba_d_conv + 4 * inner * state


def predictor_flops(config: ResolvedModel) -> int:
    """Of the difficulty estimator, once a prompt."""
    return 2 * config.gate_size * (config.hidden_size + config.num_layers)
