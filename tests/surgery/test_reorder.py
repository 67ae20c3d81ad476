"""Sorting by importance changes nothing at full width, and moves the units that say most to the front."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from surgery.test_expand import GROWING, expanded, logits, source_model
from surgery.test_graft import load, saved

from megatron_adamba.config.model import NestRow
from megatron_adamba.data.indexed_builder import IndexedDatasetBuilder
from megatron_adamba.data.indexed_dataset import IndexedDataset
from megatron_adamba.data.loader import to_micro_batch
from megatron_adamba.data.packed import evaluation_batches
from megatron_adamba.elastic.plan import uniform_plan
from megatron_adamba.errors import ConfigError
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.surgery.calibration import Calibration
from megatron_adamba.surgery.canonical_source import open_canonical
from megatron_adamba.surgery.importance import measure
from megatron_adamba.surgery.narrow_importance import measure_narrow
from megatron_adamba.surgery.permutation import Order, axis_roles, random_order
from megatron_adamba.surgery.reorder import KINDS, Trial, chosen_order, fill, reorder, shuffle, with_kind
from megatron_adamba.surgery.writing import write_job


@pytest.mark.parametrize("name", GROWING)
def test_any_order_keeps_full_width(name, tmp_path):
    model = source_model(name)
    source, want, narrow = open_canonical(saved(model, tmp_path / "a")), logits(model, 32), logits(model, 16)
    fill(model, source, random_order(model.config, seed=2))
    assert (logits(model, 32) - want).abs().max() <= 1e-5 * max(want.abs().max(), 1)
    # a Mamba layer is never sliced
    moved = (logits(model, 16) - narrow).abs().max() > 1e-2
    assert moved == (set(model.config.block_pattern) != {"M"} or model.config.mamba_use_mlp), "or nothing was moved"


@pytest.mark.parametrize("name", GROWING)
def test_every_axis_of_every_parameter_has_a_role(name):
    model = source_model(name)
    for key, parameter in model.named_parameters():
        roles = axis_roles(key)
        assert len(roles) in (0, parameter.dim()), key
        for size, role in zip(parameter.shape, roles):
            assert role != "hidden" or size == 32, key


def test_importance_is_what_the_formulas_say():
    """Of a T block without bias, by hand in float64."""
    model = source_model("T", block_pattern="T", sliding_window=None, window_pattern="L")
    tokens = torch.randint(0, 257, (2, 9), generator=torch.Generator().manual_seed(4))
    seen = {}
    block = model.blocks[0]
    handles = [
        module.register_forward_hook(lambda module, given, out, key=key: seen.update({key: (given[0], out)}))
        for key, module in (
            ("first", block.attention_norm), ("second", block.mlp_norm), ("last", model.final_norm),
            ("out", block.attention.out), ("down", block.mlp.down),
        )
    ]  # fmt: skip
    got = measure(model, [(tokens, None)])
    for handle in handles:
        handle.remove()
    norms = [seen[key][1].double().abs().mean((0, 1)) for key in ("first", "second", "last")]
    hidden = sum(norm / norm.mean() for norm in norms)
    assert torch.allclose(got.hidden.double(), hidden, rtol=1e-5)
    heads = seen["out"][0].double().square().sum((0, 1)).view(2, 2, 8).sum(-1)
    assert torch.allclose(got.heads[0].double(), heads, rtol=1e-5)
    inner = seen["down"][0].double()
    up = torch.relu(seen["second"][1].double() @ block.mlp.up.up_weight.double().t()) ** 2
    assert torch.allclose(inner, up, rtol=1e-4, atol=1e-5)
    assert torch.allclose(got.ffn[0].double(), up.square().sum((0, 1)), rtol=1e-4)
    assert not got.experts


def test_importance_of_experts():
    """Rows inside each expert, and experts by what they add, from the formulas."""
    model = source_model("TE", block_pattern="E")
    tokens = torch.randint(0, 257, (1, 30), generator=torch.Generator().manual_seed(4))
    block, seen = model.blocks[0], {}
    handles = [
        block.moe.register_forward_hook(lambda module, given, out: seen.update(x=given[0].double())),
    ]
    got = measure(model, [(tokens, None)])
    handles[0].remove()
    x = seen["x"].flatten(0, 1)
    router, experts = block.moe.router, {k: v.double() for k, v in block.moe.experts.named_parameters()}
    scores = x @ router.weight.double().t() + router.bias.double()
    best = scores.topk(model.config.experts_per_token, dim=1)
    weight = torch.zeros_like(scores).scatter_(1, best.indices, best.values.softmax(1))
    for e in range(model.config.num_experts):
        own = weight[:, e] > 0
        gate = (x[own] @ experts["gate_weight"][e].t() + experts["gate_bias"][e]).clamp(max=7)
        up = (x[own] @ experts["up_weight"][e].t() + experts["up_bias"][e]).clamp(-7, 7)
        inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        assert torch.allclose(got.ffn[0][e].double(), inner.square().sum(0), rtol=1e-4, atol=1e-6)
        out = (inner @ experts["down_weight"][e].t() + experts["down_bias"][e]) * weight[own, e, None]
        assert torch.allclose(got.experts[0][e].double(), out.norm(dim=1).sum(), rtol=1e-4)


def test_planted_importance_is_found(tmp_path):
    """Units that alone say something lie at the end; sorted, they come first."""
    model = source_model("T", block_pattern="T", num_kv_groups=4)
    block = model.blocks[0]
    with torch.no_grad():
        block.mlp.up.up_weight[:-16] *= 0.01
        block.attention.qkv.v_weight[:-8] *= 0.01
    tokens = torch.randint(0, 257, (2, 31), generator=torch.Generator().manual_seed(4))
    importance = measure(model, [(tokens, None)])
    order = with_kind(with_kind(Order(8), "ffn", importance), "heads", importance)
    assert set(order.ffn[0][:16].tolist()) == set(range(112, 128))
    assert order.heads[0].flatten()[0] == 3


@pytest.fixture
def data(tmp_path):
    """Documents in which a token is followed by one of few."""
    source = np.random.default_rng(3)
    with IndexedDatasetBuilder(tmp_path / "text", np.uint16) as builder:
        for _ in range(12):
            builder.add_document(np.cumsum(source.integers(1, 4, 120)) % 250)
        builder.finalize()
    return IndexedDataset(tmp_path / "text")


def calibration_of(data, max_tokens=None) -> Calibration:
    return Calibration(evaluation_batches(data, 60, 4, 256), max_tokens)


def test_what_does_not_help_is_left_out(tmp_path, data):
    """The losses of the trials are those of the models that they stand for, and only what lowers them is kept."""
    model = source_model("TEM")
    folder, text = saved(model, tmp_path / "a"), calibration_of(data)
    job, trials = reorder(folder, text, {"data": "text"})
    tried = [(trial.kind, trial.measure) for trial in trials]
    both = ("activations", "effect")
    assert tried == [
        ("hidden", "activations"), *(("ffn", name) for name in both), *(("heads", name) for name in both),
        ("experts", "activations"),
    ]  # fmt: skip
    write_job(job, tmp_path / "b", 60_000, lambda *_: None)
    new = load(tmp_path / "b")
    want = logits(model, 32)
    assert (logits(new, 32) - want).abs().max() <= 1e-5 * max(want.abs().max(), 1)
    (entry,) = json.loads((tmp_path / "b" / "surgery.json").read_text())
    kept = entry["arguments"]["kept"]
    assert kept and set(kept) <= {f"{trial.kind} by {trial.measure}" for trial in trials if trial.helps}
    last = next(trial for trial in trials if f"{trial.kind} by {trial.measure}" == kept[-1])
    assert trials[0].before == pytest.approx(text.narrow_losses(model), abs=1e-6)
    assert text.narrow_losses(new) == pytest.approx(last.after, abs=1e-5)
    experts = trials[-1]
    assert experts.after == pytest.approx(experts.before, abs=1e-5), "their order changes no loss"


def test_an_order_has_to_convince_both_halves():
    trial = lambda after: Trial("ffn", "effect", (2.0, 3.0), after)
    assert trial((1.9, 2.9)).helps and trial((1.9, 2.9)).gain == pytest.approx(0.1)
    assert not trial((1.0, 3.1)).helps and not trial((2.0, 3.0)).helps


@pytest.mark.parametrize("max_tokens", [None, 500])
def test_the_text_comes_from_all_over(data, max_tokens):
    """Halves by hand, from whole batches."""
    model, batches = source_model("T"), evaluation_batches(data, 60, 4, 256)
    text = Calibration(batches, max_tokens)
    chosen = list(range(len(batches))) if max_tokens is None else [0, len(batches) // 2]
    assert text.num_tokens == sum(int((batches[index]["labels"] != -100).sum()) for index in chosen)
    losses = []
    for half in (chosen[::2], chosen[1::2]):
        total, count = 0.0, 0
        for index in half:
            batch = to_micro_batch(batches[index])
            count += int((batch["labels"] != -100).sum())
            for width in (8, 16):
                plan = uniform_plan(model.config, width)
                out = model(batch["tokens"], None, batch["seq_idx"] if batch["packed"] else None, plan)
                flat = torch.nn.functional.cross_entropy(out.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
                total += flat.item() / 2
        losses.append(total / count)
    assert text.narrow_losses(model) == pytest.approx(losses, abs=1e-5)


def test_effects_are_what_removal_costs():
    """sum |a dL/da| over tokens, by finite differences of one activation at a time; narrow, with all units."""
    model = source_model("T", block_pattern="T", widths=[16, 32])
    tokens = torch.randint(0, 257, (1, 6), generator=torch.Generator().manual_seed(4))
    labels = torch.randint(0, 257, (1, 6), generator=torch.Generator().manual_seed(5))
    batch = {"tokens": tokens, "labels": labels, "seq_idx": torch.zeros_like(tokens), "packed": False}
    got = measure_narrow(model, [batch])
    rows = [replace(row, kv_groups=model.config.num_kv_groups, ffn=128) for row in model.config.nest]
    wide = AdambaModel(replace(model.config, nest=rows)).double().requires_grad_(False)
    wide.load_state_dict(model.state_dict())
    plan = uniform_plan(wide.config, 16)
    for module, units, found in (
        (wide.blocks[0].mlp.down, 128, got.ffn[0]),
        (wide.blocks[0].attention.out, model.config.num_heads, got.heads[0].flatten()),
    ):
        effects = torch.zeros(units)
        for token in range(6):
            for unit in range(0, units, max(1, units // 8)):
                sides = []
                for share in (1e-4, -1e-4):

                    def change(_, given, token=token, unit=unit, share=share, units=units):
                        x = given[0].clone()
                        own = x[0, token].view(units, -1)
                        own[unit] *= 1 + share
                        return (x, *given[1:])

                    handle = module.register_forward_pre_hook(change)
                    sides.append(wide(tokens, labels, plan=plan).item())
                    handle.remove()
                effects[unit] += abs(sides[0] - sides[1]) / 2e-4
        chosen = list(range(0, units, max(1, units // 8)))
        ratio = effects[chosen] / found[chosen].clamp(min=1e-9)
        assert effects[chosen].max() > 0
        scale = (effects[chosen].sum() / found[chosen].sum()).item()
        assert torch.allclose(effects[chosen], found[chosen] * scale, rtol=1e-3, atol=1e-5 * effects.max()), ratio


def test_effects_of_rows_in_experts():
    """Scaling a row of one expert's down projection scales what the row says."""
    model = source_model("TE", block_pattern="E", widths=[16, 32]).double()
    tokens = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(4))
    labels = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(5))
    batch = {"tokens": tokens, "labels": labels, "seq_idx": torch.zeros_like(tokens), "packed": False}
    got = measure_narrow(model, [batch]).ffn[0]
    assert got.shape == (model.config.num_experts, model.config.expert_ffn_size) and (got > 0).any()
    with torch.no_grad():
        model.blocks[0].moe.experts.down_weight[1, :, 5] = 0
    assert measure_narrow(model, [batch]).ffn[0][1, 5] == 0


def test_each_kind_alone(tmp_path, data):
    model = source_model("TEM")
    source = open_canonical(saved(model, tmp_path / "a"))
    for kind in KINDS:
        _, trials, _ = chosen_order(source, load(tmp_path / "a"), calibration_of(data), [kind])
        assert {trial.kind for trial in trials} == {kind}


def test_a_model_of_one_width_has_nothing_to_gain(tmp_path, data):
    folder = saved(source_model("T", widths=[32]), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"has one width alone \(32\)"):
        reorder(folder, calibration_of(data), {})


def test_a_random_order_for_comparison(tmp_path, surgery_tool):
    model = source_model("TEM")
    folder, want = saved(model, tmp_path / "a"), logits(model, 32)
    job = shuffle(folder, 3)
    write_job(job, tmp_path / "b", 60_000, lambda *_: None)
    new = load(tmp_path / "b")
    assert (logits(new, 32) - want).abs().max() <= 1e-5 * max(want.abs().max(), 1)
    assert not torch.equal(new.embedding.weight, model.embedding.weight)
    _, err = surgery_tool("reorder", folder, tmp_path / "c", code=2)
    assert "takes --data PREFIX" in err and "--random SEED" in err


def test_after_an_expansion_old_and_new_weights_are_mixed(tmp_path):
    """Phase 3 tells them apart by places, which an order moves."""
    folder = expanded(saved(source_model("T"), tmp_path / "a"), tmp_path / "b", 48)
    assert open_canonical(folder).config.expanded_from["hidden_size"] == 32
    write_job(shuffle(folder, 3), tmp_path / "c", 60_000, lambda *_: None)
    assert open_canonical(tmp_path / "c").config.expanded_from is None


@pytest.mark.parametrize("operation", ["reorder", "expand"])
def test_what_is_not_whole_is_refused(tmp_path, surgery_tool, operation):
    """A narrow part of a model, and a nest whose last row leaves units unused; extracting that row is a way out."""
    words = {"reorder": ("--random", 1), "expand": ("--hidden", 64)}[operation]
    whole, part = saved(source_model("T"), tmp_path / "a"), tmp_path / "part"
    surgery_tool("extract", whole, part, "--width", 16)
    _, err = surgery_tool(operation, part, tmp_path / "b", *words, code=2)
    assert f"was extracted, and some of its blocks are narrower than its 32 channels; {operation} the model" in err
    rows = [NestRow(16, 16, 1, 64), NestRow(32, 32, 1, 112)]
    uneven = saved(source_model("T", widths=None, nest=rows), tmp_path / "uneven")
    _, err = surgery_tool(operation, uneven, tmp_path / "b", *words, code=2)
    assert "leaves units unused (kv_groups 1 of 2, ffn 112 of 128)" in err and "extract" in err
    surgery_tool("extract", uneven, tmp_path / "even", "--width", 32)
    want = logits(load(uneven), 32)
    surgery_tool(operation, tmp_path / "even", tmp_path / "b", *words)
    new = load(tmp_path / "b")
    assert (logits(new, new.config.hidden_size) - want).abs().max() <= 1e-5 * max(want.abs().max(), 1)
