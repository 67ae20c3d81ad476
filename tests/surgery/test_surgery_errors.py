"""What is wrong with a source or a target is said in a line that names it, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from surgery.gpt_oss_folders import make_source, write_tokenizer

from megatron_adamba.checkpoint import shards
from megatron_adamba.errors import AdambaError, CheckpointError, ConfigError, StorageError, TokenizerError
from megatron_adamba.surgery import writing
from megatron_adamba.surgery.import_gpt_oss import import_gpt_oss
from megatron_adamba.surgery.writing import write_job

SHAPE = "grouped queries"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    kinds = ("hf bf16", "hf bf16 sharded", "hf mxfp4", "openai bf16", "openai mxfp4")
    return {kind: make_source(SHAPE, kind, root / kind)[1] for kind in kinds}


@pytest.fixture
def copy_of(sources, tmp_path):
    def copy(kind: str) -> Path:
        return Path(shutil.copytree(sources[kind], tmp_path / "source"))

    return copy


def refused(source: Path, message: str, kind: type[AdambaError] = CheckpointError, **options) -> None:
    with pytest.raises(kind) as raised:
        import_gpt_oss(source, **options)
    text = str(raised.value)
    assert message in text and "\n" not in text, text


def change_tensors(folder: Path, change) -> None:
    """change(tensors) edits the dict of every file that it does not refuse with KeyError."""
    hit = False
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        try:
            change(tensors)
        except KeyError:
            continue
        hit = True
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    assert hit


EVERY_TENSOR = {
    "hf bf16": [
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
        *(f"model.layers.2.{name}" for name in (
            "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.sinks",
            "self_attn.q_proj.weight", "self_attn.k_proj.bias", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
            "self_attn.o_proj.bias", "mlp.router.weight", "mlp.router.bias", "mlp.experts.gate_up_proj",
            "mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj", "mlp.experts.down_proj_bias",
        )),
    ],
    "openai mxfp4": [
        "embedding.weight", "norm.scale", "unembedding.weight",
        *(f"block.1.{name}" for name in (
            "attn.norm.scale", "attn.qkv.weight", "attn.qkv.bias", "attn.sinks", "attn.out.weight", "attn.out.bias",
            "mlp.norm.scale", "mlp.gate.weight", "mlp.gate.bias", "mlp.mlp1_weight.scales", "mlp.mlp1_bias",
            "mlp.mlp2_weight.scales", "mlp.mlp2_bias",
        )),
    ],
}  # fmt: skip
NAMES = [(kind, name) for kind, names in EVERY_TENSOR.items() for name in names]


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_a_missing_tensor(copy_of, kind, name):
    source = copy_of(kind)
    change_tensors(source, lambda tensors: tensors.pop(name))
    refused(source, f"{source}: has no tensor {name}")


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_a_tensor_of_another_shape(copy_of, kind, name):
    source = copy_of(kind)

    def longer(tensors):
        tensors[name] = torch.cat([tensors[name], tensors[name][-1:]])

    change_tensors(source, longer)
    refused(source, f"{name} has shape (")


def test_missing_packed_blocks(copy_of):
    source = copy_of("openai mxfp4")
    change_tensors(source, lambda tensors: tensors.pop("block.1.mlp.mlp1_weight.blocks"))
    refused(source, "has no tensor block.1.mlp.mlp1_weight")


def test_plain_experts_that_are_not_transposed(copy_of):
    source = copy_of("hf bf16")

    def turn(tensors):
        name = "model.layers.0.mlp.experts.gate_up_proj"
        tensors[name] = tensors[name].transpose(1, 2)

    change_tensors(source, turn)
    refused(source, "gate_up_proj has shape (5, 192, 64), config.json makes it (5, 64, 192)")


def add(name: str, tensor: torch.Tensor):
    def change(tensors):
        tensors[name] = tensor

    return change


@pytest.mark.parametrize(
    ("kind", "name", "tensor", "message"),
    [
        ("hf bf16", "model.layers.0.extra", torch.zeros(1), "tensor model.layers.0.extra has no place"),
        ("hf bf16", "model.layers.3.self_attn.sinks", torch.zeros(8), "model.layers.3.self_attn.sinks has no place"),
        (
            "hf bf16",
            "model.layers.0.mlp.experts.gate_up_proj_scales",
            torch.zeros(1),
            "model.layers.0.mlp.experts.gate_up_proj_scales has no place",
        ),
        (
            "hf bf16",
            "model.layers.0.mlp.experts.down_proj_blocks",
            torch.zeros(1, dtype=torch.uint8),
            "holds both model.layers.0.mlp.experts.down_proj and model.layers.0.mlp.experts.down_proj_blocks",
        ),
        ("hf bf16", "model.norm.weight", torch.zeros(64, dtype=torch.float16), "model.norm.weight is F16"),
        ("hf bf16", "model.norm.weight", torch.zeros(64, dtype=torch.uint8), "model.norm.weight is uint8, must be"),
        (
            "hf bf16",
            "model.layers.0.mlp.experts.down_proj",
            torch.zeros(5, 96, 64, dtype=torch.uint8),
            "down_proj is uint8, must be bf16 or fp32",
        ),
        (
            "hf mxfp4",
            "model.layers.0.mlp.experts.down_proj_scales",
            torch.zeros(5, 64, 3),
            "down_proj_scales is fp32, must be uint8",
        ),
    ],
    ids=str,
)
def test_a_tensor_too_many_or_of_another_kind(copy_of, kind, name, tensor, message):
    source = copy_of(kind)
    change_tensors(source, add(name, tensor))
    refused(source, message)


def test_the_head_of_a_tied_model(copy_of):
    source = copy_of("hf bf16")
    change_config(source, {"tie_word_embeddings": True})
    refused(source, "tensor lm_head.weight is not model.embed_tokens.weight")


def change_config(source: Path, changes: dict) -> None:
    path = source / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "gone"}))


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "truncate": False}
REFUSED_SETTINGS = [
    ("hf bf16", {"hidden_act": "gelu"}, "hidden_act 'gelu': must be 'silu'"),
    ("hf bf16", {"model_type": "mixtral"}, "model_type 'mixtral': must be 'gpt_oss'"),
    ("hf bf16", {"architectures": ["GptOssForSequenceClassification"]}, "architectures ['GptOssForSequence"),
    ("hf bf16", {"attention_dropout": 0.1}, "attention_dropout 0.1: must be 0"),
    ("hf bf16", {"attention_bias": "yes"}, "attention_bias 'yes': must be true or false"),
    ("hf bf16", {"attention_bias": False}, "0.self_attn.k_proj.bias (and 11 more) has no place"),
    ("hf bf16", {"swiglu_limit": 0}, "swiglu_limit 0: must be above 0"),
    ("hf bf16", {"rms_norm_eps": -1e-5}, "rms_norm_eps -1e-05: must be 0 or more"),
    ("hf bf16", {"new_setting": 3}, "new_setting 3: is not known here"),
    ("hf bf16", {"hidden_size": "64"}, "hidden_size '64': must be a whole number"),
    ("hf bf16", {"hidden_size": 64.5}, "hidden_size 64.5: must be a whole number"),
    ("hf bf16", {"hidden_size": True}, "hidden_size True: must be a whole number"),
    ("hf bf16", {"num_hidden_layers": "gone"}, "has no num_hidden_layers"),
    ("hf bf16", {"num_local_experts": "gone"}, "has no num_experts"),
    ("hf bf16", {"num_experts": 6}, "num_experts 6: is 5 under num_local_experts"),
    ("hf bf16", {"experts_per_token": 4}, "experts_per_token 4: is 2 under num_experts_per_tok"),
    ("hf bf16", {"initial_context_length": 17}, "initial_context_length 17: is 16 under original_max_position"),
    ("hf bf16", {"num_experts_per_tok": 6}, "--model.experts_per_token 6: there are 5 experts"),
    ("hf bf16", {"head_dim": 15}, "--model.head_dim 15: RoPE needs an even number"),
    ("hf bf16", {"layer_types": ["full_attention"]}, "layer_types ['full_attention']: must list 3 layers"),
    ("hf bf16", {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention' is not one of"),
    ("hf bf16", {"sliding_window": None}, "sliding_window None: must be given for sliding_attention layers"),
    ("hf bf16", {"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq': must be 'mxfp4'"),
    ("hf bf16", {"rope_parameters": {**YARN, "truncate": True}}, "truncate True: must be False"),
    ("hf bf16", {"rope_parameters": {key: YARN[key] for key in list(YARN)[:3]}}, "truncate None: must be False"),
    ("hf bf16", {"rope_parameters": {**YARN, "rope_type": "linear"}}, "rope_type 'linear': must be yarn or default"),
    ("hf bf16", {"rope_parameters": {**YARN, "factor": 0.5}}, "factor 0.5: must be 1 or more"),
    ("hf bf16", {"rope_parameters": {**YARN, "mscale": 1.0}}, "mscale 1.0: must be None"),
    ("hf bf16", {"rope_parameters": {**YARN, "attention_factor": 1.1}}, "attention_factor 1.1: must be 0.1 ln"),
    ("hf bf16", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5: must be 1"),
    ("hf bf16", {"rope_parameters": {**YARN, "long_factor": [1]}}, "rope_parameters: long_factor [1]: is not known"),
    ("hf bf16", {"rope_scaling": {"rope_type": "default"}}, "rope_scaling {'rope_type': 'default'}: is not what"),
    ("openai bf16", {"swiglu_limit": 0.0}, "swiglu_limit 0.0: must be above 0"),
    ("openai bf16", {"swiglu_limit": "gone"}, "has no swiglu_limit"),
    ("openai bf16", {"rope_scaling_factor": 0.5}, "--model.rope_factor 0.5: must lie between 1"),
    ("openai bf16", {"num_experts": 0}, "--model.block_pattern has E blocks"),
    ("openai bf16", {"novelty": 1}, "novelty 1: is not known here"),
    ("openai bf16", {"rope_ntk_alpha": "gone"}, "is neither OpenAI's GPT-OSS config nor transformers'"),
    ("openai bf16", {"model": {}}, "is a canonical checkpoint's already"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED_SETTINGS, ids=str)
def test_a_setting_that_our_model_does_not_have(copy_of, kind, changes, message):
    source = copy_of(kind)
    change_config(source, changes)
    refused(source, message)


def test_packed_matrices_of_odd_sizes(copy_of, tmp_path):
    source = copy_of("openai mxfp4")
    change_config(source, {"intermediate_size": 80})
    refused(source, "mlp1_weight.blocks has shape (5, 192, 2, 16), config.json makes it (5, 160, 2, 16)")
    _, source = make_source("every head its own keys", "openai bf16", tmp_path / "odd")

    def pack(tensors):
        del tensors["block.2.mlp.mlp1_weight"]
        tensors["block.2.mlp.mlp1_weight.blocks"] = torch.zeros(7, 80, 1, 16, dtype=torch.uint8)

    change_tensors(source, pack)
    refused(source, "block.2.mlp.mlp1_weight.blocks is MXFP4, but 48 inputs are no multiple of 32")


def cut_short(source: Path) -> str:
    file = sorted(source.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-20])
    return f"{file}: damaged"


def spoil_header(source: Path) -> str:
    file = sorted(source.glob("*.safetensors"))[0]
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    return f"{file}: damaged"


def lose_config(source: Path) -> str:
    (source / "config.json").unlink()
    return f"{source / 'config.json'}: No such file or directory"


def spoil_config(source: Path) -> str:
    (source / "config.json").write_text("{")
    return f"{source / 'config.json'}: damaged"


def list_config(source: Path) -> str:
    (source / "config.json").write_text("[]")
    return f"{source / 'config.json'}: damaged (Input should be an object)"


def lose_shard(source: Path) -> str:
    file = sorted(source.glob("*.safetensors"))[1]
    file.unlink()
    return f"{file}: missing, though the index names it"


def misplace(source: Path) -> str:
    path = source / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    first, last = sorted(values["weight_map"].items(), key=lambda item: item[1])[:: len(values["weight_map"]) - 1]
    values["weight_map"][first[0]] = last[1]
    path.write_text(json.dumps(values))
    return f"has no tensor {first[0]}, though the index says so"


def forget(source: Path) -> str:
    path = source / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    del values["weight_map"]["model.layers.0.self_attn.sinks"]
    path.write_text(json.dumps(values))
    return "tensor model.layers.0.self_attn.sinks is not in the index"


def point_outside(source: Path) -> str:
    path = source / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    values["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(values))
    return "elsewhere.safetensors: missing, though the index names it"


def spoil_index(source: Path) -> str:
    (source / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    return "weight_map: damaged (Input should be an object)"


def second_index(source: Path) -> str:
    shutil.copy(source / "model.safetensors.index.json", source / "z.safetensors.index.json")
    return "z.safetensors.index.json: a second index"


def repeat(source: Path) -> str:
    save_file({"model.norm.weight": torch.zeros(64)}, source / "more.safetensors")
    return "tensor model.norm.weight is in model.safetensors too"


def only_pickles(source: Path) -> str:
    for file in source.glob("*.safetensors*"):
        file.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return f"{source / 'pytorch_model.bin'}: is a pickle, which can run code when it is read"


def index_of_pickles(source: Path) -> str:
    path = source / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"model.norm.weight": "pytorch_model.bin"}}))
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return "pytorch_model.bin: is a pickle"


def nothing(source: Path) -> str:
    for file in source.iterdir():
        file.unlink()
    return f"{source}: holds no .safetensors file"


def not_a_folder(source: Path) -> str:
    shutil.rmtree(source)
    return f"{source}: no such folder"


def spoil_history(source: Path) -> str:
    (source / "surgery.json").write_text("{}")
    return f"{source / 'surgery.json'}: damaged"


SPOILS = [
    *(("hf bf16", spoil) for spoil in (cut_short, spoil_header, lose_config, spoil_config, list_config, repeat)),
    *(("hf bf16", spoil) for spoil in (only_pickles, nothing, not_a_folder, spoil_history)),
    *(("hf bf16 sharded", spoil) for spoil in (lose_shard, misplace, forget, point_outside, spoil_index, second_index)),
    *(("hf bf16 sharded", spoil) for spoil in (index_of_pickles, cut_short)),
]


@pytest.mark.parametrize(("kind", "spoil"), SPOILS, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_source_is_named(copy_of, kind, spoil):
    source = copy_of(kind)
    refused(source, spoil(source))


def test_widths_that_do_not_fit(sources):
    source = sources["hf bf16"]
    refused(source, "--widths [16, 32]: the last width must be the hidden size", ConfigError, widths=[16, 32])
    refused(source, "--widths: 128 does not fit a hidden size of 64", ConfigError, widths=[64, 128])


def test_tokenizers_that_do_not_fit(copy_of, tmp_path):
    source = copy_of("hf bf16")
    write_tokenizer(source / "tokenizer.json", 54)
    refused(source, "has 54 tokens, the model's vocabulary is 53", TokenizerError)
    (source / "tokenizer.json").write_text("{}")
    refused(source, "not a Hugging Face tokenizer.json", TokenizerError)
    refused(source, "nowhere.json: no such file", TokenizerError, tokenizer=tmp_path / "nowhere.json")


def tidy(folder: Path) -> bool:
    """Nothing under the target's name, nothing left aside."""
    return not [path for path in folder.parent.iterdir() if path.name.startswith(folder.name)]


def quiet(*_) -> None:
    pass


def test_nothing_is_written_over(sources, tmp_path):
    job, folder = import_gpt_oss(sources["hf bf16"]), tmp_path / "model"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"model: exists already; give a folder that does not, for example .*model-2"):
        write_job(job, folder, 10**9, quiet)
    assert list(folder.iterdir()) == []
    folder.rmdir()
    folder.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists already"):
        write_job(job, folder, 10**9, quiet)


def test_a_failure_half_way_leaves_nothing(sources, tmp_path):
    """A file is cut short after all of them were checked."""
    source = Path(shutil.copytree(sources["hf bf16 sharded"], tmp_path / "source"))
    job, folder = import_gpt_oss(source), tmp_path / "model"
    last = sorted(source.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-20])
    done = []
    with pytest.raises(CheckpointError, match=f"{last.name}: damaged"):
        write_job(job, folder, 10_000, lambda name, *_: done.append(name))
    assert done and tidy(folder)


def test_an_interrupt_leaves_nothing_and_what_was_left_is_cleared(sources, tmp_path):
    job, folder = import_gpt_oss(sources["openai mxfp4"]), tmp_path / "model"

    def stop(name: str, *_) -> None:
        if name == "blocks.0.moe.experts.gate_weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_job(job, folder, 10**9, stop)
    assert tidy(folder)
    aside = folder.with_name("model.tmp")
    aside.mkdir()
    (aside / "model-00001-of-00001.safetensors").write_bytes(b"left by a run that was killed")
    write_job(job, folder, 10**9, quiet)
    assert folder.is_dir() and not aside.exists()


def test_a_full_disk(sources, tmp_path, monkeypatch):
    job, folder = import_gpt_oss(sources["hf bf16"]), tmp_path / "model"
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(writing.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(StorageError, match=r"model: 0\.0 GB are to be written, 0\.0 GB are free"):
            write_job(job, folder, 10**9, quiet)
    assert tidy(folder)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(StorageError, match=r"model: No space left on device; free some space"):
        write_job(job, folder, 10**9, quiet)
    assert tidy(folder)
