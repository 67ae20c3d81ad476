"""GPT-OSS folders become canonical checkpoints: every tensor, and the logits of transformers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from surgery.gpt_oss_folders import (
    FORMATS,
    SHAPES,
    SQUARE,
    expected_canonical,
    fits,
    make_source,
    mxfp4_blocks,
    openai_config,
    random_gpt_oss,
    save_hugging_face,
    save_openai,
    their_logits,
    tokens_for,
    write_tokenizer,
)

from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.checkpoint.canonical import load_into, read_index, read_tensors
from megatron_adamba.config.cli import parse_arguments
from megatron_adamba.config.root import read_model_config
from megatron_adamba.inference.load import load_model
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.surgery.import_gpt_oss import import_gpt_oss
from megatron_adamba.surgery.writing import write_job

CASES = [(shape, kind) for shape in SHAPES for kind in FORMATS if fits(shape, kind)]
GROUPED = "grouped queries"


def imported(source: Path, folder: Path, max_shard_bytes: int = 10**9, **options) -> Path:
    write_job(import_gpt_oss(source, **options), folder, max_shard_bytes, lambda *_: None)
    return folder


def our_model(folder: Path) -> AdambaModel:
    model = AdambaModel(read_model_config(folder))
    load_into(model, folder)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_every_tensor_is_where_it_belongs(shape, kind, tmp_path):
    theirs, source = make_source(shape, kind, tmp_path / "source")
    folder = imported(source, tmp_path / "model")
    want = expected_canonical(theirs)
    dtype = torch.float32 if "fp32" in kind else torch.bfloat16
    specs = {spec.name: spec for spec in manifest(read_model_config(folder))}
    got = dict(read_tensors(folder))
    assert set(got) == set(specs) and set(want) == {name for name in specs if not name.endswith("gain")}
    for name, tensor in got.items():
        if name.endswith("gain"):
            assert torch.equal(tensor, torch.ones(specs[name].shape))
        else:
            assert tensor.dtype == dtype and torch.equal(tensor.float(), want[name]), name


@pytest.mark.oracle
@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_logits_are_transformers(shape, kind, tmp_path):
    theirs, source = make_source(shape, kind, tmp_path / "source")
    ours = our_model(imported(source, tmp_path / "model"))
    tokens = tokens_for(theirs.config)
    got, want = ours(tokens), their_logits(theirs, tokens)
    assert want.std() > 0.5
    assert (got - want).abs().max() <= 1e-5


CHANGES = {
    "no biases on attention": {"attention_bias": False},
    "tied": {"tie_word_embeddings": True},
    "no YaRN": {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
    "windows in threes": {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    "no windows": {"layer_types": ["full_attention"] * 3},
    "another activation": {"swiglu_limit": 1.5, "swiglu_alpha": 0.8},
    "another epsilon": {"rms_norm_eps": 0.3},
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", CHANGES)
def test_settings_that_change_the_logits_are_kept(name, tmp_path):
    theirs = random_gpt_oss(GROUPED, **CHANGES[name])
    source = save_hugging_face(theirs, tmp_path / "source", torch.float32)
    folder = imported(source, tmp_path / "model")
    tokens = tokens_for(theirs.config)
    want = their_logits(theirs, tokens)
    assert (our_model(folder)(tokens) - want).abs().max() <= 1e-5
    plain = random_gpt_oss(GROUPED)
    plain.load_state_dict(theirs.state_dict(), strict=False)
    if name not in ("no biases on attention", "tied"):
        assert (their_logits(plain, tokens) - want).abs().max() > 1e-3, "the setting must matter"
    got = dict(read_tensors(folder))
    assert all(torch.equal(got[key], tensor) for key, tensor in expected_canonical(theirs).items())


@pytest.mark.oracle
def test_a_transposed_square_matrix_changes_the_logits(tmp_path):
    """The tensor's shape cannot tell: what does tell is the comparison above."""
    theirs, source = make_source(SQUARE, "hf fp32", tmp_path / "source")
    folder = imported(source, tmp_path / "model")
    ours, tokens = our_model(folder), tokens_for(theirs.config)
    assert (ours(tokens) - their_logits(theirs, tokens)).abs().max() <= 1e-5
    for block in ours.blocks:
        down = block.moe.experts.down_weight
        assert down.shape[1] == down.shape[2]
        down.copy_(down.transpose(1, 2).clone())
    assert (ours(tokens) - their_logits(theirs, tokens)).abs().max() > 0.01


@pytest.mark.oracle
def test_a_mxfp4_folder_is_what_transformers_reads_in_it(tmp_path):
    """The folders of these tests are packed by their own code; transformers unpacks them independently."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    theirs, source = make_source(GROUPED, "hf mxfp4", tmp_path / "source")
    read = GptOssForCausalLM.from_pretrained(source, quantization_config=Mxfp4Config(dequantize=True)).float()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


def test_float_tensors_under_the_names_of_packed_ones(tmp_path):
    """transformers once saved dequantized models so: bf16, transposed, ending in `_blocks`, without scales."""
    theirs, source = make_source(SQUARE, "hf bf16", tmp_path / "source")
    file = source / "model.safetensors"
    tensors = load_file(file)
    for name in list(tensors):
        if name.endswith(("gate_up_proj", "down_proj")):
            tensors[f"{name}_blocks"] = tensors.pop(name)
    save_file(tensors, file)
    values = json.loads((source / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "mxfp4"}
    (source / "config.json").write_text(json.dumps(values))
    got = dict(read_tensors(imported(source, tmp_path / "model")))
    for name, tensor in expected_canonical(theirs).items():
        assert torch.equal(got[name].float(), tensor), name


def test_packed_and_plain_matrices_may_mix(tmp_path):
    """One expert matrix of the model as MXFP4, all else bf16: each tensor is read for what it is."""
    theirs, source = make_source(GROUPED, "openai bf16", tmp_path / "source")
    place = "block.1.mlp.mlp2_weight"
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        if place in tensors:
            experts, outputs, inputs = tensors.pop(place).shape
            nibbles = torch.randint(0, 16, (experts, outputs, inputs))
            tensors[f"{place}.blocks"] = mxfp4_blocks(nibbles)
            tensors[f"{place}.scales"] = torch.full((experts, outputs, inputs // 32), 127, dtype=torch.uint8)
            save_file(tensors, file)
    got = dict(read_tensors(imported(source, tmp_path / "model")))
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    assert torch.equal(got["blocks.1.moe.experts.down_weight"].float(), values[nibbles])
    want = expected_canonical(theirs)["blocks.0.moe.experts.down_weight"]
    assert torch.equal(got["blocks.0.moe.experts.down_weight"].float(), want)


def test_the_20b_gives_the_presets_model():
    """Settings alone, as both releases publish them."""
    from megatron_adamba.surgery.gpt_oss_config import HUGGING_FACE, OPENAI, read_gpt_oss_config

    openai = {
        "num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4, "vocab_size": 201088,
        "hidden_size": 2880, "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128, "initial_context_length": 4096,
        "rope_theta": 150000, "rope_scaling_factor": 32.0, "rope_ntk_alpha": 1, "rope_ntk_beta": 32,
    }  # fmt: skip
    hugging_face = {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
        "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
        "initial_context_length": 4096, "initializer_range": 0.02, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
        "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
        "rms_norm_eps": 1e-05, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
        "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False}, "rope_theta": 150000,
        "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 201088,
    }  # fmt: skip
    preset = asdict(resolve_model(parse_arguments(["--preset", "gpt-oss-20b"]).config.model))
    for values, layout in ((openai, OPENAI), (hugging_face, HUGGING_FACE)):
        found, config = read_gpt_oss_config(Path("config.json"), values)
        config.widths = [180, 720, 1440, 2880]
        assert found == layout
        # the weight of the balancing loss is the run's, not the checkpoint's
        assert asdict(resolve_model(config)) == {**preset, "router_balance_weight": 0.0}


def test_widths(tmp_path):
    _, source = make_source(GROUPED, "hf bf16", tmp_path / "source")
    by_default = read_model_config(imported(source, tmp_path / "a"))
    assert by_default.widths == [4, 16, 32, 64]
    chosen = imported(source, tmp_path / "b", widths=[24, 64])
    assert read_model_config(chosen).widths == [24, 64]
    assert dict(read_tensors(chosen))["blocks.0.moe_norm.gain"].shape == (2,)
    theirs = random_gpt_oss("every head its own keys", hidden_size=40)
    odd = save_hugging_face(theirs, tmp_path / "odd", torch.float32)
    assert read_model_config(imported(odd, tmp_path / "c")).widths == [40]


def test_every_width_runs(tmp_path):
    from megatron_adamba.elastic.plan import uniform_plan

    _, source = make_source(GROUPED, "openai fp32", tmp_path / "source")
    ours = our_model(imported(source, tmp_path / "model"))
    for width in ours.config.widths:
        logits = ours(tokens_for(ours.config), plan=uniform_plan(ours.config, width))
        assert torch.isfinite(logits).all()


def test_shards_and_history(tmp_path):
    _, source = make_source(GROUPED, "hf bf16 sharded", tmp_path / "source")
    assert len(list(source.glob("*.safetensors"))) > 3
    folder = imported(source, tmp_path / "model", max_shard_bytes=50_000)
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 3 and shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    largest = max(tensor.numel() * tensor.element_size() for _, tensor in read_tensors(folder))
    assert all(shard.stat().st_size <= max(50_000, largest) + 10_000 for shard in shards)
    assert set(read_index(folder).values()) == {shard.name for shard in shards}
    (entry,) = json.loads((folder / "surgery.json").read_text())
    assert entry == {
        "operation": "import gpt-oss",
        "arguments": {"widths": [4, 16, 32, 64], "tokenizer": None},
        "source": {"path": str(source), "layout": "Hugging Face"},
    }
    assert {path.name for path in folder.iterdir()} == {
        *(shard.name for shard in shards), "config.json", "model.safetensors.index.json", "surgery.json",
    }  # fmt: skip


def test_two_imports_are_the_same_bytes(tmp_path):
    _, source = make_source(SQUARE, "openai mxfp4", tmp_path / "source")
    first, second = (imported(source, tmp_path / name, max_shard_bytes=20_000) for name in ("a", "b"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


@pytest.mark.parametrize("place", ["beside", "above original", "given"])
def test_the_tokenizer_comes_along(place, tmp_path):
    theirs = random_gpt_oss(SQUARE, torch.bfloat16)
    options = {}
    if place == "beside":
        source = save_hugging_face(theirs, tmp_path / "source", torch.bfloat16)
        file = write_tokenizer(source / "tokenizer.json")
    else:
        source = save_openai(theirs, tmp_path / "release" / "original", torch.bfloat16)
        file = write_tokenizer(tmp_path / ("release" if place == "above original" else "") / "tokenizer.json")
        options = {"tokenizer": file} if place == "given" else {}
    folder = imported(source, tmp_path / "model", **options)
    assert (folder / "tokenizer.json").read_bytes() == file.read_bytes()
    loaded = load_model(folder, "fp32")
    assert loaded.tokenizer.encode("w7") == [7] and loaded.tokenizer.vocab_size == 53
    values = json.loads((folder / "config.json").read_text())
    assert values["data"] == {"tokenizer": "tokenizer.json"} and values["tokenizer_hash"] == loaded.tokenizer.hash
    tokens = tokens_for(theirs.config)
    assert (loaded.model(tokens) - their_logits(theirs, tokens)).abs().max() <= 1e-5


def test_openai_without_windows(tmp_path):
    theirs = random_gpt_oss(SQUARE, layer_types=["full_attention"] * 2)
    source = save_openai(theirs, tmp_path / "source", torch.float32)
    (source / "config.json").write_text(json.dumps({**openai_config(theirs), "sliding_window": 0}))
    tokens = tokens_for(theirs.config)
    assert (our_model(imported(source, tmp_path / "model"))(tokens) - their_logits(theirs, tokens)).abs().max() <= 1e-5
