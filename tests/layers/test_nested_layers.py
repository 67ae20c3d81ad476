"""Elastic blocks against dense ones built from their sliced weights."""

from __future__ import annotations

import pytest
import torch
from oracles.dense import attention_block, check_gradients, cut, near, randomize, used_part

from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.config.model import ModelConfig, NestRow
from megatron_adamba.layers.block import AttentionBlock
from megatron_adamba.layers.context import ForwardContext
from megatron_adamba.layers.norm import NestedNorm
from megatron_adamba.ops.attention import attention_mask
from megatron_adamba.ops.nested_linear import Accumulation
from megatron_adamba.ops.rotary import rotary_table

WIDTHS = (8, 21, 48)
VARIANTS = {
    "plain": {},
    "biases": {"linear_bias": True},
    "swiglu with biases": {"linear_bias": True, "activation": "swiglu"},
    "multi-head": {"num_kv_groups": 6, "activation": "swiglu"},
    "one group": {"num_kv_groups": 1, "linear_bias": True},
    "no qk-norm": {"qk_norm": False, "linear_bias": True},
    "no norm weights": {"norm_weight": False, "rope_sign": -1, "rope_theta": 100.0},
    "window": {"sliding_window": 3, "window_pattern": "S", "linear_bias": True},
    "packed": {"linear_bias": True},
    "packed with a window": {"sliding_window": 4, "window_pattern": "S", "qk_norm": False},
}


def block_config(**changes) -> ModelConfig:
    """Norm sizes that are not the widths, and KV groups and rows that no rule would give."""
    values = {"num_heads": 6, "num_kv_groups": 3, **changes}
    groups = values["num_kv_groups"]
    nest = [
        NestRow(8, 5, 1, 16),
        NestRow(21, 30, min(2, groups), 48),
        NestRow(48, 29, groups, 96),
    ]
    shape = {"hidden_size": 48, "block_pattern": "T", "vocab_size": 7, "head_dim": 10, "ffn_size": 96}
    return resolve_model(ModelConfig(**shape, ffn_granule=16, nest=nest, **values))


def documents_of(name: str) -> torch.Tensor | None:
    return torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 2, 2, 2, 2, 2, 3]]) if "packed" in name else None


def context_of(config: ModelConfig, seq: int, window: int | None, documents, accumulation=Accumulation.DIRECT):
    positions = torch.arange(seq)
    cos, sin = rotary_table(positions, config.head_dim, config.rope_theta, config.rope_sign)
    masks = {window: attention_mask(positions, positions, window, documents)}
    return ForwardContext(accumulation, cos, sin, masks, documents)


def random_block(config: ModelConfig) -> AttentionBlock:
    block = AttentionBlock(config, config.sliding_window)
    randomize(block, seed=3)
    return block


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_at_width_w_is_the_dense_block_of_its_slices(variant, width):
    config, documents = block_config(**VARIANTS[variant]), documents_of(variant)
    row = next(row for row in config.nest if row.width == width)
    block = random_block(config)
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(2, 9, 48, generator=generator).requires_grad_()
    cotangent = torch.randn(x.shape, generator=generator)

    got = block(x, row, context_of(config, 9, config.sliding_window, documents))
    got.backward(cotangent)

    p = cut(config, lambda name: row, block)
    x64 = x.detach().double().requires_grad_()
    want = attention_block(x64, p, config, row, config.sliding_window, documents)
    want.backward(cotangent.double())

    near(got, want)
    near(x.grad, x64.grad)
    check_gradients(config, lambda name: row, block, p)
    assert torch.equal(got[..., width:], x[..., width:])
    assert torch.equal(x.grad[..., width:], cotangent[..., width:])


def test_the_dense_block_leaves_nothing_out():
    """Every parameter has a part that its row uses, and the widest row uses all but the other widths' gains."""
    config = block_config(linear_bias=True, activation="swiglu")
    block = random_block(config)
    for name, parameter in block.named_parameters():
        for row in config.nest:
            assert used_part(config, row, name) and parameter[used_part(config, row, name)].numel()
        if not name.endswith("gain"):
            assert parameter[used_part(config, config.nest[-1], name)].shape == parameter.shape


@pytest.mark.parametrize("accumulation", [Accumulation.DEFER, Accumulation.HAND_OVER])
def test_a_block_hands_over_the_sum_of_its_micro_batches(accumulation):
    """Micro-batches of all widths, the last of which may be narrow: the sum is that of handing over each time."""
    config = block_config(linear_bias=True, activation="swiglu")
    block, direct = random_block(config), random_block(config)
    for number, index in enumerate((2, 0, 1, 0)):
        generator = torch.Generator().manual_seed(number)
        x, cotangent = (torch.randn(2, 5, 48, generator=generator) for _ in range(2))
        row = config.nest[index]
        last = accumulation if number == 3 else Accumulation.DEFER
        block(x, row, context_of(config, 5, None, None, last)).backward(cotangent)
        direct(x, row, context_of(config, 5, None, None)).backward(cotangent)
    for name, parameter in block.named_parameters():
        want = direct.get_parameter(name).grad
        if accumulation is Accumulation.DEFER and "norm" not in name:
            assert parameter.grad is None, name  # the buffers hold it until somebody asks
        else:
            near(parameter.grad, want, what=name)


def test_an_idle_block_gives_zero_gradients():
    config = block_config(linear_bias=True)
    block = random_block(config)
    out = block(torch.zeros(0, 6, 48), config.nest[1], context_of(config, 6, None, None))
    out.sum().backward()
    assert out.shape == (0, 6, 48)
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


def test_a_frozen_block_passes_the_gradient_through():
    config = block_config()
    block, row = random_block(config), config.nest[1]
    x = torch.randn(1, 4, 48, requires_grad=True)
    block(x, row, context_of(config, 4, None, None)).sum().backward()
    want = x.grad.clone()
    block.requires_grad_(False).zero_grad()
    x.grad = None
    block(x, row, context_of(config, 4, None, None)).sum().backward()
    assert torch.equal(x.grad, want) and all(p.grad is None for p in block.parameters())


def test_a_width_outside_the_nest_is_an_error():
    norm = NestedNorm([4, 8], [4, 8], 1e-5, True)
    with pytest.raises(KeyError):
        norm(torch.ones(1, 5))
