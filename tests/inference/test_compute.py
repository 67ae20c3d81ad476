"""FLOPs of tokens that leave and widen against those that torch counts while they are decoded."""

from __future__ import annotations

import pytest
import torch
from inference.decoding import loaded_model, random_gates, random_model
from torch.utils.flop_counter import FlopCounterMode

from megatron_adamba.blueprint.adaptive_flops import predictor_flops
from megatron_adamba.blueprint.flops import forward_flops
from megatron_adamba.elastic.confidence import GateReading
from megatron_adamba.elastic.plan import ElasticPlan, full_plan, uniform_plan
from megatron_adamba.inference.compute import ComputeMeter
from megatron_adamba.inference.decoder import Decoder
from megatron_adamba.inference.modes import prompt_scores, width_shares
from megatron_adamba.inference.policy import AdaptivePolicy, ComputePolicy, predicted_widths

POLICY = AdaptivePolicy(exit_threshold=0.4, expand_cost=0.5, min_exit_layer=2)


def counted(function, *arguments):
    """FLOPs of matrix products but attention's, which the library's kernel keeps to itself, and the result."""
    with FlopCounterMode(display=False) as counter:
        result = function(*arguments)
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for operator, flops in counts.items() if "attention" not in str(operator)), result


@pytest.mark.parametrize("widths", [(8,) * 8, (16, 8, 32, 16, 8, 8, 16, 32), (32,) * 8])
def test_a_decoded_token_costs_what_is_counted(widths):
    """A step of one token whose attention has one key to see."""
    model = random_model(block_pattern="TTTTTTTT", num_kv_groups=4, gate_size=8)
    gates, config = random_gates(model), model.config
    policy = ComputePolicy(ElasticPlan(widths, 8), POLICY)
    meter, taken = ComputeMeter(config, policy, 1), set()
    for token in range(37):
        decoder = Decoder(model, 1, 4, gates, GateReading("relative", 1.0))
        decoder.begin(0, policy)
        flops, found = counted(decoder.step, [0], torch.tensor([token]))
        exit_layer, widened_at = int(found.exit_layers), int(found.widened_at)
        rows = [
            model.rows[index][meter.wide_widths[index] if index >= widened_at else widths[index]]
            for index in range(exit_layer)
        ]
        attention = sum(4 * row.kv_groups * config.head_dim * (config.num_heads // 4) for row in rows)
        assert flops + attention == meter.of(exit_layer, widened_at)
        assert meter.mean_width(exit_layer, widened_at) == sum(row.width for row in rows) / len(rows)
        taken.add((exit_layer, widened_at < 8))
    assert len({exit_layer for exit_layer, _ in taken}) >= 3
    assert widths[-1] == 32 or any(wide for _, wide in taken)


@pytest.mark.parametrize("version", [1, 2])
def test_mamba_blocks_that_are_skipped_cost_their_state(version):
    """Products of projections alone differ by what makes the output: z and out_proj, and scan and norm beside them."""
    model = random_model(block_pattern="MMMM", mamba_version=version, mamba_use_mlp=False, gate_size=8)
    meter = ComputeMeter(model.config, ComputePolicy(full_plan(model.config), POLICY), 1)
    early, late = meter.of(2, 4), meter.of(4, 4)
    gates = 2 * 8 * 33
    assert meter.of(4, 4) == forward_flops(model.config, (32,) * 4, 1) + 2 * gates + gates
    inner = 64
    least = 2 * (2 * 32 * inner + 2 * inner * 32) + gates
    assert least < late - early < 2 * least


def test_fixed_plans_pay_no_gates():
    model = random_model(block_pattern="TMT", gate_size=8)
    plan = uniform_plan(model.config, 16, exit_layer=2)
    meter = ComputeMeter(model.config, ComputePolicy(plan), 9)
    assert meter.of(2, 3) == forward_flops(model.config, plan.widths, 9, 2) and meter.once == 0
    assert meter.full == forward_flops(model.config, (32,) * 3, 9)
    assert meter.total([2, 2], [3, 3]) == 2 * meter.of(2, 3)


def test_the_estimator_is_paid_once():
    model = random_model(block_pattern="TMT", gate_size=8)
    meter = ComputeMeter(model.config, ComputePolicy(full_plan(model.config), POLICY), 9, predicted=True)
    gates = random_gates(model)
    assert counted(gates.scores, torch.zeros(1, 32))[0] == predictor_flops(model.config) == meter.once
    assert meter.total([3, 2], [3, 3]) == meter.once + meter.of(3, 3) + meter.of(2, 3)


def test_widths_from_scores():
    config = random_model(block_pattern="TTTT").config
    none = torch.zeros(0)
    assert predicted_widths(config, torch.tensor([0.0, 0.25, 0.26, 1.0]), 4.0, none, None) == (8, 8, 16, 32)
    shares = torch.tensor([[0.01, 0.05, 0.2]] * 4, dtype=torch.float64)
    scores = torch.tensor([0.0, 0.02, 0.5, 1.0])
    assert predicted_widths(config, scores, 4.0, shares, 0.0) == (8, 32, 32, 32)
    assert predicted_widths(config, scores, 4.0, shares, 1.0) == (8, 8, 32, 32)
    assert predicted_widths(config, scores, 4.0, shares, 1e6) == (8, 8, 8, 8)
    assert predicted_widths(config, scores, 4.0, shares, float("inf")) == (8, 8, 8, 8)
    assert predicted_widths(config, scores, 4.0, shares, float("inf"), 9) == (16, 16, 16, 16)
    assert predicted_widths(config, scores, 4.0, shares, 1.0, 9) == (16, 16, 32, 32)
    assert predicted_widths(config, torch.tensor([0.0, 0.25, 0.26, 1.0]), 4.0, none, None, 16) == (16, 16, 16, 32)
    assert predicted_widths(config, scores, 4.0, shares, 1e6, 1000) == (32, 32, 32, 32)
    for score, price in ((0.3, 3.0), (0.9, 7.0), (0.1, 0.5)):
        costs = [4 * score * (1 - w / 32) ** 2 + price * share for w, share in zip((8, 16, 32), (0.01, 0.05, 0.2))]
        (chosen, *_) = predicted_widths(config, torch.full((4,), score), 4.0, shares, price)
        assert chosen == (8, 16, 32)[costs.index(min(costs))]


def test_shares_of_the_models_compute():
    config = random_model(block_pattern="TMT").config
    shares = width_shares(config, 9)
    head = 2 * 32 * 37 / forward_flops(config, (32,) * 3, 9)
    assert shares[:, -1].sum() + head == pytest.approx(1, abs=1e-3)
    assert (shares[0].diff() > 0).all()


def test_scores_read_the_beginning_of_a_prompt_alone():
    model = random_model(block_pattern="TMT", gate_size=8)
    loaded = loaded_model(model, random_gates(model), prompt_tokens=4)
    first = prompt_scores(loaded, [1, 2, 3, 4, 5, 6])
    assert torch.equal(first, prompt_scores(loaded, [1, 2, 3, 4, 30, 31])) and first.shape == (3,)
    assert not torch.equal(first, prompt_scores(loaded, [1, 2, 3]))
    mean = model.embedding.weight[[1, 2, 3, 4]].mean(0)
    assert torch.allclose(first, loaded.gates.scores(mean))
