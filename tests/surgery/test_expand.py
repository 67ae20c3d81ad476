"""A wider model gives the logits of the one it was made from, at its full width and at every old one, and trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracles.dense import randomize
from surgery.test_graft import MAMBA, SOURCES, load, saved

from megatron_adamba.blueprint.growth import before_expansion, growth_of
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.checkpoint.canonical import read_tensors
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.elastic.plan import ElasticPlan, uniform_plan
from megatron_adamba.engine.old_weights import old_places
from megatron_adamba.errors import ConfigError
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.surgery.expand import Noise, expand
from megatron_adamba.surgery.expand_config import ADD_HEADS, GROW_DIM, Sizes
from megatron_adamba.surgery.writing import write_job

GROWING = {
    **SOURCES,
    "M": {"block_pattern": "MM", **MAMBA, "mamba_num_groups": 4},
    "M, one group": {"block_pattern": "MM", **MAMBA},
    "Mamba-1, MLP behind": {"block_pattern": "MM", "mamba_version": 1, "mamba_d_state": 4, "mamba_use_mlp": True},
    "TEM": {
        "block_pattern": "TEMT",
        **MAMBA,
        "mamba_num_groups": 2,
        "num_experts": 3,
        "experts_per_token": 2,
        "linear_bias": True,
        "attention_sinks": True,
    },
    "nanochat": {
        "block_pattern": "TT",
        "embedding_norm": True,
        "norm_weight": False,
        "rope_sign": -1,
        "logit_softcap": 15.0,
    },
    "T, tied, GQA, no QK-norm": {"block_pattern": "TT", "num_kv_groups": 2, "qk_norm": False, "tie_embeddings": True},
}
NOISE = Noise(rank=4, std=0.3, seed=3)
"""far from small: what it reads must be zero"""


def source_model(name: str, **overrides) -> AdambaModel:
    shape = {"hidden_size": 32, "vocab_size": 257, "head_dim": 8, "ffn_granule": 16, "widths": [8, 16, 32]}
    model = AdambaModel(resolve_model(ModelConfig(**{**shape, **GROWING[name], **overrides})))
    randomize(model, seed=6)
    return model.requires_grad_(False).eval()


def expanded(source: Path, folder: Path, hidden: int, heads: str = ADD_HEADS, sizes: Sizes | None = None) -> Path:
    write_job(expand(source, hidden, heads, NOISE, sizes or Sizes()), folder, 60_000, lambda *_: None)
    return folder


def some_tokens() -> torch.Tensor:
    return torch.randint(0, 257, (2, 23), generator=torch.Generator().manual_seed(1))


def logits(model: AdambaModel, width: int) -> torch.Tensor:
    return model(some_tokens(), plan=uniform_plan(model.config, width))


def check_kept(old: AdambaModel, new: AdambaModel, bound: float = 1e-5) -> None:
    """At every old width, at the new full one, and with widths mixed."""
    full, wide = old.config.hidden_size, new.config.hidden_size
    for width in (8, 16, full):
        want = logits(old, width)
        assert want.std() > 0.1 and (logits(new, width) - want).abs().max() <= bound * max(want.abs().max(), 1)
    want = logits(old, full)
    assert (logits(new, wide) - want).abs().max() <= bound * max(want.abs().max(), 1)
    mixed = [8, full, 16, full][: old.config.num_layers]
    widest = tuple(wide if width == full else width for width in mixed)
    want = old(some_tokens(), plan=ElasticPlan(tuple(mixed), len(mixed)))
    got = new(some_tokens(), plan=ElasticPlan(widest, len(mixed)))
    assert (got - want).abs().max() <= bound * max(want.abs().max(), 1)


@pytest.mark.parametrize("name", GROWING)
def test_added_heads_keep_the_logits(name, tmp_path):
    """Twice: what the first step added is old for the second."""
    old = source_model(name)
    first = expanded(saved(old, tmp_path / "a"), tmp_path / "b", 48)
    middle = load(first)
    assert middle.config.hidden_size == 48 and middle.config.widths == [8, 16, 32, 48]
    check_kept(old, middle)
    randomized = load(first)
    randomize(randomized, seed=8)
    folder = saved(randomized, tmp_path / "c")
    last = load(expanded(folder, tmp_path / "d", 64))
    assert last.config.nest[-1].norm_size == 32 and last.config.static_norm_size == 32
    for width in (8, 16, 32, 48):
        want = logits(randomized, width)
        assert (logits(last, width) - want).abs().max() <= 1e-5 * max(want.abs().max(), 1)
    assert (logits(last, 64) - logits(randomized, 48)).abs().max() <= 1e-5 * max(logits(randomized, 48).abs().max(), 1)


@pytest.mark.parametrize("name", [name for name in GROWING if GROWING[name].get("qk_norm", True) is False])
def test_larger_heads_keep_the_logits_without_qk_norm(name, tmp_path):
    old = source_model(name)
    once = expanded(saved(old, tmp_path / "a"), tmp_path / "b", 48, GROW_DIM)
    new = load(once)
    assert new.config.head_dim == 12 and new.config.head_dim_steps == [8, 12]
    assert new.config.num_heads == old.config.num_heads
    check_kept(old, new)
    check_kept(old, load(expanded(once, tmp_path / "c", 64, GROW_DIM)))
    check_kept(old, load(expanded(once, tmp_path / "d", 96)))


def test_larger_heads_are_near_with_qk_norm(tmp_path, monkeypatch):
    """Small new keys move the logits little; another scale, or another divisor of the norm, would a lot."""
    old = source_model("T")
    quiet = Noise(rank=16, std=0.01, seed=3)
    write_job(expand(saved(old, tmp_path / "a"), 48, GROW_DIM, quiet, Sizes()), tmp_path / "b", 60_000, lambda *_: None)
    new, want = load(tmp_path / "b"), logits(old, 32)
    moved = (logits(new, 48) - want).abs().max() / want.std()
    assert 1e-6 < moved < 0.1
    assert "near" in expand(tmp_path / "a", 48, GROW_DIM, quiet, Sizes()).promise
    for heads, norms in ((True, False), (False, True)):
        with monkeypatch.context() as patch:
            for block in new.blocks:
                patch.setattr(block.attention, "scale", 12**-0.5 if heads else 8**-0.5)
                patch.setattr(block.attention, "norm_size", 12 if norms else 8)
            other = (logits(new, 48) - want).abs().max() / want.std()
        assert other > 3 * moved


@pytest.mark.parametrize("heads", [ADD_HEADS, GROW_DIM])
@pytest.mark.parametrize("name", GROWING)
def test_old_values_stay_and_nothing_new_is_dead(name, heads, tmp_path):
    """Old values are all there, in order, and every new weight has a gradient within two steps."""
    old = source_model(name)
    new = load(expanded(saved(old, tmp_path / "a"), tmp_path / "b", 48, heads))
    for tensor in old.parameters():
        tensor.fill_(torch.nan)
    unknown = dict(read_tensors(expanded(saved(old, tmp_path / "c"), tmp_path / "d", 48, heads)))
    before, fresh = dict(read_tensors(tmp_path / "a")), {}
    growth = growth_of(before_expansion(new.config), new.config)
    for key, tensor in new.named_parameters():
        fresh[key] = ~unknown[key].isnan()
        left = before.pop(key)
        places = old_places(tensor.shape, growth[key])
        if key.endswith("gain"):
            assert places.tolist() == [True] * left.numel() + [False] * (tensor.numel() - left.numel())
            assert torch.equal(tensor[: left.numel()], left) and (tensor[left.numel() :] == left[-1]).all()
        else:
            assert torch.equal(tensor[~fresh[key]], left.flatten()), key
            # phase 3 tells them apart
            assert torch.equal(places, ~fresh[key]), key
    assert not before
    moved = trained(new.requires_grad_(), steps=3)
    for key, mask in fresh.items():
        # a token that never came has no gradient
        rows = moved[key].any(1, keepdim=True) if key == "embedding.weight" else torch.ones((), dtype=torch.bool)
        alive = (moved[key] | ~rows)[mask].float()
        # a few units of relu fire for no token, new or old
        assert alive.mean() > 0.9 if ".mlp." in key else alive.all(), key


def trained(model: AdambaModel, steps: int) -> dict[str, torch.Tensor]:
    """Which elements of each parameter had a gradient in one of a few steps at full width."""
    moved = {key: torch.zeros_like(tensor, dtype=torch.bool) for key, tensor in model.named_parameters()}
    for seed in range(steps):
        tokens = torch.randint(0, 257, (16, 64), generator=torch.Generator().manual_seed(seed))
        model(tokens, tokens).backward()
        for key, tensor in model.named_parameters():
            moved[key] |= tensor.grad != 0
            tensor.data -= 0.05 * tensor.grad
            tensor.grad = None
    return moved


def test_dtypes_history_and_settings(tmp_path):
    source = saved(source_model("TEM"), tmp_path / "a", torch.bfloat16)
    folder = expanded(source, tmp_path / "b", 48, sizes=Sizes(ffn_size=160, mamba_num_groups=5))
    assert {tensor.dtype for _, tensor in read_tensors(folder)} == {torch.bfloat16}
    config = load(folder).config
    assert (config.ffn_size, config.mamba_num_groups, config.mamba_num_heads) == (160, 5, 20)
    (entry,) = json.loads((folder / "surgery.json").read_text())
    assert entry["operation"] == "expand" and entry["arguments"] == {
        **{"hidden_size": 48, "heads": "add-heads", "ffn_size": 160, "mamba_num_groups": 5},
        **{"rank": 4, "std": 0.3, "seed": 3},
    }


@pytest.mark.parametrize(
    ("name", "hidden", "heads", "sizes", "message"),
    [
        ("T", 32, ADD_HEADS, {}, "--hidden 32: the source has 32 already"),
        (
            "T",
            40,
            ADD_HEADS,
            {},
            "2 KV groups at 32 channels .* a multiple of 16, for example --hidden 48, or --num-kv",
        ),
        ("T", 48, ADD_HEADS, {"num_kv_groups": 1}, "--num-kv-groups 1: the source has 2"),
        (
            "T",
            36,
            GROW_DIM,
            {},
            "heads of 8 do not grow .* multiple of 8, for example --hidden 40, or --heads add-heads",
        ),
        ("T", 48, GROW_DIM, {"num_kv_groups": 3}, "--num-kv-groups 3: --heads grow-dim adds none"),
        ("T", 48, ADD_HEADS, {"ffn_size": 130}, "--ffn-size 130: must be a multiple of 16, and 128 or more; try 144"),
        ("T", 48, ADD_HEADS, {"ffn_size": 64}, "--ffn-size 64: must be .* try 128"),
        ("T", 48, ADD_HEADS, {"expert_ffn_size": 64}, "the source has no experts"),
        ("T", 48, ADD_HEADS, {"mamba_num_groups": 2}, "the source has no Mamba-2 blocks"),
        ("M", 48, ADD_HEADS, {"mamba_num_groups": 3}, "--mamba-num-groups 3: the source has 4"),
    ],
)
def test_what_cannot_grow(name, hidden, heads, sizes, message, tmp_path):
    source = saved(source_model(name), tmp_path / "a")
    with pytest.raises(ConfigError, match=message):
        expand(source, hidden, heads, NOISE, Sizes(**sizes))
