"""Dense layers in float64, written from the formulas: what an elastic layer must be equal to at each of its widths.

Nothing here slices: a width's layer is built from weights that were cut beforehand (`cut`), so that it could not see
anything outside even by mistake. Only the Mamba mixers inside `dense_loss` are the project's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_adamba.config.model import ModelConfig, NestRow


def near(got: Tensor, want: Tensor, tolerance: float = 1e-5, what: str = "") -> None:
    """Equal up to `tolerance` of the largest magnitude; where all is zero, exactly."""
    assert got.shape == want.shape, what
    if want.numel():
        worst, size = (got.double() - want.double()).abs().max(), want.double().abs().max()
        assert worst <= tolerance * size, f"{what}: off by {worst / size:.2e} of the largest magnitude"


def randomize(module: nn.Module, seed: int) -> None:
    """Weights of working size, and gains, norm weights and biases far from their neutral values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            leaf = name.rsplit(".", 1)[-1]
            if leaf in ("dt_bias", "A_log") or name.endswith("dt_proj.bias"):
                parameter.copy_(noise.abs() - (0 if leaf == "A_log" else 2))
            elif leaf == "gain" or name.endswith("norm.weight") or leaf == "D":
                parameter.copy_(1 + 0.4 * noise)
            elif parameter.dim() == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(0.3 * noise)


def used_part(config: ModelConfig, row: NestRow, name: str) -> tuple[slice, ...]:
    """The part of a full parameter that a model of this row uses; everything, for static parts."""
    query = row.kv_groups * config.num_heads // config.num_kv_groups * config.head_dim
    key, width, ffn = row.kv_groups * config.head_dim, row.width, row.ffn
    owner, leaf = name.rsplit(".", 1) if "." in name else ("", name)
    if owner.endswith(("attention_norm", "mlp_norm")):
        index = [each.width for each in config.nest].index(width)
        return (slice(0, width),) if leaf == "weight" else (slice(index, index + 1),)
    sizes = {
        "q": (query, width),
        "k": (key, width),
        "v": (key, width),
        "o": (width, query),
        "gate": (ffn, width),
        "up": (ffn, width),
        "down": (width, ffn),
    }
    first, _, kind = leaf.partition("_")
    if kind not in ("weight", "bias") or first not in sizes:
        return ()
    return tuple(slice(0, size) for size in sizes[first][: 1 if kind == "bias" else 2])


def cut(config: ModelConfig, rows: Callable[[str], NestRow], module: nn.Module) -> dict[str, Tensor]:
    """Leaves in float64 that hold what each parameter's row uses of it."""
    return {
        name: parameter.detach()[used_part(config, rows(name), name)].double().clone().requires_grad_()
        for name, parameter in module.named_parameters()
    }


def check_gradients(
    config: ModelConfig, rows: Callable[[str], NestRow], module: nn.Module, dense: dict[str, Tensor]
) -> None:
    """Each parameter's gradient is the dense one in its slice and exactly zero around it."""
    for name, parameter in module.named_parameters():
        part = used_part(config, rows(name), name)
        want = dense[name].grad
        near(parameter.grad[part], torch.zeros_like(dense[name]) if want is None else want, what=name)
        outside = parameter.grad.clone()
        outside[part] = 0
        assert not outside.any(), name


def norm(x: Tensor, weight: Tensor | None, gain: Tensor | float, norm_size: int, eps: float) -> Tensor:
    y = x / torch.sqrt((x * x).sum(-1, keepdim=True) / norm_size + eps)
    return gain * y if weight is None else gain * weight * y


def rotary(x: Tensor, theta: float, sign: int) -> Tensor:
    """x: [batch, seq, heads, head_dim]; the halves are real and imaginary parts, turned as complex numbers."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), sign * angle)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def causal_softmax(scores: Tensor, window: int | None, documents: Tensor | None) -> Tensor:
    """scores: [batch, seq, seq] of one head; documents: [batch, seq]."""
    batch, seq, _ = scores.shape
    allowed = torch.zeros(batch, seq, seq, dtype=torch.bool)
    for i in range(seq):
        for j in range(i + 1):
            same = True if documents is None else documents[:, i] == documents[:, j]
            allowed[:, i, j] = same if window is None or i - j < window else False
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1)


def linear(x: Tensor, p: dict[str, Tensor], prefix: str) -> Tensor:
    y = x @ p[f"{prefix}_weight"].T
    return y + p[f"{prefix}_bias"] if f"{prefix}_bias" in p else y


def attention(u: Tensor, p: dict[str, Tensor], config: ModelConfig, window: int | None, documents) -> Tensor:
    """As many heads as the weights have rows for, one by one."""
    q, k, v = (linear(u, p, f"attention.qkv.{name}").unflatten(-1, (-1, config.head_dim)) for name in "qkv")
    q, k = (rotary(t, config.rope_theta, config.rope_sign) for t in (q, k))
    if config.qk_norm:
        q, k = (norm(t, None, 1.0, config.head_dim, config.norm_eps) for t in (q, k))
    shared = config.num_heads // config.num_kv_groups
    heads = []
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // shared].transpose(1, 2) / config.head_dim**0.5
        heads.append(causal_softmax(scores, window, documents) @ v[:, :, head // shared])
    return linear(torch.cat(heads, dim=-1), p, "attention.out.o")


def mlp(u: Tensor, p: dict[str, Tensor], config: ModelConfig) -> Tensor:
    up = linear(u, p, "mlp.up.up")
    if config.activation == "swiglu":
        gate = linear(u, p, "mlp.up.gate")
        inner = gate * torch.sigmoid(gate) * up
    else:
        inner = up.clamp(min=0) ** 2
    return linear(inner, p, "mlp.down.down")


def nested_part(x: Tensor, p: dict[str, Tensor], config: ModelConfig, row: NestRow, name: str, f) -> Tensor:
    """x[:w] + f(norm(x[:w])), the rest as it was."""
    head, tail = x[..., : row.width], x[..., row.width :]
    u = norm(head, p.get(f"{name}_norm.weight"), p[f"{name}_norm.gain"], row.norm_size, config.norm_eps)
    return torch.cat([head + f(u), tail], dim=-1)


def attention_block(
    x: Tensor, p: dict[str, Tensor], config: ModelConfig, row: NestRow, window: int | None, documents: Tensor | None
) -> Tensor:
    """A T block whose weights `p` were cut to `row`."""
    x = nested_part(x, p, config, row, "attention", lambda u: attention(u, p, config, window, documents))
    return nested_part(x, p, config, row, "mlp", lambda u: mlp(u, p, config))


def below(p: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix + "."): value for name, value in p.items() if name.startswith(prefix + ".")}


class DenseModel:
    """A whole model of one row per block, cut out of an elastic one."""

    def __init__(self, model: nn.Module, widths: tuple[int, ...], windows: list[int | None]) -> None:
        self.config: ModelConfig = model.config
        by_width = {row.width: row for row in self.config.nest}
        self.rows = [by_width[width] for width in widths]
        self.windows = windows
        self.p = cut(self.config, self.row_of, model)
        self.mixers = {
            index: copy.deepcopy(block.mixer) for index, block in enumerate(model.blocks) if hasattr(block, "mixer")
        }

    def row_of(self, name: str) -> NestRow:
        return self.rows[int(name.split(".")[1])] if name.startswith("blocks.") else self.config.nest[-1]

    def logits(
        self,
        tokens: Tensor,
        seq_idx: Tensor | None = None,
        exit_layer: int | None = None,
        exits: list[int] | None = None,
    ) -> Tensor:
        """exits: blocks that run for each position, where they differ."""
        config = self.config
        exits = exits or [config.num_layers] * tokens.shape[1]
        x = self.p["embedding.weight"][tokens]
        if config.embedding_norm:
            x = norm(x, None, 1.0, config.static_norm_size, config.norm_eps)
        for index, letter in enumerate(config.block_pattern[:exit_layer]):
            y = self._block(x, index, letter, seq_idx)
            x = torch.stack([(y if index < last else x)[:, place] for place, last in enumerate(exits)], dim=1)
        x = self._static(x, below(self.p, "final_norm"))
        logits = x @ self.p["embedding.weight" if config.tie_embeddings else "head.weight"].T
        cap = config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def _block(self, x: Tensor, index: int, letter: str, seq_idx: Tensor | None) -> Tensor:
        p, row, config = below(self.p, f"blocks.{index}"), self.rows[index], self.config
        if letter == "T":
            return attention_block(x, p, config, row, self.windows[index], seq_idx)
        u = self._static(x, below(p, "mixer_norm"))
        mixer = self.mixers[index]
        x = x + mixer(u.to(mixer.out_proj.weight.dtype), seq_idx=seq_idx).double()
        return nested_part(x, p, config, row, "mlp", lambda u: mlp(u, p, config)) if config.mamba_use_mlp else x

    def _static(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        return norm(x, p.get("weight"), p["gain"], self.config.static_norm_size, self.config.norm_eps)

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        seq_idx: Tensor | None = None,
        exit_layer: int | None = None,
        exits: list[int] | None = None,
    ):
        return F.cross_entropy(self.logits(tokens, seq_idx, exit_layer, exits).flatten(0, 1), labels.flatten())

    def leaves(self) -> dict[str, Tensor]:
        """All parameters by canonical name, with the gradients of the last backward pass."""
        leaves = dict(self.p)
        for index, mixer in self.mixers.items():
            leaves |= {f"blocks.{index}.mixer.{name}": parameter for name, parameter in mixer.named_parameters()}
        return leaves
