"""Exported folders are loaded by transformers or by torch and compute the same; what nanochat cannot be is refused."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from oracles.dense import randomize
from safetensors.torch import load_file
from surgery.gpt_oss_folders import write_tokenizer
from surgery.nanochat_folders import EPS, random_nanochat, renamed, save_random, tokens_of

from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.checkpoint.canonical import read_tensors, write_canonical
from megatron_adamba.checkpoint.shards import TensorInfo
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.errors import CheckpointError, ConfigError, StorageError
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.surgery import torch_file_writer
from megatron_adamba.surgery.export_hf import export_by_blocks
from megatron_adamba.surgery.export_nanochat import export_nanochat
from megatron_adamba.surgery.import_hf import import_hugging_face
from megatron_adamba.surgery.import_nanochat import import_nanochat
from megatron_adamba.surgery.nanochat_writing import write_nanochat
from megatron_adamba.surgery.torch_file_writer import write_torch_file
from megatron_adamba.surgery.writing import write_job

BASE = {
    "hidden_size": 32,
    "num_layers": 3,
    "vocab_size": 61,
    "num_heads": 4,
    "num_kv_groups": 2,
    "head_dim": 8,
    "ffn_size": 128,
    "ffn_granule": 32,
    "rope_sign": -1,
    "embedding_norm": True,
    "norm_weight": False,
    "norm_eps": EPS,
    "logit_softcap": 15.0,
    "widths": [8, 16, 32],
}


def our_model(**changes) -> AdambaModel:
    """Every parameter random, gains too: half of them negative."""
    model = AdambaModel(resolve_model(ModelConfig(**{**BASE, **changes})))
    randomize(model, seed=4)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith("gain"):
                parameter.mul_(-1.4 if number % 2 else 0.7)
            elif name.endswith("head.weight"):
                parameter.mul_(2 / parameter.std() * 32**-0.5)
    return model.requires_grad_(False).eval()


def saved(model: AdambaModel, folder: Path, dtypes=lambda name: torch.float32) -> Path:
    """dtypes: of each tensor by its name."""
    tensors = ((name, tensor.to(dtypes(name))) for name, tensor in model.named_parameters())
    write_canonical(folder, {"model": asdict(model.config)}, tensors, max_shard_bytes=30_000)
    return folder


def exported(source: Path, folder: Path, dtype: torch.dtype | None = None) -> Path:
    write_job(export_by_blocks(source, dtype), folder, 20_000, lambda *_: None)
    return folder


def exported_own(source: Path, folder: Path, **options) -> Path:
    write_nanochat(export_nanochat(source, **options), folder, lambda *_: None)
    return folder


def loaded(folder: Path, dtype: torch.dtype | str = torch.float32):
    """By transformers, which must have found each of its tensors and no other."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert type(model).__name__ == "NanoChatForCausalLM"
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval().requires_grad_(False)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_logits(ours: AdambaModel, theirs) -> None:
    tokens = tokens_of(theirs)
    want = ours(tokens)
    assert want.std() > 1 and want.abs().max() > 4, "the softcap must bend something"
    assert (theirs(tokens, use_cache=False).logits - want).abs().max() <= 1e-5


CHANGES = {
    "grouped queries": {},
    "every head its own keys": {"num_kv_groups": 4},
    "one key head": {"num_kv_groups": 1},
    "no softcap": {"logit_softcap": 0.0},
    "another epsilon": {"norm_eps": 0.1},
    "another base": {"rope_theta": 70.0},
    "heads of another size": {"head_dim": 12},
    "another MLP": {"ffn_size": 96},
    "norms with weights": {"norm_weight": True},
    "one width": {"widths": [32]},
    "a window that no layer has": {"sliding_window": 4},
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", CHANGES)
def test_transformers_computes_the_same(name, tmp_path):
    """Gains at full width are random here: folding them into the matrices must be exact."""
    ours = our_model(**CHANGES[name])
    same_logits(ours, loaded(exported(saved(ours, tmp_path / "model"), tmp_path / "hf")))


@pytest.mark.oracle
def test_a_tied_head(tmp_path):
    """It takes no gain, so the final norm must have none."""
    ours = our_model(tie_embeddings=True)
    ours.embedding.weight.mul_(2 / ours.embedding.weight.std() * 32**-0.5)
    source = saved(ours, tmp_path / "random")
    gain = ours.final_norm.gain.item()
    with pytest.raises(CheckpointError, match=rf"{source}: final_norm multiplies by {gain:g}, which the head would"):
        export_by_blocks(source)
    ours.final_norm.gain.fill_(1.0)
    folder = exported(saved(ours, tmp_path / "model"), tmp_path / "hf")
    assert "lm_head.weight" not in load_all(folder)
    same_logits(ours, loaded(folder))


@pytest.mark.oracle
@pytest.mark.parametrize("kv_groups", [4, 2])
@pytest.mark.parametrize("mmap", [False, True])
def test_own_files(kv_groups, mmap, tmp_path):
    """As torch reads them; computed by transformers."""
    ours = our_model(num_kv_groups=kv_groups)
    folder = exported_own(saved(ours, tmp_path / "model"), tmp_path / "own", step=650)
    assert {path.name for path in folder.iterdir()} == {"model_000650.pt", "meta_000650.json", "surgery.json"}
    assert json.loads((folder / "meta_000650.json").read_text()) == {
        "step": 650,
        "model_config": {
            "sequence_len": 4096, "vocab_size": 61, "n_layer": 3, "n_head": 4, "n_kv_head": kv_groups, "n_embd": 32,
        },
    }  # fmt: skip
    tensors = torch.load(folder / "model_000650.pt", weights_only=True, mmap=mmap)
    theirs = random_nanochat(kv_groups, seed=1)
    state = theirs.state_dict()
    assert set(tensors) == set(renamed(state, 0))
    state.update({name: tensors[own] for name in state for own in renamed({name: state[name]}, 0)})
    theirs.load_state_dict(state)
    same_logits(ours, theirs)


def test_the_file_is_a_sound_archive(tmp_path):
    """Checksums too; tensors lie where a memory map wants them; two exports are the same bytes."""
    source = saved(our_model(), tmp_path / "model")
    first, second = (exported_own(source, tmp_path / name) / "model_000000.pt" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.testzip() is None and len(archive.infolist()) == 20 + 3
    for tensor in torch.load(first, weights_only=True, mmap=True).values():
        assert tensor.data_ptr() % 64 == 0 and tensor.is_contiguous()
    assert not torch.serialization.get_unsafe_globals_in_checkpoint(first)


def test_tensors_above_the_old_limit_of_archives(tmp_path, monkeypatch):
    """Their entries have a larger header; here all tensors have it."""
    monkeypatch.setattr(torch_file_writer, "_ZIP64_LIMIT", 1000)
    tensors = {"a": torch.randn(7, 50), "b": torch.randn(3).bfloat16(), "c": torch.randn(500).bfloat16()}
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    path = tmp_path / "x.pt"
    write_torch_file(path, infos, tensors.items())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    for mmap in (False, True):
        got = torch.load(path, weights_only=True, mmap=mmap)
        assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
        assert not mmap or all(tensor.data_ptr() % 64 == 0 for tensor in got.values())


@pytest.mark.parametrize(
    ("came", "message"),
    [
        ([], "a was announced"),
        ([("b", torch.ones(2))], "b, torch.float32 .2., came"),
        ([("a", torch.ones(3))], "a was announced"),
        ([("a", torch.ones(2).bfloat16())], "torch.bfloat16"),
        ([("a", torch.ones(2)), ("b", torch.ones(2))], "b: came and was not announced"),
    ],
)
def test_what_comes_must_be_what_was_announced(came, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_torch_file(tmp_path / "x.pt", {"a": TensorInfo((2,), torch.float32)}, came)


@pytest.mark.oracle
def test_bf16_rounds_once(tmp_path):
    """Asked for, or the source's own: each tensor is the fp32 export's, rounded; what differed stays different."""
    ours = our_model()
    exact = load_all(exported(saved(ours, tmp_path / "model"), tmp_path / "fp32"))
    asked = exported(tmp_path / "model", tmp_path / "bf16", dtype=torch.bfloat16)
    for name, tensor in load_all(asked).items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, exact[name].bfloat16()), name
    assert loaded(asked, "auto").dtype == torch.bfloat16
    mixed = saved(ours, tmp_path / "half", lambda name: torch.bfloat16 if "embedding" in name else torch.float32)
    own = load_all(exported(mixed, tmp_path / "own"))
    assert {name for name, tensor in own.items() if tensor.dtype == torch.bfloat16} == {"model.embed_tokens.weight"}
    assert loaded(tmp_path / "own", "auto").dtype == torch.float32
    file = exported_own(mixed, tmp_path / "pt") / "model_000000.pt"
    dtypes = {name: tensor.dtype for name, tensor in torch.load(file, weights_only=True).items()}
    assert dtypes.pop("transformer.wte.weight") == torch.bfloat16 and set(dtypes.values()) == {torch.float32}
    half = exported_own(mixed, tmp_path / "pt16", dtype=torch.bfloat16) / "model_000000.pt"
    got = torch.load(half, weights_only=True)
    for name, tensor in renamed(exact, 0).items():
        assert torch.equal(got[name], tensor.bfloat16()), name


@pytest.mark.parametrize("to", ["own", "transformers"])
def test_what_was_imported_goes_back_as_it_was(to, tmp_path):
    """Bit by bit, each tensor in its own dtype, with the tokenizer and the history."""
    _, source = save_random(tmp_path / "source")
    write_tokenizer(source / "tokenizer.json", 61)
    want = torch.load(source / "model_000650.pt", weights_only=True)
    write_job(import_nanochat(source), tmp_path / "model", 50_000, lambda *_: None)
    if to == "own":
        back = exported_own(tmp_path / "model", tmp_path / "back", step=650)
        got = torch.load(back / "model_000650.pt", weights_only=True)
        old, new = (json.loads((folder / "meta_000650.json").read_text()) for folder in (source, back))
        assert new["model_config"] == old["model_config"]
        again = import_nanochat(back)
    else:
        back = exported(tmp_path / "model", tmp_path / "back")
        got = renamed(load_all(back), 0)
        again = import_hugging_face(back)
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    steps = [step["operation"] for step in json.loads((back / "surgery.json").read_text())]
    assert steps == ["import nanochat", "export nanochat" if to == "own" else "export hf"]
    write_job(again, tmp_path / "again", 50_000, lambda *_: None)
    first, second = (dict(read_tensors(tmp_path / name)) for name in ("model", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    old, new = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "again"))
    assert old == new


BOTH = {
    "a Mamba block": ({"block_pattern": "TMT", "num_layers": None}, "blocks M of TMT are not {}'s, which are all T"),
    "windows": ({"sliding_window": 3, "window_pattern": "SL"}, "model.window_pattern SL: {} has L"),
    "swiglu": ({"activation": "swiglu"}, "model.activation swiglu: {} has relu2"),
    "biases": ({"linear_bias": True}, "model.linear_bias True: {} has False"),
    "no QK-norm": ({"qk_norm": False}, "model.qk_norm False: {} has True"),
    "no norm behind the embedding": ({"embedding_norm": False}, "model.embedding_norm False: {} has True"),
    "sinks": ({"attention_sinks": True}, "model.attention_sinks True: {} has False"),
    "the usual rotation": ({"rope_sign": 1}, "model.rope_sign 1: {} has -1"),
    "YaRN": ({"rope_factor": 2.0}, "model.rope_factor 2.0: {} has 1.0"),
    "grown": ({"static_norm_size": 24}, "model.static_norm_size 24: {} has 32"),
}
OWN_ALONE = {
    "another base": ({"rope_theta": 5e5}, "model.rope_theta 500000.0: {} has 10000.0"),
    "another softcap": ({"logit_softcap": 20.0}, "model.logit_softcap 20.0: {} has 15.0"),
    "another epsilon": ({"norm_eps": 1e-6}, "model.norm_eps 1e-06: {} has 1.1920929e-07"),
    "another MLP": ({"ffn_size": 96}, "model.ffn_size 96: {} has 128"),
    "heads of another size": ({"head_dim": 12}, "model.head_dim 12: {} has 8"),
    "more heads than fit": ({"num_heads": 6}, "n_embd 32: must be a multiple of n_head 6"),
    "tied": ({"tie_embeddings": True}, "model.tie_embeddings True: {} has False"),
}


def refused(plan, source: Path, message: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        plan(source)
    text = str(raised.value)
    assert message in text and str(source) in text and "\n" not in text, text


@pytest.mark.parametrize("name", BOTH)
def test_what_nanochat_cannot_be(name, tmp_path):
    changes, message = BOTH[name]
    source = saved(our_model(**changes), tmp_path / "model")
    refused(export_by_blocks, source, message.format("NanoChat"))
    refused(export_nanochat, source, message.format("nanochat's first release"))


@pytest.mark.parametrize("name", OWN_ALONE)
def test_what_the_first_release_cannot_be(name, tmp_path):
    changes, message = OWN_ALONE[name]
    source = saved(our_model(**changes), tmp_path / "model")
    refused(export_nanochat, source, message.format("nanochat's first release"))


@pytest.mark.parametrize(("field", "value"), [("norm_size", 16), ("kv_groups", 1), ("ffn", 96)])
def test_a_full_width_that_is_not_all(field, value, tmp_path):
    rows = our_model().config.nest
    rows = [*rows[:-1], replace(rows[-1], **{field: value})]
    source = saved(our_model(nest=rows, widths=None), tmp_path / "model")
    for plan in (export_by_blocks, export_nanochat):
        refused(plan, source, f"{field} {value} of the full width 32: ")


def test_narrow_rows_do_not_matter(tmp_path):
    ours = our_model()
    rows = [replace(ours.config.nest[0], norm_size=99), *ours.config.nest[1:]]
    source = saved(our_model(nest=rows, widths=None), tmp_path / "model")
    plain = load_all(exported(saved(ours, tmp_path / "plain"), tmp_path / "a"))
    grown = load_all(exported(source, tmp_path / "b"))
    assert all(torch.equal(grown[name], tensor) for name, tensor in plain.items())


def test_a_dtype_that_neither_has(tmp_path):
    ours = our_model()
    source = saved(ours, tmp_path / "model", lambda name: torch.float16 if "head" in name else torch.float32)
    for plan in (export_by_blocks, export_nanochat):
        refused(plan, source, "head.weight is torch.float16; give --dtype bf16 or --dtype fp32")
    assert {tensor.dtype for tensor in export_by_blocks(source, torch.float32).tensors} == {torch.float32}


def test_experts_go_the_other_way(tmp_path):
    changes = {"block_pattern": "TE", "num_layers": None, "num_experts": 2, "experts_per_token": 1}
    source = saved(our_model(**changes, expert_ffn_size=32), tmp_path / "model")
    refused(export_by_blocks, source, "blocks T of TE are not GPT-OSS's, which are all E")
    refused(export_nanochat, source, "blocks E of TE are not nanochat's first release's")


def test_targets(tmp_path):
    source = saved(our_model(), tmp_path / "model")
    for step in (-1, 1_000_000):
        with pytest.raises(ConfigError, match=f"--step {step}: must lie between 0 and 999999, for example --step 0"):
            export_nanochat(source, step)
    job = export_nanochat(source)
    with pytest.raises(ConfigError, match="exists already; give a folder that does not"):
        write_nanochat(job, source, lambda *_: None)
    with pytest.raises(CheckpointError, match="no such folder"):
        export_nanochat(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises((StorageError, OSError)):
        write_nanochat(job, tmp_path / "file" / "below", lambda *_: None)


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    """The disk is full in the middle of the tensors."""
    source = saved(our_model(), tmp_path / "model")
    job = export_nanochat(source)

    def full() -> torch.Tensor:
        raise OSError(28, "No space left on device")

    tensors = [*job.tensors[:5], replace(job.tensors[5], make=full), *job.tensors[6:]]
    with pytest.raises(StorageError, match="No space left"):
        write_nanochat(replace(job, tensors=tuple(tensors)), tmp_path / "own", lambda *_: None)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
