"""Decoding with caches against passes over whole sequences by the same rules: exits, widths, windows, ragged rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_marks import NEEDS_CUDA
from inference.decoding import TOLERANCE, VOCAB, WIDTHS, random_gates, random_model

from megatron_adamba.elastic.confidence import GateReading
from megatron_adamba.elastic.plan import ElasticPlan, full_plan, uniform_plan
from megatron_adamba.inference.adaptive import run_adaptively
from megatron_adamba.inference.decoder import Decoder
from megatron_adamba.inference.policy import NEVER, AdaptivePolicy, ComputePolicy, doubled_widths

RELATIVE = GateReading("relative", 1.0)
MODELS = {
    "hybrid": {"block_pattern": "TMTMTMTT", "num_kv_groups": 4},
    "hybrid of mamba 1, tied": {
        "block_pattern": "MTMTMTTM",
        "mamba_version": 1,
        "tie_embeddings": True,
        "logit_softcap": 9.0,
    },
    "windows and sinks": {
        "block_pattern": "TTTTTTTT",
        "sliding_window": 3,
        "window_pattern": "SL",
        "num_kv_groups": 2,
        "attention_sinks": True,
        "linear_bias": True,
    },
    "experts": {
        "block_pattern": "EEEMEEEE",
        "num_kv_groups": 2,
        "num_experts": 4,
        "experts_per_token": 2,
        "expert_ffn_size": 32,
        "sliding_window": 4,
        "window_pattern": "LS",
    },
    "mamba": {"block_pattern": "MMMM", "mamba_use_mlp": True},
}
MIXED = (
    (8, 32, 16, 8, 16, 32, 8, 16),
    (16, 8, 8, 32, 8, 8, 16, 8),
    (32, 16, 32, 8, 32, 16, 8, 8),
    (16, 16, 8, 8, 8, 32, 32, 32),
)


def gated_model(**changes):
    model = random_model(gate_size=8, **changes)
    return model, random_gates(model)


def random_sequences(lengths, seed: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]


def reference(model, gates, reading, tokens, plan, policy):
    """Logits [seq, vocab] and what each token took, without caches."""
    x, trace = run_adaptively(model, gates, reading, tokens[None], [plan], policy)
    return model.logits(x)[0], trace.exit_layers[0], trace.widened_at[0]


POLICY = AdaptivePolicy(exit_threshold=0.4, expand_cost=0.5, min_exit_layer=1)


CUDA_TOLERANCE = 2e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("name", MODELS)
def test_a_ragged_batch_equals_the_reference(name, device):
    """Prompts of different lengths, fed at once, then token by token together; each with widths of its own."""
    model, gates = gated_model(**MODELS[name])
    model, gates = model.to(device), gates.to(device)
    tolerance = CUDA_TOLERANCE if device == "cuda" else TOLERANCE
    depth = model.config.num_layers
    prompts, steps = (1, 4, 9, 6), 7
    sequences = [tokens.to(device) for tokens in random_sequences([length + steps for length in prompts])]
    decoder = Decoder(model, 5, 20, gates, RELATIVE)
    plans = [ElasticPlan(widths[:depth], depth) for widths in MIXED]
    slots = [3, 0, 1, 4]
    expected = [
        reference(model, gates, RELATIVE, tokens, plan, POLICY) for tokens, plan in zip(sequences, plans, strict=True)
    ]
    for slot, tokens, plan, length, (logits, exits, widened) in zip(slots, sequences, plans, prompts, expected):
        decoder.begin(slot, ComputePolicy(plan, POLICY))
        decoded = decoder.prefill(slot, tokens[:length])
        assert torch.equal(decoded.exit_layers, exits[:length]) and torch.equal(decoded.widened_at, widened[:length])
        assert (decoded.logits[0] - logits[length - 1]).abs().max() <= tolerance
    for step in range(steps):
        fed = torch.stack([tokens[length + step] for tokens, length in zip(sequences, prompts)])
        decoded = decoder.step(slots, fed)
        for row, (length, (logits, exits, widened)) in enumerate(zip(prompts, expected)):
            assert decoded.exit_layers[row] == exits[length + step]
            assert decoded.widened_at[row] == widened[length + step]
            assert (decoded.logits[row] - logits[length + step]).abs().max() <= tolerance
    every_exit = torch.cat([exits for _, exits, _ in expected])
    assert len(set(every_exit.tolist())) >= 3 and (every_exit == depth).any()
    if "M" not in name and name != "mamba":
        assert any(((widened < depth) & (exits > widened)).any() for _, exits, widened in expected)


def test_policies_stand_side_by_side():
    """Adaptive, full, fixed and leaving sequences in one batch."""
    model, gates = gated_model(block_pattern="TMTMTT", num_kv_groups=4)
    policies = [
        ComputePolicy(full_plan(model.config)),
        ComputePolicy(ElasticPlan((8, 16, 8, 8, 16, 8), 6), POLICY),
        ComputePolicy(uniform_plan(model.config, 8)),
        ComputePolicy(uniform_plan(model.config, 16, exit_layer=3)),
        ComputePolicy(ElasticPlan((16,) * 6, 6), replace(POLICY, exit_threshold=1.0)),
    ]
    sequences = random_sequences([12, 9, 10, 12, 8])
    decoder = Decoder(model, 5, 12, gates, RELATIVE)
    for slot, (policy, tokens) in enumerate(zip(policies, sequences)):
        decoder.begin(slot, policy)
        decoder.prefill(slot, tokens[: len(tokens) - 5])
    for step in range(5):
        decoded = decoder.step(range(5), torch.stack([tokens[len(tokens) - 5 + step] for tokens in sequences]))
        for slot, (policy, tokens) in enumerate(zip(policies, sequences)):
            so_far = tokens[: len(tokens) - 4 + step]
            if policy.adaptive is None:
                want = model(so_far[None], plan=policy.plan)[0, -1]
            else:
                want = reference(model, gates, RELATIVE, so_far, policy.plan, policy.adaptive)[0][-1]
            assert (decoded.logits[slot] - want).abs().max() <= TOLERANCE
    assert decoded.exit_layers[[0, 2, 3]].tolist() == [6, 6, 3]


@pytest.mark.parametrize("target", ["relative", "absolute"])
def test_a_slot_is_used_again(target):
    model, gates = gated_model(block_pattern="TMTT", sliding_window=3, window_pattern="SL", num_kv_groups=4)
    decoder = Decoder(model, 1, 70, gates, GateReading(target, 1.0))
    for number, width in enumerate((32, 8, 16)):
        (tokens,) = random_sequences([9 + 3 * number], seed=number)
        plan = uniform_plan(model.config, width)
        decoder.begin(0, ComputePolicy(plan, POLICY))
        decoder.prefill(0, tokens[:5])
        for place in range(5, len(tokens)):
            decoded = decoder.step([0], tokens[place : place + 1])
        logits, exits, _ = reference(model, gates, GateReading(target, 1.0), tokens, plan, POLICY)
        assert (decoded.logits[0] - logits[-1]).abs().max() <= TOLERANCE and decoded.exit_layers[0] == exits[-1]


@pytest.mark.parametrize("reading", [RELATIVE, GateReading("absolute", 1.0)])
def test_nobody_leaves_or_widens_is_a_plain_plan(reading):
    model, gates = gated_model(block_pattern="TMTMT")
    (tokens,) = random_sequences([11])
    never = AdaptivePolicy(exit_threshold=1.0, expand_cost=NEVER if reading.target == "relative" else 0.0)
    plan = ElasticPlan((8, 16, 32, 8, 16), 5)
    logits, exits, widened = reference(model, gates, reading, tokens, plan, never)
    assert (logits - model(tokens[None], plan=plan)[0]).abs().max() <= 1e-5
    assert (exits == 5).all() and (widened == 5).all()


def test_all_leave_at_one_layer_is_a_plan_that_leaves():
    model, gates = gated_model(block_pattern="TMTMT")
    (tokens,) = random_sequences([11])
    policy = AdaptivePolicy(exit_threshold=0.0, min_exit_layer=3)
    with torch.no_grad():
        gates.blocks[2].confidence_gate.down.bias.fill_(-50.0)
    plan = ElasticPlan((8, 16, 32, 8, 16), 5)
    logits, exits, _ = reference(model, gates, RELATIVE, tokens, plan, policy)
    assert (logits - model(tokens[None], plan=replace(plan, exit_layer=3))[0]).abs().max() <= 1e-5
    assert (exits == 3).all()


def test_one_token_that_leaves_alone():
    """Token 4 leaves behind block 2 of a model without Mamba: its residual stays, its keys go on; in float64."""
    model, gates = gated_model(block_pattern="TTTT", num_kv_groups=2)
    model, gates = model.double(), gates.double()
    (tokens,) = random_sequences([8])
    plan = full_plan(model.config)
    context = model.training_context(tokens[None], None)
    x = model.embedding(tokens[None])
    for index, block in enumerate(model.blocks):
        y = block(x, model.rows[index][32], context)
        if index >= 2:
            y[0, 4] = x[0, 4]
        x = y
    want = model.logits(x)[0]

    class OneLeaves(AdaptivePolicy):
        def leaves(self, gates, reading, blocks, x):
            return (torch.arange(x.shape[-2]) == 4).expand(x.shape[:-1]) & (blocks == 2)

    policy = OneLeaves(exit_threshold=0.5, expand_cost=NEVER)
    logits, exits, _ = reference(model, gates, RELATIVE, tokens, plan, policy)
    assert (logits - want).abs().max() <= 1e-12 and exits.tolist() == [4, 4, 4, 4, 2, 4, 4, 4]
    decoder = Decoder(model, 1, 8, gates, RELATIVE)
    decoder.begin(0, ComputePolicy(plan, policy))
    assert (decoder.prefill(0, tokens).logits[0] - want[-1]).abs().max() <= 1e-12


def test_heads_that_earlier_tokens_did_not_compute_are_hidden():
    """A later turn at a wider row sees, in each head, only tokens that have it; by hand in float64."""
    model = random_model(block_pattern="TT", num_kv_groups=4).double()
    first, second = random_sequences([5, 4])
    decoder = Decoder(model, 2, 70)
    decoder.begin(0, ComputePolicy(uniform_plan(model.config, 8)))
    decoder.prefill(0, first)
    decoder.change_policy(0, ComputePolicy(uniform_plan(model.config, 32)))
    got = [decoder.prefill(0, second[:2]).logits[0]]
    got += [decoder.step([0], second[place : place + 1]).logits[0] for place in (2, 3)]
    want = turns_by_hand(model, [(first, 8), (second, 32)])
    for logits, place in zip(got, (6, 7, 8)):
        assert (logits - want[place]).abs().max() <= 1e-12
    # and back to a narrow one, which reads what of it the wide tokens computed
    decoder.change_policy(0, ComputePolicy(uniform_plan(model.config, 16)))
    (third,) = random_sequences([3], seed=9)
    want = turns_by_hand(model, [(first, 8), (second, 32), (third, 16)])
    assert (decoder.prefill(0, third).logits[0] - want[-1]).abs().max() <= 1e-12


@pytest.mark.parametrize("kind", [{}, {"sliding_window": 3, "window_pattern": "S"}], ids=["all", "windows"])
@pytest.mark.parametrize("widths", [(32, 8), (8, 32, 8), (16, 8, 32, 8)])
def test_turns_of_other_widths_that_widen(widths, kind):
    """In blocks that may widen, tokens of a full turn are in both sets of keys; nothing is read that was not written:
    what lies in the slot and beside it from before makes no difference."""
    model, gates = gated_model(block_pattern="TTTT", num_kv_groups=4, **kind)
    policy = replace(POLICY, exit_threshold=1.0, expand_cost=0.3)
    turns = random_sequences([5] * len(widths))

    def run(decoder: Decoder, slot: int) -> list[torch.Tensor]:
        logits = []
        decoder.begin(slot, ComputePolicy(uniform_plan(model.config, widths[0]), policy))
        for number, (tokens, width) in enumerate(zip(turns, widths)):
            if number:
                decoder.change_policy(slot, ComputePolicy(uniform_plan(model.config, width), policy))
            decoded = decoder.prefill(slot, tokens[:3])
            logits += [decoded.logits[0], *(decoder.step([slot], token[None]).logits[0] for token in tokens[3:])]
        return logits

    fresh = run(Decoder(model, 1, 40, gates, RELATIVE), 0)
    used = Decoder(model, 3, 40, gates, RELATIVE)
    for slot in (0, 1, 2):
        used.begin(slot, ComputePolicy(full_plan(model.config), policy))
        used.prefill(slot, random_sequences([30], seed=slot)[0])
    for first, second in zip(fresh, run(used, 1)):
        assert (first - second).abs().max() <= TOLERANCE and first.isfinite().all()


def test_keys_that_were_never_written_are_hidden():
    """A fixed turn fills one set alone; queries of an adaptive one that follows find nothing of it in the other."""
    model, gates = gated_model(block_pattern="TTTT", num_kv_groups=4)
    decoder = Decoder(model, 2, 40, gates, RELATIVE)
    first, second = random_sequences([6, 6])
    for slot in (0, 1):
        decoder.begin(slot, ComputePolicy(uniform_plan(model.config, 8)))
        decoder.prefill(slot, first)
    decoder.change_policy(1, ComputePolicy(uniform_plan(model.config, 8), replace(POLICY, exit_threshold=1.0)))
    decoder.prefill(1, second)
    cache = decoder.wide[3]
    reach = cache.read_before(1, 2, 12)
    assert reach.held[0].tolist() == [0] * 6 + [2] * 6
    assert not reach.mask(torch.tensor([[12]]), None, 1)[0, :, 0, :6].any()


def turns_by_hand(model, turns):
    """Token by token, head by head: logits [tokens, vocab] where each turn has a width."""
    tokens = torch.cat([part for part, _ in turns])
    widths = [width for part, width in turns for _ in part]
    cos, sin = model.rotary(torch.arange(len(tokens)))
    x = model.embedding(tokens[None])[0]
    for index, block in enumerate(model.blocks):
        rows = model.rows[index]
        kept = []
        out = []
        for place, width in enumerate(widths):
            row = rows[width]
            u = block.attention_norm(x[place, :width])[None, None]
            angles = cos[place : place + 1], sin[place : place + 1]
            keys, values = block.attention.keys_values(u, row, *angles)
            kept.append((keys[0, 0], values[0, 0]))
            queries = block.attention.queries(u, row, *angles)[0, 0]
            heads = []
            for head, query in enumerate(queries):
                group = head // block.attention.heads_per_group
                seen = [(k[group], v[group]) for k, v in kept if k.shape[0] > group]
                scores = torch.stack([query @ k for k, _ in seen]) * block.attention.scale
                heads.append(scores.softmax(0) @ torch.stack([v for _, v in seen]))
            (mixed,) = block.attention.out.some(torch.cat(heads)[None], {"o": width})
            y = x[place].clone()
            y[:width] += mixed[0]
            context = model.training_context(tokens[None, :1], None)
            y[:width] += block.mlp(block.mlp_norm(y[None, None, :width]), row, context)[0, 0]
            out.append(y)
        x = torch.stack(out)
    return model.logits(x[None])[0]


def test_a_whole_prompt_leaves_with_its_last_token():
    model, gates = gated_model(block_pattern="TMTMTT")
    policy = replace(POLICY, exit_per="sequence", exit_threshold=0.2)
    plan, left = full_plan(model.config), set()
    for seed in range(6):
        (tokens,) = random_sequences([7], seed)
        decoder = Decoder(model, 1, 8, gates, RELATIVE)
        decoder.begin(0, ComputePolicy(plan, policy))
        decoded = decoder.prefill(0, tokens)
        assert len(set(decoded.exit_layers.tolist())) == 1
        logits, exits, _ = reference(model, gates, RELATIVE, tokens, plan, policy)
        assert torch.equal(decoded.exit_layers, exits)
        assert (decoded.logits[0] - logits[-1]).abs().max() <= TOLERANCE
        left.add(int(exits[0]))
    assert len(left) > 1


def test_doubled_widths():
    config = random_model(block_pattern="TTTT").config
    assert doubled_widths(config, (8, 16, 32, 8)) == (16, 32, 32, 16) and list(WIDTHS) == [8, 16, 32]


@pytest.mark.parametrize("name", ["hybrid", "windows and sinks"])
def test_bfloat16_is_near_float32(name):
    """Ragged rows, rings, and a second turn that is wider than the first, whose heads earlier tokens lack."""
    model = random_model(**MODELS[name]).to(torch.bfloat16)
    sequences, prompts, logits = random_sequences([16, 19, 14]), (6, 9, 4), {}
    for dtype in (torch.bfloat16, torch.float32):
        decoder = Decoder(model.to(dtype), 3, 20)
        for slot, (tokens, length) in enumerate(zip(sequences, prompts)):
            decoder.begin(slot, ComputePolicy(uniform_plan(model.config, WIDTHS[slot % 2])))
            decoder.prefill(slot, tokens[:length])
        for slot in range(3):
            decoder.change_policy(slot, ComputePolicy(full_plan(model.config)))
        steps = [[tokens[length + step] for tokens, length in zip(sequences, prompts)] for step in range(10)]
        logits[dtype] = torch.stack([decoder.step([0, 1, 2], torch.stack(fed)).logits for fed in steps])
    low, high = logits.values()
    assert (low - high).square().mean().sqrt() <= 0.02 * high.square().mean().sqrt()
