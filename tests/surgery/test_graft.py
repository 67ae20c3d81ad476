"""Grafted Mamba blocks change no logit, and each of their tensors is what a fresh model would hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracles.dense import randomize

from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.checkpoint.canonical import load_into, read_tensors, write_canonical
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.root import AdambaConfig, read_model_config
from megatron_adamba.data.tokenizer import ByteTokenizer
from megatron_adamba.elastic.plan import uniform_plan
from megatron_adamba.errors import CheckpointError, ConfigError
from megatron_adamba.inference.load import load_model
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.model.init import initial_tensor
from megatron_adamba.surgery.graft import graft
from megatron_adamba.surgery.writing import write_job

SOURCES = {
    "E": {
        "block_pattern": "Ex4",
        "linear_bias": True,
        "qk_norm": False,
        "attention_sinks": True,
        "sliding_window": 4,
        "window_pattern": "SSL",
        "rope_factor": 4.0,
        "rope_original_context": 16,
        "num_experts": 3,
        "experts_per_token": 2,
        "expert_ffn_size": 48,
    },
    "T": {"block_pattern": "TTT", "num_kv_groups": 2, "sliding_window": 3, "window_pattern": "SL"},
    "T, tied, without norm weights": {"block_pattern": "TT", "tie_embeddings": True, "norm_weight": False},
    "TE": {"block_pattern": "TE", "num_experts": 4, "activation": "swiglu"},
}
MAMBA = {"mamba_head_dim": 8, "mamba_d_state": 16}
GRAFTS = [
    ("E", "(EEM)x2", {**MAMBA, "mamba_num_heads": 12, "mamba_num_groups": 4}),
    ("E", "MMEEEEM", {"mamba_version": 1, "mamba_d_state": 4, "mamba_expand": 1}),
    ("T", "TMTMTM", MAMBA),
    ("T", "MTTMMT", {"mamba_version": 1}),
    ("T, tied, without norm weights", "TMT", MAMBA),
    ("TE", "TME", MAMBA),
]


def source_model(name: str) -> AdambaModel:
    shape = {"hidden_size": 32, "vocab_size": 257, "head_dim": 8, "ffn_granule": 16, "widths": [8, 16, 32]}
    model = AdambaModel(resolve_model(ModelConfig(**{**shape, **SOURCES[name]})))
    randomize(model, seed=6)
    return model.requires_grad_(False).eval()


def saved(model: AdambaModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """As a run leaves it, with all its settings."""
    config = AdambaConfig(model=model.config).to_dict()
    config["data"]["tokenizer"], config["tokenizer_hash"] = "bytes", ByteTokenizer().hash
    tensors = ((name, tensor.to(dtype)) for name, tensor in model.named_parameters())
    write_canonical(folder, config, tensors, max_shard_bytes=30_000)
    return folder


def grafted(source: Path, folder: Path, pattern: str, mamba: dict, seed: int = 5) -> Path:
    write_job(graft(source, pattern, mamba, seed), folder, 40_000, lambda *_: None)
    return folder


def load(folder: Path) -> AdambaModel:
    model = AdambaModel(read_model_config(folder))
    load_into(model, folder)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize(("name", "pattern", "mamba"), GRAFTS)
def test_logits_stay_at_every_width(name, pattern, mamba, tmp_path):
    old = source_model(name)
    new = load(grafted(saved(old, tmp_path / "a"), tmp_path / "b", pattern, mamba))
    tokens = torch.randint(0, 257, (2, 23), generator=torch.Generator().manual_seed(1))
    for width in (8, 16, 32):
        want = old(tokens, plan=uniform_plan(old.config, width))
        got = new(tokens, plan=uniform_plan(new.config, width))
        assert want.std() > 0.1 and torch.equal(got, want)


@pytest.mark.parametrize(("name", "pattern", "mamba"), GRAFTS)
def test_old_tensors_stay_and_new_ones_are_a_fresh_models(name, pattern, mamba, tmp_path):
    old = source_model(name)
    folder = grafted(saved(old, tmp_path / "a"), tmp_path / "b", pattern, mamba, seed=9)
    config, got = read_model_config(folder), dict(read_tensors(folder))
    specs = {spec.name: spec for spec in manifest(config)}
    assert set(got) == set(specs)
    left = dict(old.named_parameters())
    kept = iter(index for index, letter in enumerate(old.config.block_pattern))
    places = {index: next(kept) for index, letter in enumerate(config.block_pattern) if letter != "M"}
    for key, tensor in got.items():
        words = key.split(".")
        if words[0] == "blocks" and config.block_pattern[int(words[1])] == "M":
            assert tensor.dtype == torch.float32 and torch.equal(tensor, initial_tensor(specs[key], 9)), key
            assert not key.endswith("out_proj.weight") or not tensor.any()
            continue
        if words[0] == "blocks":
            words[1] = str(places[int(words[1])])
        assert torch.equal(tensor, left.pop(".".join(words))), key
    assert not left
    # the new blocks' settings, and nothing else, changed
    for key, value in vars(old.config).items():
        if key not in ("block_pattern", "num_layers") and not key.startswith("mamba_"):
            assert getattr(config, key) == value, key
    assert all(getattr(config, key) == value for key, value in mamba.items())
    assert config == resolve_model(config)


def test_new_blocks_train(tmp_path):
    """Zero output is no dead end: the projection has a gradient at once, what lies before it a step later."""
    folder = grafted(saved(source_model("T"), tmp_path / "a"), tmp_path / "b", "TMTT", MAMBA)
    model = load(folder)
    tokens = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(1))
    mixer = {name: tensor for name, tensor in model.named_parameters() if name.startswith("blocks.1.")}
    for tensor in mixer.values():
        tensor.requires_grad_()
    with_gradient = set()
    for _ in range(2):
        model(tokens, tokens).backward()
        for name, tensor in mixer.items():
            if tensor.grad is not None and tensor.grad.any():
                with_gradient.add(name)
                tensor.data -= 0.1 * tensor.grad
                tensor.grad = None
    assert with_gradient == set(mixer)


def test_dtypes(tmp_path):
    """Matrices take the dtype of the trained ones; time steps, decays, norms and gains stay fp32."""
    source = saved(source_model("E"), tmp_path / "a", torch.bfloat16)
    folder = grafted(source, tmp_path / "b", "EEMEE", MAMBA)
    for name, tensor in read_tensors(folder):
        matrix = not name.startswith("blocks.2.") or name.endswith(("in_proj.weight", "out_proj.weight"))
        assert tensor.dtype == (torch.bfloat16 if matrix else torch.float32), name


def test_seeds(tmp_path):
    source = saved(source_model("T"), tmp_path / "a")
    one, same, other = (
        dict(read_tensors(grafted(source, tmp_path / name, "TTTM", MAMBA, seed)))["blocks.3.mixer.in_proj.weight"]
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_history_settings_and_tokenizer_travel(tmp_path):
    source = saved(source_model("T"), tmp_path / "a")
    (source / "surgery.json").write_text('[{"operation": "earlier"}]')
    (source / "tokenizer.model").write_bytes(b"some tokenizer")
    folder = grafted(source, tmp_path / "b", "T M T M T", MAMBA)
    earlier, entry = json.loads((folder / "surgery.json").read_text())
    assert earlier == {"operation": "earlier"} and entry == {
        "operation": "graft",
        "arguments": {"pattern": "TMTMT", "seed": 5, "mamba_d_state": 16, "mamba_head_dim": 8},
        "source": {"path": str(source), "layout": "canonical"},
    }
    before, after = (json.loads((place / "config.json").read_text()) for place in (source, folder))
    assert before.pop("model") != after.pop("model") and before == after
    assert (folder / "tokenizer.model").read_bytes() == b"some tokenizer"
    (folder / "tokenizer.model").unlink()
    assert load_model(folder, "fp32").tokenizer.name == "bytes"


@pytest.mark.parametrize(
    ("pattern", "mamba", "message"),
    [
        ("TMT", {}, r"--pattern TMT: without its M blocks it is TT, the source is TTT; old blocks stay, in order, "
                    r"for example --pattern TTMTM"),
        ("TMTTT", {}, "without its M blocks it is TTTT, the source is TTT"),
        ("TEMTT", {}, "without its M blocks it is TETT"),
        ("TTT", {}, "--pattern TTT: adds no M block; for example --pattern TTMTM"),
        ("TQ", {}, r"--pattern 'TQ': unknown block 'Q'"),
        ("", {}, "--pattern '': holds no block"),
        ("TTTM", {"mamba_num_heads": 5, "mamba_num_groups": 2}, "--mamba-num-groups 2: must divide 5 heads"),
        ("TTTM", {"mamba_version": 3}, "--mamba-version 3: must be one of 1, 2"),
        ("TTTM", {"mamba_version": 1, "mamba_num_heads": 4}, "--mamba-version 1: has no heads or groups"),
        ("TTTM", {"mamba_head_dim": 48}, r"--mamba-head-dim 48: must divide .* or --mamba-num-heads"),
        ("TTTM", {"mamba_d_state": 0}, "--mamba-d-state 0: must be above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_grafted(pattern, mamba, message, tmp_path):
    source = saved(source_model("T"), tmp_path / "a")
    with pytest.raises(ConfigError, match=message):
        graft(source, pattern, mamba, 0)


def test_a_graft_of_a_graft_is_refused(tmp_path):
    first = grafted(saved(source_model("T"), tmp_path / "a"), tmp_path / "b", "TMTT", MAMBA)
    with pytest.raises(ConfigError, match=r"--pattern TMTTM: the source has M blocks already \(TMTT\)"):
        graft(first, "TMTTM", MAMBA, 0)


def test_a_source_that_is_no_canonical_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        graft(tmp_path / "nowhere", "TM", {}, 0)
    with pytest.raises(CheckpointError, match="holds no checkpoint; give "):
        graft(tmp_path, "TM", {}, 0)
    training = tmp_path / "step-00000200"
    training.mkdir()
    (training / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is a training checkpoint; make it canonical first: adamba checkpoint"):
        graft(training, "TM", {}, 0)
    source = saved(source_model("T"), tmp_path / "a")
    shard = sorted(source.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=f"{shard.name}: damaged"):
        graft(source, "TTTM", MAMBA, 0)
