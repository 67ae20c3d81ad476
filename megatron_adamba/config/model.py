"""The shape of a model: blocks, sizes and the nest table. What is `None` is derived in `blueprint.resolve`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megatron_adamba.config.rope import check_yarn
from megatron_adamba.config.rules import at_least, in_range, one_of, positive, usual
from megatron_adamba.errors import ConfigError


@dataclass
class NestRow:
    """One width of the nest: how much of every elastic tensor a model of that width uses."""

    width: int
    """leading channels that the elastic sub-layers read and write"""
    norm_size: int
    """divisor of the prefix norm's mean square; `width` at birth, kept when a model grows"""
    kv_groups: int
    """leading KV groups, each with all its query heads"""
    ffn: int
    """leading rows of the MLP, a multiple of ffn_granule"""
    expert_ffn: int = 0
    """leading rows of every expert; 0 in a model without experts"""


_LONGEST = 1 << 14
"""entries of a list, or letters"""
_LARGEST = {
    **dict.fromkeys(("hidden_size", "widths", "layer_widths", "static_norm_size", "estimator_reference"), 2**20),
    **dict.fromkeys(("gate_size", "ffn_size", "expert_ffn_size", "ffn_granule", "mamba_chunk_size"), 2**24),
    **dict.fromkeys(("num_heads", "num_kv_groups", "head_dim", "head_dim_steps", "mamba_num_heads"), 2**16),
    **dict.fromkeys(("mamba_d_state", "mamba_head_dim", "mamba_num_groups", "mamba_expand"), 2**16),
    **dict.fromkeys(("num_experts", "experts_per_token", "num_layers"), 2**16),
    **dict.fromkeys(("vocab_size", "sliding_window"), 2**31 - 1),
}


def _default_modes() -> dict[str, int]:
    return {"ghost": 128, "whisper": 512, "normal": 1024}


@dataclass
class ModelConfig:
    """Architecture. Sizes left out are derived and printed at start-up."""

    hidden_size: int = 256
    """channels of the residual stream"""
    num_layers: int | None = None
    """number of blocks; derived from block_pattern where that is given"""
    block_pattern: str | list[str] | None = None
    """T attention + MLP, M Mamba, E attention + experts; e.g. "(TM)x10", "(EEM)x12", [transformer, mamba, moe]; null
    means all T"""
    vocab_size: int | None = None
    """null takes the tokenizer's"""
    num_heads: int | None = None
    """query heads; null means hidden_size / head_dim"""
    num_kv_groups: int | None = None
    """key/value heads (GQA); null means num_heads"""
    head_dim: int = 64
    """channels of one head; even, for RoPE"""
    head_dim_steps: list[int] | None = None
    """head_dim at birth and after each time that surgery made heads larger; the scale of scores and the divisor of
    QK-norm stay the first one's, each step has rotary frequencies of its own; null means never"""
    ffn_size: int | None = None
    """rows of the MLP; null means 4 H for relu2 and 8/3 H for swiglu, up to the next ffn_granule"""
    activation: str = "relu2"
    """relu2 | swiglu"""
    linear_bias: bool = False
    """biases on attention and MLP projections"""
    rope_theta: float = 10000.0
    """base of the rotary frequencies"""
    rope_factor: float = 1.0
    """YaRN: how many times longer than rope_original_context the context may grow; 1 turns it off"""
    rope_original_context: int = 4096
    """YaRN: context that the frequencies were made for"""
    rope_beta_fast: float = 32.0
    """YaRN: frequencies with more turns than this in the original context stay"""
    rope_beta_slow: float = 1.0
    """YaRN: frequencies with fewer turns than this are divided by rope_factor"""
    rope_sign: int = 1
    """1 rotates by +theta (the usual way), -1 by -theta (nanochat)"""
    qk_norm: bool = True
    """weightless RMSNorm of queries and keys over the head, after RoPE"""
    embedding_norm: bool = False
    """weightless RMSNorm right after the embedding (nanochat)"""
    attention_sinks: bool = False
    """one learnable logit per query head that takes part in the softmax and attends to nothing (GPT-OSS)"""
    norm_weight: bool = True
    """per-channel weights on the RMSNorms; nanochat has none"""
    norm_eps: float = 1e-5
    """epsilon of every RMSNorm"""
    static_norm_size: int | None = None
    """divisor of the mean square in the norms of static parts, the one behind the embedding too; null means
    hidden_size; kept when a model grows"""
    logit_softcap: float = 0.0
    """c of c*tanh(logits/c); 0 turns it off"""
    tie_embeddings: bool = False
    """the head is the embedding, transposed"""
    sliding_window: int | None = None
    """keys that a local attention layer sees, itself included"""
    window_pattern: str = "L"
    """S (sliding_window) and L (all), repeated over the T blocks in order"""
    num_experts: int = 0
    """experts of every E block"""
    experts_per_token: int = 4
    """experts that a token is sent to; their weights are a softmax over their logits"""
    expert_ffn_size: int | None = None
    """rows of an expert; null means hidden_size up to the next ffn_granule"""
    expert_gate_limit: float = 7.0
    """gate is clamped to at most this, up to within plus and minus this; 0 turns it off"""
    expert_gate_slope: float = 1.702
    """a of gate * sigmoid(a * gate) * (up + 1)"""
    router_balance_weight: float = 0.0
    """weight of the load-balancing loss; it is left out while the router is frozen"""
    router_z_weight: float = 0.0
    """weight of the mean squared log-partition of the router's logits"""
    mamba_version: int = 2
    """2 (SSD) or 1 (selective scan)"""
    mamba_expand: int = 2
    """inner size of a Mamba block in units of hidden_size, where heads are not given"""
    mamba_d_state: int = 64
    """state size of a Mamba head (Mamba-1: of a channel)"""
    mamba_d_conv: int = 4
    """taps of the causal convolution"""
    mamba_head_dim: int = 64
    """channels of a Mamba-2 head"""
    mamba_num_heads: int | None = None
    """Mamba-2 heads; null means expand * hidden_size / mamba_head_dim"""
    mamba_num_groups: int = 1
    """groups that share B and C (Mamba-2)"""
    mamba_chunk_size: int = 128
    """most tokens of one chunk of the SSD; a CPU takes at most max(64, mamba_d_state)"""
    mamba_use_mlp: bool = False
    """an elastic MLP behind the Mamba mixer in every M block"""
    widths: list[int] | None = None
    """ascending nested widths; the last is hidden_size, or the largest of layer_widths; null means hidden_size alone"""
    ffn_granule: int = 64
    """FFN rows of one unit; ffn_size must be a multiple of it"""
    nest: list[NestRow] | None = None
    """the table itself, one row a width; null fills it by the rules; what a checkpoint holds is what counts"""
    layer_widths: list[int] | None = None
    """each block's own largest width: its elastic weights end there, and a plan that asks for more gets that; `widths`
    ends at the largest of them, and heads, KV groups and FFN rows are those of the widest block; null means hidden_size
    for all"""
    gate_size: int = 0
    """hidden units of each gate and of the difficulty estimator, which are no part of the model's own computation; 0:
    there are none"""
    estimator_reference: int | None = None
    """channels that a difficulty of 1 asks for; an expansion keeps the old ones, so that it changes no choice; null
    means hidden_size"""
    expanded_from: dict[str, int] | None = None
    """sizes before surgery made the model wider; phase 3 tells old weights from new ones by them"""
    end_tokens: list[int] | None = None
    """ids that end a text where the model generates; null means the tokenizer's end-of-document token, an empty
    list that none does"""
    modes: dict[str, int] = field(default_factory=_default_modes)
    """names for widths; `think` is all of hidden_size; below 2048 scaled by hidden_size / 2048 to the nearest width"""

    def check(self) -> None:
        """Rules that one field can break by itself. Raises ConfigError."""
        self._check_largest()
        for name in (
            "hidden_size",
            "head_dim",
            "mamba_expand",
            "mamba_d_state",
            "mamba_head_dim",
            "mamba_num_groups",
            "mamba_chunk_size",
            "ffn_granule",
            "norm_eps",
            "experts_per_token",
        ):
            positive(f"--model.{name}", getattr(self, name), usual(self, name))
        for name in (
            "num_layers",
            "vocab_size",
            "num_heads",
            "num_kv_groups",
            "static_norm_size",
            "sliding_window",
            "mamba_num_heads",
            "expert_ffn_size",
        ):
            if getattr(self, name) is not None:
                positive(f"--model.{name}", getattr(self, name), usual(self, name))
        self._check_rope()
        for token in self.end_tokens or []:
            in_range("--model.end_tokens", token, 0, self.vocab_size - 1 if self.vocab_size else 2**40)
        for name in (
            "logit_softcap",
            "num_experts",
            "gate_size",
            "expert_gate_limit",
            "router_balance_weight",
            "router_z_weight",
        ):
            at_least(f"--model.{name}", getattr(self, name), 0, usual(self, name))
        one_of("--model.activation", self.activation, ("relu2", "swiglu"))
        one_of("--model.rope_sign", self.rope_sign, (1, -1))
        one_of("--model.mamba_version", self.mamba_version, (1, 2))
        one_of("--model.mamba_d_conv", self.mamba_d_conv, (2, 3, 4))
        if not self.window_pattern:
            raise ConfigError("--model.window_pattern '': is empty; L lets every attention layer see all keys")
        for letter in self.window_pattern:
            one_of("--model.window_pattern", letter, ("S", "L"))

    def _check_largest(self) -> None:
        """Before anything is derived or laid out from a size, or tried out for its divisors."""
        for name, largest in _LARGEST.items():
            found = getattr(self, name)
            for value in found if isinstance(found, list) else [found]:
                if value is not None and value > largest:
                    raise ConfigError(f"--model.{name} {value}: must be at most {largest}")
        for name in ("block_pattern", "window_pattern", "widths", "layer_widths", "head_dim_steps", "nest", "modes"):
            if len(getattr(self, name) or ()) > _LONGEST:
                raise ConfigError(f"--model.{name}: must have at most {_LONGEST} entries")

    def _check_rope(self) -> None:
        for name in ("theta", "beta_fast", "beta_slow"):
            value = getattr(self, f"rope_{name}")
            if not 0 < value < math.inf:
                raise ConfigError(f"--model.rope_{name} {value}: must be above 0 and finite")
        for name in ("rope_original_context", "rope_factor"):
            in_range(f"--model.{name}", getattr(self, name), 1, 2**40, usual(self, name))
        if self.rope_factor > 1:
            steps = self.head_dim_steps or [self.head_dim]
            sizes = [after - before for before, after in zip([0, *steps], steps)]
            betas = self.rope_beta_fast, self.rope_beta_slow
            check_yarn(sizes, self.rope_theta, self.rope_original_context, *betas)
