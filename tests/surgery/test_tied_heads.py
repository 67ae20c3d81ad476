"""What others write beside what is needed: the head of a tied model once more, notes of converters in config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from surgery.gpt_oss_folders import random_gpt_oss, save_hugging_face, their_logits, tokens_for
from surgery.nanochat_folders import random_nanochat

from megatron_adamba.errors import CheckpointError
from megatron_adamba.surgery import importing
from megatron_adamba.surgery.import_hf import import_hugging_face
from megatron_adamba.surgery.writing import write_job

pytestmark = pytest.mark.oracle


def tied(folder: Path, kind: str):
    """A tied model of transformers that stores its head too."""
    if kind == "nanochat":
        model = random_nanochat(tie_word_embeddings=True)
        model.save_pretrained(folder)
    else:
        model = random_gpt_oss("grouped queries", tie_word_embeddings=True)
        save_hugging_face(model, folder, torch.float32)
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    return model


def change(folder: Path, how) -> None:
    tensors = load_file(folder / "model.safetensors")
    how(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["nanochat", "gpt-oss"])
def test_a_copy_of_the_embedding_is_left_out(kind, tmp_path, monkeypatch):
    from surgery.nested_models import load

    monkeypatch.setattr(importing, "_ROWS_AT_ONCE", 300)
    model = tied(tmp_path / "source", kind)
    job = import_hugging_face(tmp_path / "source")
    assert "head.weight" not in job.infos
    write_job(job, tmp_path / "ours", 10**9, lambda *_: None)
    tokens = tokens_for(model.config, 20)
    assert torch.allclose(load(tmp_path / "ours")(tokens), their_logits(model, tokens), atol=1e-5)
    # in another precision, the same values
    change(tmp_path / "source", lambda tensors: tensors.update(
        {name: tensors[name].bfloat16().to(dtype) for name, dtype in
         (("lm_head.weight", torch.bfloat16), ("model.embed_tokens.weight", torch.float32))}
    ))  # fmt: skip
    assert "head.weight" not in import_hugging_face(tmp_path / "source").infos


@pytest.mark.parametrize("kind", ["nanochat", "gpt-oss"])
@pytest.mark.parametrize("how", ["one value", "one row less", "another rank"])
def test_another_head_is_named(kind, how, tmp_path):
    tied(tmp_path / "source", kind)

    def spoil(tensors):
        head = tensors["lm_head.weight"]
        if how == "one value":
            head[-1, -1] += 1
        tensors["lm_head.weight"] = {"one row less": head[1:], "another rank": head[0]}.get(how, head).contiguous()

    change(tmp_path / "source", spoil)
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight is not model\.embed_tokens\.weight, though"):
        import_hugging_face(tmp_path / "source")
    values = json.loads((tmp_path / "source" / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "source" / "config.json").write_text(json.dumps(values))
    if how == "one value":
        assert "head.weight" in import_hugging_face(tmp_path / "source").infos


NOTES = {"unsloth_version": "2026.1", "unsloth_fixed": True, "transformers.js_config": {"a": 1}, "_name_or_path": "x",
         "tokenizer_class": "PreTrainedTokenizerFast", "is_decoder": True, "something_null": None}  # fmt: skip


@pytest.mark.parametrize("kind", ["nanochat", "gpt-oss"])
def test_notes_of_converters(kind, tmp_path):
    tied(tmp_path / "source", kind)
    path = tmp_path / "source" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | NOTES))
    assert import_hugging_face(tmp_path / "source").tensors
    path.write_text(json.dumps(values | {"unslothful": 1}))
    with pytest.raises(CheckpointError, match="unslothful 1: is not known here"):
        import_hugging_face(tmp_path / "source")
