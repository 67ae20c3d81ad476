"""nanochat's own files and transformers' folders become canonical checkpoints: every tensor, and the logits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from surgery.gpt_oss_folders import SQUARE, make_source, write_tokenizer
from surgery.nanochat_folders import (
    EPS,
    own_metadata,
    own_tensors,
    random_nanochat,
    renamed,
    save_own,
    save_random,
    their_logits,
    tokens_of,
    with_windows,
)

from megatron_adamba.checkpoint.canonical import load_into, read_tensors
from megatron_adamba.config.root import read_model_config
from megatron_adamba.elastic.plan import uniform_plan
from megatron_adamba.inference.load import load_model
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.surgery.export_nanochat import export_nanochat
from megatron_adamba.surgery.import_gpt_oss import import_gpt_oss
from megatron_adamba.surgery.import_hf import import_hugging_face
from megatron_adamba.surgery.import_nanochat import import_nanochat
from megatron_adamba.surgery.nanochat_config import CodeSettings
from megatron_adamba.surgery.nanochat_writing import write_nanochat
from megatron_adamba.surgery.torch_file import TorchFile
from megatron_adamba.surgery.writing import write_job

NEWER = CodeSettings(rope_base=10000.0, qk_scale=1.0, softcap=15.0)
"""the first release's values, said aloud"""


def imported(source: Path, folder: Path, **options) -> Path:
    read = import_hugging_face if (source / "config.json").exists() else import_nanochat
    write_job(read(source, **options), folder, 20_000, lambda *_: None)
    return folder


def our_model(folder: Path) -> AdambaModel:
    model = AdambaModel(read_model_config(folder))
    load_into(model, folder)
    return model.requires_grad_(False).eval()


def same_logits(theirs, folder: Path) -> None:
    want = their_logits(theirs)
    assert want.std() > 1 and want.abs().max() > 4, "the softcap must bend something"
    got = our_model(folder)(tokens_of(theirs))
    assert (got - want).abs().max() <= 1e-5


@pytest.mark.oracle
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_own_files(kv_heads, prefix, tmp_path):
    """The embedding in bf16, all else in fp32; the logits are those of transformers."""
    theirs, source = save_random(tmp_path / "source", kv_heads, prefix)
    folder = imported(source, tmp_path / "model")
    config = read_model_config(folder)
    assert (config.norm_eps, config.rope_sign, config.logit_softcap, config.rope_theta) == (EPS, -1, 15.0, 10000.0)
    same_logits(theirs, folder)


@pytest.mark.oracle
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_folders_of_transformers(kv_heads, tmp_path):
    theirs = random_nanochat(kv_heads)
    theirs.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 1
    same_logits(theirs, imported(tmp_path / "source", tmp_path / "model"))


@pytest.mark.parametrize("kind", ["own", "own, compiled", "transformers fp32", "transformers bf16"])
def test_every_tensor_is_where_it_belongs_and_read_once(kind, tmp_path):
    theirs = random_nanochat()
    if kind.startswith("own"):
        tensors = own_tensors(theirs)
        prefix = "_orig_mod." if "compiled" in kind else ""
        source = save_own(tmp_path / "source", tensors, own_metadata(theirs), prefix=prefix)
        job = import_nanochat(source)
    else:
        if "bf16" in kind:
            theirs = theirs.bfloat16()
        source = tmp_path / "source"
        theirs.save_pretrained(source)
        tensors = theirs.state_dict()
        job = import_hugging_face(source)
    origins = Counter(tensor.origin for tensor in job.tensors if not tensor.name.endswith("gain"))
    assert origins == Counter(list(tensors)), "each of the source's tensors once"
    write_job(job, tmp_path / "model", 20_000, lambda *_: None)
    got = dict(read_tensors(tmp_path / "model"))
    want = renamed(theirs.state_dict(), 1)
    assert set(want) == {name for name in got if not name.endswith("gain")}
    for name, tensor in want.items():
        dtype = torch.bfloat16 if "bf16" in kind or (name, kind[:3]) == ("embedding.weight", "own") else torch.float32
        assert got[name].dtype == dtype and torch.equal(got[name].float(), tensor.float()), name
    gains = [tensor for name, tensor in got.items() if name.endswith("gain")]
    assert len(gains) == 7 and all(torch.equal(gain, torch.ones_like(gain)) for gain in gains)


def test_only_the_tensor_at_hand_is_read(tmp_path, monkeypatch):
    """Planning reads none; writing reads each once."""
    _, source = save_random(tmp_path / "source")
    read, real = [], TorchFile.read
    monkeypatch.setattr(TorchFile, "read", lambda self, name: read.append(name) or real(self, name))
    job = import_nanochat(source)
    assert not read
    write_job(job, tmp_path / "model", 10**9, lambda *_: None)
    assert len(read) == 2 + 3 * 6 and max(Counter(read).values()) == 1


CHANGES = {
    "another base": {"rope_parameters": {"rope_type": "default", "rope_theta": 70.0}},
    "another softcap": {"final_logit_softcapping": 5.0},
    "no softcap": {"final_logit_softcapping": None},
    "another epsilon": {"rms_norm_eps": 0.3},
    "heads of another size": {"head_dim": 12},
    "another MLP": {"intermediate_size": 40},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", CHANGES)
def test_settings_that_change_the_logits_are_kept(name, tmp_path):
    theirs = random_nanochat(**CHANGES[name])
    if name == "tied":
        # else the softcap bends nothing
        theirs.model.embed_tokens.weight.mul_(4)
    theirs.save_pretrained(tmp_path / "source")
    same_logits(theirs, imported(tmp_path / "source", tmp_path / "model"))
    if name not in ("tied", "heads of another size", "another MLP"):
        plain = random_nanochat()
        plain.load_state_dict(theirs.state_dict())
        assert (their_logits(plain) - their_logits(theirs)).abs().max() > 1e-3, "the setting must matter"


@pytest.mark.oracle
@pytest.mark.parametrize("base", [100000.0, 300.0])
@pytest.mark.parametrize("newer", [True, False])
def test_what_the_metadata_does_not_say(base, newer, tmp_path):
    """Of a newer checkpoint it must be given, of the first release it may be."""
    theirs = random_nanochat(rope_parameters={"rope_type": "default", "rope_theta": base}, final_logit_softcapping=20.0)
    tensors, metadata = own_tensors(theirs), own_metadata(theirs)
    if newer:
        tensors |= {"resid_lambdas": torch.ones(3), "x0_lambdas": torch.zeros(3)}
    source = save_own(tmp_path / "source", tensors, metadata)
    code = CodeSettings(rope_base=base, softcap=20.0, qk_scale=1.0 if newer else None)
    same_logits(theirs, imported(source, tmp_path / "model", code=code))


IDLE = {
    "resid_lambdas": torch.ones(3),
    "x0_lambdas": torch.zeros(3),
    "smear_gate.weight": torch.randn(1, 24),
    "smear_lambda": torch.zeros(1),
    "backout_lambda": torch.zeros(1),
    "value_embeds.0.weight": torch.zeros(61, 16),
    "value_embeds.2.weight": torch.zeros(61, 16),
    "transformer.h.0.attn.ve_gate.weight": torch.randn(2, 12),
    "transformer.h.2.attn.ve_gate.weight": torch.randn(2, 32),
}


@pytest.mark.oracle
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_tensors_of_later_revisions_that_do_nothing(prefix, tmp_path):
    theirs = random_nanochat()
    metadata = own_metadata(theirs, window_pattern="LL")
    source = save_own(tmp_path / "source", own_tensors(theirs) | IDLE, metadata, prefix=prefix)
    same_logits(theirs, imported(source, tmp_path / "model", code=NEWER))


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("pattern", "lefts"),
    [("SL", [5, None, None]), ("s", [5, 5, None]), ("SSL", [5, 5, None]), ("LS", [None, 5, None]), ("L", [None] * 3)],
)
def test_windows(pattern, lefts, tmp_path):
    """The last layer sees everything whatever its letter; S sees `window` keys before the token's own."""
    theirs = random_nanochat()
    source = save_own(tmp_path / "source", own_tensors(theirs), own_metadata(theirs, window_pattern=pattern))
    plain = their_logits(theirs)
    window = 5 if 5 in lefts else None
    code = CodeSettings(10000.0, 1.0, 15.0, window)
    same_logits(with_windows(theirs, lefts), imported(source, tmp_path / "model", code=code))
    assert ((their_logits(theirs) - plain).abs().max() > 0.01) == (5 in lefts), "the windows must matter"


@pytest.mark.oracle
def test_a_padded_vocabulary_is_cropped(tmp_path):
    """nanochat crops the logits, whatever the padding holds."""
    theirs = random_nanochat()
    tensors = own_tensors(theirs)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.full((3, 32), 9.0, dtype=tensors[name].dtype)])
    source = save_own(tmp_path / "source", tensors, own_metadata(theirs))
    job = import_nanochat(source)
    assert job.promise.endswith("; 3 padding rows of the vocabulary are left out")
    assert "lm_head.weight, rows 0 to 60 of 64" in {tensor.origin for tensor in job.tensors}
    folder = imported(source, tmp_path / "model")
    assert read_model_config(folder).vocab_size == 61
    same_logits(theirs, folder)


def test_which_step(tmp_path):
    """The last of several by number, or the one that is asked for; other files do not count."""
    models = {step: random_nanochat(seed=step) for step in (90, 1000, 1000000)}
    for step, model in models.items():
        save_own(tmp_path / "source", own_tensors(model), own_metadata(model, step), step)
    for name in ("model_9999999.pt.tmp", "model_9999999_old.pt", "optim_9999999_rank0.pt", "model_x.pt"):
        (tmp_path / "source" / name).write_bytes(b"?")
    for step, want in ((None, 1000000), (90, 90), (1000, 1000)):
        folder = imported(tmp_path / "source", tmp_path / f"{step}", step=step)
        head = dict(read_tensors(folder))["head.weight"]
        assert torch.equal(head, models[want].lm_head.weight)
        (entry,) = json.loads((folder / "surgery.json").read_text())
        assert entry == {
            "operation": "import nanochat",
            "arguments": {
                "step": want, "rope_base": 10000.0, "softcap": 15.0, "window": None,
                "widths": [2, 8, 16, 32], "tokenizer": None,
            },
            "source": {"path": str(tmp_path / "source"), "layout": "nanochat"},
        }  # fmt: skip


def test_widths(tmp_path):
    _, source = save_random(tmp_path / "source")
    assert read_model_config(imported(source, tmp_path / "a")).widths == [2, 8, 16, 32]
    chosen = imported(source, tmp_path / "b", widths=[24, 32])
    assert dict(read_tensors(chosen))["blocks.0.mlp_norm.gain"].shape == (2,)
    ours = our_model(chosen)
    for width in ours.config.widths:
        assert torch.isfinite(ours(torch.zeros(1, 5, dtype=torch.int64), plan=uniform_plan(ours.config, width))).all()
    _, odd = save_random(tmp_path / "odd", hidden_size=24, intermediate_size=96)
    assert read_model_config(imported(odd, tmp_path / "c")).widths == [24]


@pytest.mark.parametrize("kind", ["own", "transformers"])
@pytest.mark.parametrize("place", ["beside", "given"])
def test_the_tokenizer_comes_along(kind, place, tmp_path):
    theirs, source = save_random(tmp_path / "source")
    if kind == "transformers":
        source = tmp_path / "theirs"
        theirs.save_pretrained(source)
    file = write_tokenizer((source if place == "beside" else tmp_path) / "tokenizer.json", 61)
    folder = imported(source, tmp_path / "model", **({"tokenizer": file} if place == "given" else {}))
    loaded = load_model(folder, "fp32")
    assert (folder / "tokenizer.json").read_bytes() == file.read_bytes() and loaded.tokenizer.encode("w7") == [7]


def test_a_file_of_ranks_as_tokenizer(tmp_path):
    import base64

    _, source = save_random(tmp_path / "source", vocab_size=300)
    file = tmp_path / "nanochat.tiktoken"
    file.write_text("".join(f"{base64.b64encode(bytes([n])).decode()} {n}\n" for n in range(256)))
    folder = imported(source, tmp_path / "model", tokenizer=file)
    assert load_model(folder, "fp32").tokenizer.encode("ab") == [97, 98]


def test_ranks_of_any_name_are_split_as_nanochat_splits(tmp_path):
    """And stay so on the way out and in again."""
    import base64

    pieces = [bytes([value]) for value in range(256)] + [b"20", b"202", b"2024"]
    lines = "".join(f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces))
    _, source = save_random(tmp_path / "source", vocab_size=300)
    (tmp_path / "ranks.tiktoken").write_text(lines)
    folder = imported(source, tmp_path / "model", tokenizer=tmp_path / "ranks.tiktoken")
    tokenizer = load_model(folder, "fp32").tokenizer
    assert tokenizer.encode("2024") == [256, 50, 52] and tokenizer.eod_id == 259
    (source / "mine.tiktoken").write_text(lines)
    assert load_model(imported(source, tmp_path / "own"), "fp32").tokenizer.hash == tokenizer.hash
    write_nanochat(export_nanochat(folder), tmp_path / "out", lambda *_: None)
    again = load_model(imported(tmp_path / "out", tmp_path / "again"), "fp32").tokenizer
    assert (again.hash, again.vocab_size) == (tokenizer.hash, 268)


def test_a_source_without_a_tokenizer_says_so(tmp_path):
    _, source = save_random(tmp_path / "source")
    assert f"{source} has none" in import_nanochat(source).note
    (source / "tokenizer.pkl").write_bytes(b"")
    assert "tokenizer.pkl is a pickle" in import_nanochat(source).note


def test_two_imports_are_the_same_bytes(tmp_path):
    _, source = save_random(tmp_path / "source")
    first, second = (imported(source, tmp_path / name) for name in ("a", "b"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_import_hf_reads_gpt_oss_too(tmp_path):
    _, source = make_source(SQUARE, "hf bf16", tmp_path / "source")
    job, want = import_hugging_face(source, [8, 32]), import_gpt_oss(source, [8, 32])
    assert job.config == want.config and job.infos == want.infos


def test_the_release_gives_the_models_of_its_size():
    """Settings of the released d32, as its metadata has them."""
    from megatron_adamba.blueprint.manifest import manifest
    from megatron_adamba.blueprint.resolve import resolve_model
    from megatron_adamba.surgery.nanochat_config import read_metadata

    values = {
        "sequence_len": 2048, "vocab_size": 65536, "n_layer": 32, "n_head": 16, "n_kv_head": 16, "n_embd": 2048,
    }  # fmt: skip
    config = resolve_model(read_metadata(Path("meta.json"), {"model_config": values}, CodeSettings(), None))
    assert sum(spec.numel for spec in manifest(config) if spec.group != "gain") == 1_879_048_192
