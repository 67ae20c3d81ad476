"""Exported folders are loaded by transformers and compute the same; what GPT-OSS cannot be is refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from oracles.dense import randomize
from safetensors.torch import load_file
from surgery.gpt_oss_folders import SHAPES, fits, make_source, tokens_for, write_tokenizer

from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.checkpoint.canonical import read_tensors, write_canonical
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.errors import CheckpointError
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.surgery.export_gpt_oss import export_hugging_face
from megatron_adamba.surgery.import_gpt_oss import import_gpt_oss
from megatron_adamba.surgery.writing import write_job

BASE = {
    "hidden_size": 32,
    "block_pattern": "Ex3",
    "vocab_size": 53,
    "head_dim": 8,
    "num_heads": 6,
    "num_kv_groups": 2,
    "linear_bias": True,
    "qk_norm": False,
    "attention_sinks": True,
    "sliding_window": 3,
    "window_pattern": "SL",
    "rope_theta": 300.0,
    "rope_factor": 4.0,
    "rope_original_context": 16,
    "rope_beta_fast": 4.0,
    "rope_beta_slow": 0.5,
    "num_experts": 5,
    "experts_per_token": 2,
    "expert_ffn_size": 48,
    "ffn_granule": 16,
    "widths": [8, 16, 32],
}


def our_model(**changes) -> AdambaModel:
    """Every parameter random: gains, sinks and biases too."""
    model = AdambaModel(resolve_model(ModelConfig(**{**BASE, **changes})))
    randomize(model, seed=4)
    return model.requires_grad_(False).eval()


def saved(model: AdambaModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    tensors = ((name, tensor.to(dtype)) for name, tensor in model.named_parameters())
    write_canonical(folder, {"model": asdict(model.config)}, tensors, max_shard_bytes=30_000)
    return folder


def exported(source: Path, folder: Path, max_shard_bytes: int = 10**9, dtype: torch.dtype | None = None) -> Path:
    write_job(export_hugging_face(source, dtype), folder, max_shard_bytes, lambda *_: None)
    return folder


def loaded(folder: Path, dtype: torch.dtype | str = torch.float32):
    """By transformers, which must have found each of its tensors and no other."""
    from transformers import GptOssForCausalLM

    model, report = GptOssForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval().requires_grad_(False)


CHANGES = {
    "the usual": {},
    "no biases on attention": {"linear_bias": False},
    "tied": {"tie_embeddings": True},
    "no YaRN": {"rope_factor": 1.0},
    "no windows": {"window_pattern": "L", "sliding_window": None},
    "windows by twos": {"window_pattern": "LSS"},
    "norms without weights": {"norm_weight": False},
    "another activation": {"expert_gate_limit": 0.8, "expert_gate_slope": 0.6},
    "square experts, one expert": {"expert_ffn_size": 32, "experts_per_token": 1, "norm_eps": 0.1},
    "one width": {"widths": [32]},
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", CHANGES)
def test_transformers_computes_the_same(name, tmp_path):
    """Full-width gains are random here: folding them in must be exact."""
    ours = our_model(**CHANGES[name])
    theirs = loaded(exported(saved(ours, tmp_path / "model"), tmp_path / "hf", 20_000))
    tokens = tokens_for(theirs.config)
    want = ours(tokens)
    assert want.std() > 0.05
    assert (theirs(tokens, use_cache=False).logits - want).abs().max() <= 1e-5


@pytest.mark.oracle
def test_bf16_rounds_once(tmp_path):
    """Asked for, or the source's own; each tensor is the fp32 export's, rounded."""
    ours = our_model()
    exact = load_all(exported(saved(ours, tmp_path / "model"), tmp_path / "fp32"))
    asked = exported(tmp_path / "model", tmp_path / "bf16", dtype=torch.bfloat16)
    for name, tensor in load_all(asked).items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, exact[name].bfloat16()), name
    assert loaded(asked, "auto").dtype == torch.bfloat16
    own = load_all(exported(saved(ours, tmp_path / "half", torch.bfloat16), tmp_path / "own"))
    assert {tensor.dtype for tensor in own.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "own" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


KINDS = ("hf fp32", "openai bf16", "openai mxfp4")


@pytest.mark.parametrize(("shape", "kind"), [(shape, kind) for shape in SHAPES for kind in KINDS if fits(shape, kind)])
def test_what_was_imported_goes_back_as_it_was(shape, kind, tmp_path):
    theirs, source = make_source(shape, kind, tmp_path / "source")
    write_tokenizer(source / "tokenizer.json")
    write_job(import_gpt_oss(source), tmp_path / "model", 50_000, lambda *_: None)
    back = exported(tmp_path / "model", tmp_path / "back")
    tensors = load_all(back)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()
    }
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensors[name].float(), tensor), name
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    steps = json.loads((back / "surgery.json").read_text())
    assert [step["operation"] for step in steps] == ["import gpt-oss", "export hf"]
    again = tmp_path / "again"
    write_job(import_gpt_oss(back), again, 50_000, lambda *_: None)
    first, second = (dict(read_tensors(folder)) for folder in (tmp_path / "model", again))
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)
    assert len(json.loads((again / "surgery.json").read_text())) == 3
    assert json.loads((again / "config.json").read_text()) == json.loads((tmp_path / "model/config.json").read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_pattern": "EEM", "mamba_head_dim": 8}, "blocks M of EEM are not GPT-OSS's"),
        ({"block_pattern": "ET"}, "blocks T of ET are not GPT-OSS's"),
        ({"qk_norm": True}, "model.qk_norm True: GPT-OSS has False"),
        ({"attention_sinks": False}, "model.attention_sinks False: GPT-OSS has True"),
        ({"embedding_norm": True}, "model.embedding_norm True: GPT-OSS has False"),
        ({"rope_sign": -1}, "model.rope_sign -1: GPT-OSS has 1"),
        ({"logit_softcap": 15.0}, "model.logit_softcap 15.0: GPT-OSS has 0"),
        ({"static_norm_size": 16}, "model.static_norm_size 16: GPT-OSS has 32"),
        ({"expert_gate_limit": 0.0}, "model.expert_gate_limit 0: GPT-OSS always clamps"),
    ],
    ids=str,
)
def test_what_gpt_oss_cannot_be(changes, message, tmp_path):
    source = saved(our_model(**changes), tmp_path / "model")
    with pytest.raises(CheckpointError) as raised:
        export_hugging_face(source)
    assert message in str(raised.value) and str(source) in str(raised.value)


@pytest.mark.parametrize(("field", "value"), [("norm_size", 16), ("kv_groups", 1), ("expert_ffn", 32)])
def test_a_full_width_that_is_not_all(field, value, tmp_path):
    rows = our_model().config.nest
    rows = [*rows[:-1], replace(rows[-1], **{field: value})]
    source = saved(our_model(nest=rows, widths=None), tmp_path / "model")
    with pytest.raises(CheckpointError, match=f"{field} {value} of the full width 32: GPT-OSS has "):
        export_hugging_face(source)


def test_narrow_rows_do_not_matter(tmp_path):
    """norm_size and gains of narrow widths have no place in GPT-OSS and are left out."""
    ours = our_model()
    rows = [replace(ours.config.nest[0], norm_size=99), *ours.config.nest[1:]]
    source = saved(our_model(nest=rows, widths=None), tmp_path / "model")
    plain = load_all(exported(saved(ours, tmp_path / "plain"), tmp_path / "a"))
    grown = load_all(exported(source, tmp_path / "b"))
    assert all(torch.equal(grown[name], tensor) for name, tensor in plain.items())


def test_a_damaged_source(tmp_path):
    source = saved(our_model(), tmp_path / "model")
    path = source / "config.json"
    values = json.loads(path.read_text())
    values["model"]["num_experts"] = 4
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"blocks.0.moe.router.weight has shape \(5, 32\), .* \(4, 32\)"):
        export_hugging_face(source)
    values["model"] |= {"linear_bias": False, "num_experts": 5}
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"tensor \S+_bias has no place in the model of its config"):
        export_hugging_face(source)
    with pytest.raises(CheckpointError, match="no such folder"):
        export_hugging_face(tmp_path / "nowhere")
