"""nanochat through tools/surgery.py as a user runs it, and the memory that it takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from surgery.nanochat_folders import own_metadata, own_tensors, random_nanochat, save_own, save_random, their_logits
from surgery.nanochat_folders import tokens_of as tokens_for
from surgery.test_surgery_memory import peak
from surgery.test_surgery_tool import tool  # noqa: F401  a fixture

from megatron_adamba.checkpoint.canonical import load_into, read_tensors
from megatron_adamba.config.root import read_model_config
from megatron_adamba.model.adamba import AdambaModel


@pytest.mark.oracle
def test_there_and_back(tool, tmp_path):  # noqa: F811
    """.pt -> canonical -> transformers -> canonical -> .pt: the first and the last hold the same tensors."""
    theirs, source = save_random(tmp_path / "source")
    places = ("base", "hf", "again", "back")
    base, hf, again, back = (tmp_path / name for name in places)
    code, out, err = tool("import", "nanochat", source, base, "--widths", "16,32", "--max-shard-size", "20KB")
    assert (code, err) == (0, "") and out.count("\n") == 1
    assert re.fullmatch(rf"{base} holds 27 tensors, 0\.\d+ GB, in \d+ files; the logits at full width are .*\n", out)
    code, out, err = tool("export", "hf", base, hf)
    assert (code, err) == (0, "") and "gains are folded into the matrices behind them" in out
    code, out, err = tool("import", "hf", hf, again)
    assert (code, err) == (0, "") and read_model_config(again).widths == [2, 8, 16, 32]
    model = AdambaModel(read_model_config(again))
    load_into(model, again)
    with torch.no_grad():
        assert (model(tokens_for(theirs)) - their_logits(theirs)).abs().max() <= 1e-5
    code, out, err = tool("export", "nanochat", again, back, "--step", 650)
    assert (code, err) == (0, "")
    assert re.fullmatch(rf"{back} holds 20 tensors, 0\.\d+ GB, in 1 file; the logits at full width are .*\n", out)
    first, last = (torch.load(place / "model_000650.pt", weights_only=True) for place in (source, back))
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
    history = json.loads((back / "surgery.json").read_text())
    assert [entry["operation"] for entry in history] == ["import nanochat", "export hf", "import hf", "export nanochat"]


def test_flags_of_a_newer_checkpoint(tool, tmp_path):  # noqa: F811
    theirs = random_nanochat()
    tensors = own_tensors(theirs) | {"resid_lambdas": torch.ones(3), "x0_lambdas": torch.zeros(3)}
    source = save_own(tmp_path / "source", tensors, own_metadata(theirs, window_pattern="SSL"))
    words = ("import", "nanochat", source, tmp_path / "model")
    code, out, err = tool(*words)
    assert (code, out) == (2, "") and err.startswith("error: --rope-base, --qk-scale, --softcap: ") and err.count("\n")
    given = ("--rope-base", "1e5", "--qk-scale", "1", "--softcap", "20", "--window", "16")
    assert tool(*words, *given, "--step", "650")[0] == 0
    config = read_model_config(tmp_path / "model")
    assert (config.rope_theta, config.logit_softcap) == (1e5, 20.0)
    assert (config.sliding_window, config.window_pattern) == (17, "SSL")


def test_dry_runs(tool, tmp_path):  # noqa: F811
    _, source = save_random(tmp_path / "source")
    base = tmp_path / "base"
    code, out, err = tool("import", "nanochat", source, base, "--dry-run")
    assert (code, err) == (0, "") and not base.exists()
    assert "embedding.weight  [61, 32] bf16  <- transformer.wte.weight\n" in out
    assert "blocks.1.mlp.up.up_weight  [128, 32] fp32  <- transformer.h.1.mlp.c_fc.weight\n" in out
    tool("import", "nanochat", source, base)
    assert [line.split()[0] for line in out.splitlines()[:-1]] == [name for name, _ in in_order(base)]
    for kind, line in (
        ("nanochat", "transformer.h.0.attn.c_v.weight  [16, 32] fp32  <- blocks.0.attention.qkv.v_weight times "),
        ("hf", "model.layers.0.self_attn.v_proj.weight  [16, 32] fp32  <- blocks.0.attention.qkv.v_weight times "),
    ):
        code, out, err = tool("export", kind, base, tmp_path / "b", "--dry-run")
        assert (code, err) == (0, "") and line + "blocks.0.attention_norm\n" in out and not (tmp_path / "b").exists()
        assert f"{tmp_path / 'b'} would hold 20 tensors, " in out and out.endswith("are left\n")


def in_order(folder: Path) -> list[tuple[str, torch.Tensor]]:
    """As the index lists them."""
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = dict(read_tensors(folder))
    return [(name, tensors[name]) for name in names]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("import", "nanochat", "/nowhere", "DST"), 5, "error: /nowhere: no such folder"),
        (("import", "nanochat", "SRC", "SRC"), 2, "exists already; give a folder that does not"),
        (("import", "nanochat", "SRC", "DST", "--step", "3"), 2, "error: --step 3: "),
        (("import", "nanochat", "SRC", "DST", "--widths", "a"), 2, "error: --widths a: must be whole numbers"),
        (("import", "nanochat", "SRC", "DST", "--qk-scale", "1.2"), 2, "error: --qk-scale 1.2: "),
        (("import", "nanochat", "SRC", "DST", "--tokenizer", "t.pkl"), 4, "error: --tokenizer t.pkl: is a pickle"),
        (("import", "hf", "SRC", "DST"), 5, "config.json: No such file or directory; give the folder of a checkpoint"),
        (("export", "nanochat", "/nowhere", "DST"), 5, "error: /nowhere: no such folder"),
        (("export", "nanochat", "SRC", "DST"), 5, "SRC: holds no checkpoint"),
        (("export", "nanochat", "SRC", "SRC"), 2, "exists already; give a folder that does not"),
        (("export", "hf", "SRC", "DST"), 5, "SRC: holds no checkpoint"),
    ],
    ids=str,
)
def test_errors_are_one_line(tool, tmp_path, words, code, message):  # noqa: F811
    _, source = save_random(tmp_path / "source")
    words = [{"SRC": source, "DST": tmp_path / "made"}.get(word, word) for word in words]
    got, out, err = tool(*words)
    assert (got, out) == (code, "") and err.count("\n") == 1 and message.replace("SRC", str(source)) in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def zeros(folder: Path, layers: int, hidden: int, vocab: int) -> int:
    """A checkpoint of zeros; returns the bytes of its largest tensor."""
    block = {f"attn.c_{name}": (hidden, hidden) for name in ("q", "k", "v", "proj")}
    block |= {"mlp.c_fc": (4 * hidden, hidden), "mlp.c_proj": (hidden, 4 * hidden)}
    shapes = {"transformer.wte.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    for layer in range(layers):
        shapes |= {f"transformer.h.{layer}.{name}.weight": shape for name, shape in block.items()}
    sizes = {"sequence_len": 64, "vocab_size": vocab, "n_layer": layers, "n_head": 4, "n_kv_head": 4, "n_embd": hidden}
    save_own(folder, {name: torch.zeros(shape) for name, shape in shapes.items()}, {"model_config": sizes})
    return 4 * hidden * max(vocab, 4 * hidden)


@pytest.mark.slow
def test_memory(tmp_path):
    """Bounded by three times the largest tensor, not by the model."""
    growth = {}
    for name, sizes in (("tiny", (1, 64, 64)), ("large", (8, 768, 8192))):
        source, base = tmp_path / f"{name}-source", tmp_path / name
        largest = zeros(source, *sizes)
        for words in (
            ("import", "nanochat", source, base),
            ("export", "nanochat", base, tmp_path / f"{name}-own"),
            ("export", "hf", base, tmp_path / f"{name}-hf"),
        ):
            growth[words[:2]] = peak(*words) - growth.get(words[:2], 0)
    total = (tmp_path / "large-own" / "model_000000.pt").stat().st_size
    assert total > 8 * largest, "what held the whole model would not show"
    shares = {words: size / largest for words, size in growth.items()}
    print({" ".join(words): f"{share:.2f} of the largest tensor" for words, share in shares.items()})
    assert max(shares.values()) < 3, shares
