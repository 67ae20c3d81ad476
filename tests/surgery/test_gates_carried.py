"""Gates and estimator go along with their model: what is kept, is kept for tokens that leave and widen too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from inference.decoding import random_gates
from oracles.dense import randomize
from surgery.nested_models import KINDS, SHAPE, made, some_tokens

from megatron_adamba.blueprint.gates import gate_manifest
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.checkpoint.canonical import read_tensors, write_canonical
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.root import AdambaConfig
from megatron_adamba.data.tokenizer import ByteTokenizer
from megatron_adamba.inference.adaptive import run_adaptively
from megatron_adamba.inference.load import load_model
from megatron_adamba.inference.modes import Mode, prompt_scores
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.surgery.expand import Noise, expand
from megatron_adamba.surgery.expand_config import Sizes
from megatron_adamba.surgery.extract import extract
from megatron_adamba.surgery.graft import graft
from megatron_adamba.surgery.merge_average import merge_average
from megatron_adamba.surgery.reorder import shuffle

NOISE = Noise(rank=4, std=0.01, seed=3)
SETTINGS = {"exit_threshold": 0.4, "expand_cost": 0.5}


def gated_source(folder: Path, kind: str, pattern: str, min_exit: int | None = None, seed: int = 6) -> Path:
    """A model with gates that let tokens leave everywhere, and an estimator that tells prompts apart."""
    config = resolve_model(ModelConfig(**{**SHAPE, **KINDS[kind], "block_pattern": pattern, "gate_size": 8}))
    model = AdambaModel(config)
    randomize(model, seed)
    gates = random_gates(model)
    with torch.no_grad():
        gates.predictor.up.weight.mul_(3.0)
        gates.predictor.down.weight.mul_(4.0)
    run = AdambaConfig(model=config).to_dict()
    run["data"]["tokenizer"], run["tokenizer_hash"] = "bytes", ByteTokenizer().hash
    run["gates"]["predictor"], run["elastic"]["min_exit_layer"] = "relative", min_exit
    tensors = [*model.named_parameters(), *gates.named_parameters()]
    write_canonical(folder, run, ((name, tensor.detach()) for name, tensor in tensors), max_shard_bytes=30_000)
    return folder


def adaptive_run(folder: Path, predict: bool = True):
    """Logits, exits and widths of some sequences under the model's own choices, in float64."""
    loaded = load_model(folder, "fp32")
    loaded.model.double()
    loaded.gates.double()
    tokens = some_tokens()
    policies = [Mode("adaptive", None, SETTINGS, predict=predict).policy(loaded, row.tolist()) for row in tokens]
    x, trace = run_adaptively(
        loaded.model, loaded.gates, loaded.reading, tokens, [p.plan for p in policies], policies[0].adaptive
    )
    return loaded, loaded.model.logits(x), trace, policies


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("T", "TTTTTT"),
        ("T, grouped, biases, sinks, tied", "TTTT"),
        ("mixed", "TMEMETTT"),
        ("T, without norm weights", "TTTTT"),
    ],
)
def test_what_is_kept_is_kept_for_tokens_that_leave(kind, pattern, tmp_path):
    """Another order; a wider model, twice: the same logits, exits, widenings and widths."""
    source = gated_source(tmp_path / "source", kind, pattern)
    before, logits, trace, policies = adaptive_run(source)
    assert (trace.exit_layers < len(pattern)).any() and len(set(policies[0].plan.widths)) > 1
    ordered = made(shuffle(source, 5), tmp_path / "ordered")
    wider = made(expand(source, 48, "add-heads", NOISE, Sizes()), tmp_path / "wider")
    widest = made(expand(wider, 64, "add-heads", NOISE, Sizes()), tmp_path / "widest")
    for folder in (wider, widest):
        after, new_logits, new_trace, new_policies = adaptive_run(folder)
        assert [policy.plan.widths for policy in new_policies] == [policy.plan.widths for policy in policies]
        assert torch.equal(new_trace.exit_layers, trace.exit_layers)
        assert torch.equal(new_trace.widened_at, trace.widened_at)
        assert (new_logits - logits).abs().max() <= 1e-9
        assert after.model.config.estimator_reference == 32 and before.model.config.estimator_reference is None
    # an order keeps the logits at full width alone
    _, logits, trace, _ = adaptive_run(source, predict=False)
    _, new_logits, new_trace, _ = adaptive_run(ordered, predict=False)
    assert torch.equal(new_trace.exit_layers, trace.exit_layers) and (new_logits - logits).abs().max() <= 1e-9
    prompt = some_tokens()[0].tolist()
    scores = [prompt_scores(load_model(folder, "fp32"), prompt) for folder in (source, ordered, widest)]
    assert (scores[0] - scores[1]).abs().max() <= 1e-5 and (scores[0] - scores[2]).abs().max() <= 1e-5


@pytest.mark.parametrize("min_exit", [None, 3])
def test_a_graft_keeps_the_exits_of_old_blocks(min_exit, tmp_path):
    """Every second block is followed by a new one, whose own gates let nobody leave yet."""
    source = gated_source(tmp_path / "source", "T", "TTTTTTTT", min_exit)
    grafted = made(graft(source, "(TTM)x4", {"mamba_head_dim": 8}, seed=2), tmp_path / "grafted")
    _, logits, trace, policies = adaptive_run(source)
    after, new_logits, new_trace, new_policies = adaptive_run(grafted)
    place = [0, 1, 2, 4, 5, 7, 8, 10, 12]
    assert new_trace.exit_layers.tolist() == [[place[e] for e in row] for row in trace.exit_layers.tolist()]
    assert len(set(trace.exit_layers.flatten().tolist())) > 2
    old = [width for index, width in enumerate(new_policies[0].plan.widths) if index % 3 < 2]
    assert tuple(old) == policies[0].plan.widths
    assert (new_logits - logits).abs().max() <= 1e-9
    assert after.min_exit_layer == place[min_exit or 2]


def test_a_part_keeps_the_gates_of_its_blocks(tmp_path):
    source = gated_source(tmp_path / "source", "mixed", "TMEMETTT")
    whole = dict(read_tensors(source))
    part = made(extract(source, width=16, exit_layer=6), tmp_path / "part")
    tensors = dict(read_tensors(part))
    loaded = load_model(part, "fp32")
    names = {spec.name for spec in gate_manifest(loaded.model.config)}
    assert names <= tensors.keys() and not [name for name in tensors if "blocks.5.confidence" in name]
    for block in range(5):
        name = f"blocks.{block}.confidence_gate.up.weight"
        assert torch.equal(tensors[name], whole[name])
    assert torch.equal(tensors["predictor.down.weight"], whole["predictor.down.weight"][:6])
    # of six blocks the last quarter begins behind the fifth, of eight behind the sixth
    assert "blocks.4.expansion_gate.up.weight" in tensors and "blocks.4.expansion_gate.up.weight" not in whole
    assert Mode("adaptive").policy(loaded, [256, 3, 4]).plan.exit_layer == 6
    single = made(extract(source, exit_layer=1), tmp_path / "single")
    assert load_model(single, "fp32").gates is None


def test_means_take_gates_too(tmp_path):
    sources = [gated_source(tmp_path / name, "T", "TTTT", seed=seed) for name, seed in (("a", 6), ("b", 7))]
    mean = dict(read_tensors(made(merge_average(sources, [0.25, 0.75]), tmp_path / "mean")))
    first, second = (dict(read_tensors(source)) for source in sources)
    name = "blocks.1.confidence_gate.up.weight"
    assert torch.allclose(mean[name], 0.25 * first[name] + 0.75 * second[name], atol=1e-6)
