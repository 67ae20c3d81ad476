"""FLOPs of the blueprint against those that torch counts while the model runs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_adamba.blueprint.flops import forward_flops, mean_keys
from megatron_adamba.blueprint.resolve import attention_windows, resolve_model
from megatron_adamba.blueprint.training_flops import training_costs
from megatron_adamba.config.model import ModelConfig, NestRow
from megatron_adamba.elastic.plan import ElasticPlan
from megatron_adamba.model.adamba import AdambaModel

SEQ = 12
WIDTHS = (8, 20, 32)


def in_place_product(total, left, right, *args, out_shape=None, **kwargs) -> int:
    return 2 * left[0] * left[1] * right[1]


def counted_matmuls(model: AdambaModel, plan: ElasticPlan, train: bool) -> int:
    """Of plain matrix products; torch counts no in-place ones by itself, and attention's are a kernel of their own."""
    tokens = torch.zeros(1, SEQ, dtype=torch.int64)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_product})
    with counter:
        if train:
            model(tokens, tokens, plan=plan, all_take_part=False).backward()
        else:
            with torch.no_grad():
                model(tokens, plan=plan)
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for operator, flops in counts.items() if "attention" not in str(operator))


def attention_products(config: ModelConfig, plan: ElasticPlan) -> float:
    """Scores and mixing over the keys that a causal query sees, for the whole sequence."""
    rows = {row.width: row for row in config.nest}
    total = 0
    for width, window in list(zip(plan.widths, attention_windows(config)))[: plan.exit_layer]:
        query = rows[width].kv_groups * config.num_heads // config.num_kv_groups * config.head_dim
        total += sum(4 * query * min(i + 1, window or SEQ) for i in range(SEQ))
    return total


def t_model(**changes) -> AdambaModel:
    nest = [NestRow(8, 5, 1, 16), NestRow(20, 20, 2, 32), NestRow(32, 29, 4, 96)]
    config = ModelConfig(
        hidden_size=32, block_pattern="TT", vocab_size=19, head_dim=6, num_heads=8, num_kv_groups=4, ffn_size=96,
        ffn_granule=16, nest=nest, **changes,
    )  # fmt: skip
    return AdambaModel(resolve_model(config)).initialize(0)


@pytest.mark.parametrize("widths", [*((w, w) for w in WIDTHS), (8, 32)])
@pytest.mark.parametrize(
    "changes", [{}, {"activation": "swiglu"}, {"sliding_window": 3, "window_pattern": "SL"}], ids=str
)
def test_the_matrix_products_that_run_are_those_that_are_counted(changes, widths):
    model = t_model(**changes)
    for exit_layer in (1, 2):
        plan = ElasticPlan(widths, exit_layer)
        expected = forward_flops(model.config, widths, SEQ, exit_layer) * SEQ
        products = attention_products(model.config, plan)
        # a token's share of the attention is rounded down to whole FLOPs, in each block
        assert 0 <= counted_matmuls(model, plan, train=False) + products - expected <= SEQ * exit_layer
        expected = training_costs(model.config, SEQ).of(widths, exit_layer) * SEQ
        assert 0 <= counted_matmuls(model, plan, train=True) + 3 * products - expected <= 3 * SEQ * exit_layer


def test_a_narrow_width_costs_its_share():
    """(w / H)^2 of an elastic layer, as KV groups and rows shrink with it; the head stays."""
    config = resolve_model(
        ModelConfig(hidden_size=2048, num_layers=4, vocab_size=1000, head_dim=64, widths=[128, 512, 1024, 2048])
    )
    head = 2 * 2048 * 1000
    full = forward_flops(config, (2048,) * 4, 1) - head
    for width in config.widths:
        share = (forward_flops(config, (width,) * 4, 1) - head) / full
        assert share == pytest.approx((width / 2048) ** 2, rel=0.01)


@pytest.mark.parametrize("version", [1, 2])
def test_mamba_costs_the_same_at_every_width(version):
    config = resolve_model(
        ModelConfig(block_pattern="MM", vocab_size=50, widths=[64, 256], mamba_version=version, mamba_use_mlp=False)
    )
    narrow, full = forward_flops(config, (64, 64), 128), forward_flops(config, (256, 256), 128)
    assert narrow == full
    # its projections alone: in, out, and what is in between is less than as much again
    inner = 512
    projections = 2 * (2 * 256 * 2 * inner + 2 * inner * 256) + 2 * 256 * 50
    assert projections < full < 2 * projections
    with_mlp = resolve_model(
        ModelConfig(block_pattern="MM", vocab_size=50, widths=[64, 256], mamba_version=version, mamba_use_mlp=True)
    )
    extra = forward_flops(with_mlp, (64, 256), 128) - full
    assert extra == 4 * (64 * 256 + 256 * 1024)


@pytest.mark.parametrize(("seq_len", "window"), list(itertools.product([1, 2, 7, 64], [None, 1, 2, 6, 64, 100])))
def test_keys_of_an_average_query(seq_len, window):
    seen = [min(i + 1, window or seq_len) for i in range(seq_len)]
    assert mean_keys(seq_len, window) == pytest.approx(sum(seen) / seq_len)
