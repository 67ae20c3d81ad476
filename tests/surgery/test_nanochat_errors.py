"""What is wrong with a nanochat source is said in a line that names it; nothing of a pickle is run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from surgery.gpt_oss_folders import write_tokenizer
from surgery.nanochat_folders import own_metadata, own_tensors, random_nanochat, save_own, save_random

from megatron_adamba.errors import AdambaError, CheckpointError, ConfigError, TokenizerError
from megatron_adamba.surgery.import_hf import import_hugging_face
from megatron_adamba.surgery.import_nanochat import import_nanochat
from megatron_adamba.surgery.nanochat_config import CodeSettings

NEWER = CodeSettings(10000.0, 1.0, 15.0)


def refused(source: Path, message: str, kind: type[AdambaError] = CheckpointError, **options) -> None:
    read = import_hugging_face if (source / "config.json").exists() else import_nanochat
    with pytest.raises(kind) as raised:
        read(source, **options)
    text = str(raised.value)
    assert message in text and "\n" not in text and (text.startswith("--") or str(source.parent) in text), text


@pytest.fixture
def own(tmp_path):
    """own(tensors, **model_config): a folder of nanochat's with these changes; a tensor None is taken out."""

    def save(changes: dict | None = None, **settings) -> Path:
        theirs = random_nanochat()
        tensors = own_tensors(theirs) | (changes or {})
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return save_own(tmp_path / "source", tensors, own_metadata(theirs, **settings))

    return save


EVERY_TENSOR = [
    "transformer.wte.weight", "lm_head.weight",
    *(f"transformer.h.2.{name}.weight" for name in (
        "attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj",
    )),
]  # fmt: skip


@pytest.mark.parametrize("name", EVERY_TENSOR)
def test_a_missing_tensor(own, name):
    source = own({name: None})
    refused(source, f"{source / 'model_000650.pt'}: has no tensor {name}")


@pytest.mark.parametrize("name", EVERY_TENSOR)
@pytest.mark.parametrize("change", ["wider", "flat", "shorter", "half", "whole numbers"])
def test_a_tensor_of_another_kind(own, name, change):
    tensor = own_tensors(random_nanochat())[name].float()
    changed = {
        "wider": torch.cat([tensor, tensor], dim=1),
        "flat": tensor.flatten(),
        "shorter": tensor[:-1],
        "half": tensor.half(),
        "whole numbers": tensor.long(),
    }[change]
    dtypes = {"half": "is torch.float16, must be bf16 or fp32", "whole numbers": "is torch.int64, must be"}
    refused(own({name: changed}), f"{name} {dtypes.get(change, 'has shape (')}")


@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.3.attn.c_q.weight",
        "transformer.h.0.attn.c_q.bias",
        "transformer.h.0.mlp.c_gate.weight",
        "cos",
        "head.weight",
        "model.embed_tokens.weight",
        "_orig_mod._orig_mod.lm_head.weight",
    ],
)
def test_a_tensor_that_nobody_knows(own, name):
    refused(own({name: torch.ones(4)}), f"tensor {name.removeprefix('_orig_mod.')} has no place in a nanochat model")


LATER = {
    "resid_lambdas": (torch.tensor([1.0, 1.0, 0.9]), "scales the residual stream in front of each layer"),
    "x0_lambdas": (torch.tensor([0.0, 0.1, 0.0]), "adds the embedding in front of each layer"),
    "smear_lambda": (torch.tensor([0.2]), "adds the previous token's embedding"),
    "backout_lambda": (torch.tensor([0.2]), "takes the middle layer's residual away at the end"),
    "value_embeds.2.weight": (torch.full((61, 16), float("nan")), "adds embeddings to the values"),
    "smear_gate.weight": (torch.zeros(1, 24), "is the gate of smear_lambda, which is not there"),
    "transformer.h.2.attn.ve_gate.weight": (torch.zeros(2, 12), "is the gate of value_embeds.2.weight, which is not"),
}


@pytest.mark.parametrize("name", LATER)
def test_what_later_revisions_added(own, name):
    tensor, effect = LATER[name]
    refused(own({name: tensor}), f"tensor {name} {effect}", code=NEWER)


@pytest.mark.parametrize(
    ("tensors", "settings", "newer"),
    [
        ({"resid_lambdas": torch.ones(3)}, {}, "resid_lambdas"),
        ({"x0_lambdas": torch.zeros(3)}, {}, "x0_lambdas"),
        ({"backout_lambda": torch.zeros(1)}, {}, "backout_lambda"),
        ({}, {"window_pattern": "L"}, "window_pattern"),
    ],
)
def test_nothing_is_guessed_of_a_newer_checkpoint(own, tensors, settings, newer):
    source = own(tensors, **settings)
    flags = "--rope-base, --qk-scale, --softcap"
    meta = source / "meta_000650.json"
    refused(source, f"{flags}: {newer} makes {meta} newer than October 2025", ConfigError)
    refused(source, "--softcap: ", ConfigError, code=CodeSettings(rope_base=1.0, qk_scale=1.0))
    refused(source, "for example --rope-base 10000 --qk-scale 1", ConfigError, code=CodeSettings(softcap=15.0))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ({"qk_scale": 1.2}, "--qk-scale 1.2: queries and keys of our models have no scale"),
        ({"rope_base": 0.0}, "--rope-base 0.0: must be above 0 and finite, for example --rope-base 10000"),
        ({"rope_base": float("nan")}, "--rope-base nan: must be above 0"),
        ({"softcap": -1.0}, "--softcap -1.0: must be 0 (none) or more and finite, for example --softcap 15"),
        ({"softcap": float("inf")}, "--softcap inf: must be 0"),
        ({"window": 4}, "--window 4: no layer of this model has a window; leave the flag out"),
    ],
    ids=str,
)
def test_flags(own, code, message):
    refused(own(), message, ConfigError, code=CodeSettings(**code))


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (None, "--window: no file says how far a layer S of window_pattern SL sees; its code had half the context at "
               "first (--window 32)"),
        (0, "--window 0: must be 1 or more, for example --window 32"),
    ],
)  # fmt: skip
def test_windows(own, window, message):
    refused(own(window_pattern="SL"), message, ConfigError, code=CodeSettings(10000.0, 1.0, 15.0, window))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_pattern": "SX"}, "model_config: window_pattern 'SX': must be letters S and L"),
        ({"window_pattern": ""}, "window_pattern '': must be letters S and L"),
        ({"window_pattern": 3}, "window_pattern 3: must be letters S and L"),
        ({"n_head": 5}, "n_embd 32: must be a multiple of n_head 5"),
        ({"n_head": 0}, "--model.num_heads 0: must be above 0"),
        ({"n_kv_head": 3}, "--model.num_kv_groups 3: must divide num_heads 4"),
        ({"n_layer": "3"}, "n_layer '3': must be a whole number"),
        ({"n_layer": 0}, "block_pattern"),
        ({"n_layer": None}, "model_config: has no n_layer; restore the file"),
        ({"vocab_size": 62}, "transformer.wte.weight has shape (61, 32), meta_000650.json makes it (62, 32)"),
        ({"rotary_base": 5}, "rotary_base 5: is not known here; take it out of the file if it does not change"),
    ],
    ids=str,
)
def test_metadata(own, settings, message):
    refused(own(**settings), message, code=NEWER)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "meta_000650.json: No such file"),
        ("{", "damaged"),
        ("[]", "damaged (Input should be an object)"),
        ("{}", "no model_config"),
    ],
)
def test_damaged_metadata(own, content, message):
    source = own()
    path = source / "meta_000650.json"
    path.unlink() if content is None else path.write_text(content)
    refused(source, message)


def test_folders(own, tmp_path):
    refused(tmp_path / "nowhere", f"{tmp_path / 'nowhere'}: no such folder; give one that holds model_NNNNNN.pt")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no model_NNNNNN.pt")
    source = own()
    refused(source, f"--step 7: {source} holds 650; try --step 650", ConfigError, step=7)


class Trap:
    """Pickled as a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["a value", "a key", "all of it", "not a zip archive"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_pickle_that_runs_code(own, tmp_path, place, forced, monkeypatch):
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    source, sprung = own(), tmp_path / "sprung"
    trap, path = Trap(sprung), source / "model_000650.pt"
    held = own_tensors(random_nanochat())
    if place == "not a zip archive":
        path.write_bytes(pickle.dumps(held | {"cos": trap}))
    else:
        torch.save({"a value": held | {"cos": trap}, "a key": held | {trap: 1}, "all of it": trap}[place], path)
    refused(source, f"{path}: damaged" if place == "not a zip archive" else f"{path}: holds posix.mkdir beside tensors")
    assert not sprung.exists()
    torch.load(path, weights_only=False) if place == "a value" else None
    assert sprung.exists() == (place == "a value"), "the trap must work"


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([torch.ones(1)], "holds a list; must be a dict of tensors by name"),
        ({"model": {"lm_head.weight": torch.ones(1)}}, "model is a dict; must be a tensor"),
        ({"step": 3}, "step is a int; must be a tensor"),
        ({3: torch.ones(1)}, "holds something under 3; must be a dict of tensors by name"),
        ({"cos": torch.ones(3).to_sparse()}, "cos is no plain tensor (torch.sparse_coo, on cpu)"),
        ({"cos": torch.ones(3, device="meta")}, "cos is no plain tensor (torch.strided, on meta)"),
        ({"cos": torch.ones(1), "_orig_mod.cos": torch.ones(1)}, "holds both cos and _orig_mod.cos; one of them"),
    ],
    ids=["list", "nested", "number", "key", "sparse", "meta", "twice"],
)
def test_a_file_of_something_else(own, held, message):
    source = own()
    torch.save(held, source / "model_000650.pt")
    refused(source, message)


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "old", "script", "folder"])
def test_a_damaged_file(own, kind):
    source = own()
    path = source / "model_000650.pt"
    content = path.read_bytes()
    if kind == "old":
        torch.save(own_tensors(random_nanochat()), path, _use_new_zipfile_serialization=False)
    elif kind == "script":
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("data.pkl", "constants.pkl"):
                archive.writestr(f"program/{name}", pickle.dumps({}))
            archive.writestr("program/version", "3\n")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "text": b"hello", "cut": content[: len(content) // 2]}[kind])
    refused(source, f"{path}: damaged, or not written by torch.save (")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer.pkl", "is a pickle, which can run code when it is read; give its tokenizer.json"),
        ("token_bytes.pt", "is a pickle"),
        ("nowhere.json", "no such file"),
        ("large.json", "has 62 tokens, the model's vocabulary is 61"),
    ],
)
@pytest.mark.parametrize("kind", ["own", "transformers"])
def test_tokenizers(tmp_path, name, message, kind):
    theirs, source = save_random(tmp_path / "source")
    if kind == "transformers":
        source = tmp_path / "theirs"
        theirs.save_pretrained(source)
    file = tmp_path / name
    if name == "large.json":
        write_tokenizer(file, 62)
    elif name != "nowhere.json":
        file.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    refused(source, f"--tokenizer {file}: {message}", TokenizerError, tokenizer=file)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("kind", ["own", "transformers"])
def test_widths(tmp_path, kind):
    theirs, source = save_random(tmp_path / "source")
    if kind == "transformers":
        source = tmp_path / "theirs"
        theirs.save_pretrained(source)
    refused(source, "--widths [8, 16]: the last width must be", ConfigError, widths=[8, 16])


@pytest.fixture
def theirs(tmp_path):
    """theirs(**settings): a folder of transformers' with these changes to its config.json."""

    def save(**settings) -> Path:
        random_nanochat().save_pretrained(tmp_path / "source")
        path = tmp_path / "source" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        return tmp_path / "source"

    return save


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama': must be 'nanochat': this reads NanoChat alone"),
        ({"hidden_act": "silu"}, "hidden_act 'silu': must be 'relu2'"),
        ({"attention_bias": True}, "attention_bias True: must be False: its MLPs have no biases"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1: must be 0"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder True: must be False"),
        ({"quantization_config": {}}, "quantization_config {}: must be None"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping 0: must be above 0; null turns it off"),
        ({"final_logit_softcapping": "15"}, "final_logit_softcapping '15': must be a number"),
        ({"rms_norm_eps": 0}, "--model.norm_eps 0.0: must be above 0"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling {'factor': 2}: must be None"),
        ({"rope_parameters": 5}, "rope_parameters 5: must be an object"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: rope_type 'yarn': must be 'default'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5: must be 1"),
        ({"rope_parameters": {"factor": 2}}, "rope_parameters: factor 2: is not known here"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings 1: must be true or false"),
        ({"tie_word_embeddings": True}, "tensor lm_head.weight is not model.embed_tokens.weight"),
        ({"num_attention_heads": 3}, "--model.num_kv_groups 2: must divide num_heads 3"),
        ({"hidden_size": 64}, "model.embed_tokens.weight has shape (61, 32), config.json makes it (61, 64)"),
        ({"vocab_size": 60}, "model.embed_tokens.weight has shape (61, 32), config.json makes it (60, 32)"),
        ({"intermediate_size": None}, "has no intermediate_size; restore the file"),
        ({"auto_map": {}}, "auto_map {}: is not known here"),
        ({"sliding_window": 5}, "sliding_window 5: is not known here"),
    ],
    ids=str,
)
def test_settings_of_transformers(theirs, settings, message):
    refused(theirs(**settings), message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures ['LlamaForCausalLM'] is not read; one of NanoChatFor"),
        ({"architectures": ["NanoChatModel"]}, "architectures ['NanoChatModel'] is not read"),
        ({"architectures": []}, "architectures [] is not read"),
        ({"architectures": "NanoChatForCausalLM"}, "architectures 'NanoChatForCausalLM' is not read"),
        ({"architectures": None, "model_type": "llama"}, "model_type 'llama' is not read; one of nanochat, gpt_oss is"),
        ({"architectures": None, "model_type": []}, "model_type [] is not read"),
        ({"architectures": None, "model_type": None}, "names no architecture"),
        ({"model": {}}, "is a canonical checkpoint's already; there is nothing to import"),
    ],
    ids=str,
)
def test_architectures(theirs, settings, message):
    refused(theirs(**settings), message)


def test_no_folder_of_transformers(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: No such file or directory; give the folder"):
        import_hugging_face(tmp_path / "nowhere")
    random_nanochat().save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").rename(tmp_path / "source" / "pytorch_model.bin")
    refused(tmp_path / "source", "pytorch_model.bin: is a pickle, which can run code when it is read")
