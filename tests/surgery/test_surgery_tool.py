"""adamba surgery as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from surgery.gpt_oss_folders import make_source, their_logits, tokens_for, write_tokenizer

from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.checkpoint.canonical import read_tensors
from megatron_adamba.config.root import read_model_config
from megatron_adamba.inference.load import load_model

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "tools" / "surgery.py"


@pytest.fixture
def tool(adamba) -> Callable[..., tuple[int, str, str]]:
    """tool(words...): exit code, stdout and stderr of `adamba surgery WORDS`."""
    return partial(adamba, "surgery")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    _, folder = make_source("grouped queries", "hf mxfp4", tmp_path_factory.mktemp("tool") / "source")
    write_tokenizer(folder / "tokenizer.json")
    return folder


def test_import_graft_and_export(tool, tmp_path):
    """One after the other; transformers reads the last folder and computes what it did with the first."""
    from transformers import GptOssForCausalLM

    theirs, source = make_source("grouped queries", "hf mxfp4", tmp_path / "source")
    write_tokenizer(source / "tokenizer.json")
    base, hybrid, back = (tmp_path / name for name in ("base", "hybrid", "back"))
    code, out, err = tool("import", "gpt-oss", source, base, "--widths", "16,64", "--max-shard-size", "100KB")
    assert (code, err) == (0, "") and out.count("\n") == 1
    assert re.fullmatch(rf"{base} holds \d+ tensors, 0\.\d+ GB, in \d+ files; the logits at full width are .*\n", out)
    assert read_model_config(base).widths == [16, 64] and len(list(base.glob("*.safetensors"))) > 2

    mamba = ("--mamba-num-heads", 4, "--mamba-head-dim", 16, "--mamba-num-groups", 2, "--mamba-d-state", 8)
    code, out, err = tool("graft", base, hybrid, "--pattern", "EEME", *mamba, "--seed", 3)
    assert (code, err) == (0, "") and "the logits are the source's at every width" in out
    config = read_model_config(hybrid)
    assert (config.block_pattern, config.mamba_num_heads, config.mamba_d_state) == ("EEME", 4, 8)
    tokens = tokens_for(theirs.config)
    want = their_logits(theirs, tokens)
    assert (load_model(hybrid, "fp32").model(tokens) - want).abs().max() <= 1e-5

    code, out, err = tool("export", "hf", hybrid, back)
    assert code == 5 and "blocks M of EEME are not GPT-OSS's" in err and not back.exists()
    code, out, err = tool("export", "hf", base, back, "--dtype", "fp32")
    assert (code, err) == (0, "") and "gains are folded into the norms" in out
    again = GptOssForCausalLM.from_pretrained(back, dtype=torch.float32, attn_implementation="eager").eval()
    assert (again(tokens, use_cache=False).logits - want).abs().max() <= 1e-6
    operations = [json.loads((place / "surgery.json").read_text())[-1]["operation"] for place in (base, hybrid, back)]
    assert operations == ["import gpt-oss", "graft", "export hf"]


def test_a_dry_run_shows_every_tensor_and_writes_nothing(tool, source, tmp_path):
    base = tmp_path / "base"
    code, out, err = tool("import", "gpt-oss", source, base, "--dry-run")
    assert (code, err) == (0, "") and not list(tmp_path.iterdir())
    *lines, last = out.splitlines()
    assert last.startswith(f"{base} would hold {len(lines)} tensors, ")
    assert (
        "blocks.2.moe.experts.up_weight  [5, 96, 64] bf16  <- model.layers.2.mlp.experts.gate_up_proj_blocks, "
        "odd rows, MXFP4" in lines
    )
    assert "blocks.0.moe_norm.gain  [4] fp32  <- new: ones" in lines
    tool("import", "gpt-oss", source, base)
    specs = manifest(read_model_config(base))
    assert [line.split("  ")[0] for line in lines] == [spec.name for spec in specs]
    for words, line in (
        (("graft", "--pattern", "MEEE"), "blocks.1.moe_norm.weight  [64] bf16  <- blocks.0.moe_norm.weight\n"),
        (("graft", "--pattern", "MEEE"), "blocks.0.mixer.A_log  [2] fp32  <- new: a_log_uniform\n"),
        (
            ("export", "hf"),
            "model.layers.0.mlp.experts.down_proj  [5, 96, 64] bf16  <- blocks.0.moe.experts.down_weight, transposed\n",
        ),
    ):
        code, out, err = tool(*words, base, tmp_path / "b", "--dry-run")
        assert (code, err) == (0, "") and line in out and not (tmp_path / "b").exists()


def test_a_dry_run_counts_the_files_of_the_real_one(tool, source, tmp_path):
    words = ("import", "gpt-oss", source, tmp_path / "base", "--max-shard-size", "60KB")
    planned, made = tool(*words, "--dry-run")[1], tool(*words)[1]
    assert planned.splitlines()[-1].replace("would hold", "holds") == made.strip()


def test_progress_on_a_terminal_alone(tool, source, tmp_path, monkeypatch):
    assert tool("import", "gpt-oss", source, tmp_path / "quiet")[2] == ""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code, _, err = tool("import", "gpt-oss", source, tmp_path / "loud")
    size = sum(tensor.nbytes for _, tensor in read_tensors(tmp_path / "loud"))
    (kilobytes,) = set(re.findall(r"(\d+\.\d)/\1 kB", re.sub(r"\x1b\[[0-9;]*m", "", err)))
    assert code == 0 and float(kilobytes) == pytest.approx(size / 1e3, abs=0.06)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("import", "gpt-oss", "/nowhere", "DST"), 5, "error: /nowhere: no such folder"),
        (("import", "gpt-oss", "SRC", "SRC"), 2, "exists already; give a folder that does not"),
        (("import", "gpt-oss", "SRC", "DST", "--widths", "16,big"), 2, "error: --widths 16,big: must be whole numbers"),
        (("import", "gpt-oss", "SRC", "DST", "--widths", "16,32"), 2, "error: --widths [16, 32]: the last width"),
        (("import", "gpt-oss", "SRC", "DST", "--max-shard-size", "4XB"), 2, "error: --max-shard-size 4XB: is no size"),
        (("import", "gpt-oss", "SRC", "DST", "--max-shard-size", "0GB"), 2, "error: --max-shard-size 0GB: is no size"),
        (("import", "gpt-oss", "SRC", "DST", "--tokenizer", "t.json"), 4, "error: --tokenizer t.json: no such file"),
        (("graft", "SRC", "DST", "--pattern", "EM"), 5, "has no `model` section"),
        (("export", "hf", "/nowhere", "DST"), 5, "error: /nowhere: no such folder"),
    ],
    ids=str,
)
def test_errors_are_one_line(tool, source, tmp_path, words, code, message):
    folder = tmp_path / "made"
    if words[0] == "graft":
        (source / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    words = [{"SRC": source, "DST": folder}.get(word, word) for word in words]
    got, out, err = tool(*words)
    (source / "model.safetensors.index.json").unlink(missing_ok=True)
    assert (got, out) == (code, "") and err.count("\n") == 1 and message in err, err
    assert not folder.exists() and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * 10**9), ("1.5 mb", 1_500_000), ("2GiB", 2 * 2**30), ("77", 77), ("10kB", 10_000)]
)
def test_sizes(text, size):
    from megatron_adamba.commands.surgery.jobs import parse_size

    assert parse_size(text) == size


COMMANDS = [(), ("import", "gpt-oss"), ("export", "hf"), ("graft",), ("extract",), ("merge-average",), ("compare",)]


@pytest.mark.parametrize("words", COMMANDS, ids=str)
def test_it_is_a_script(words, tmp_path):
    """From any folder, without an installed package; --help loads no model library."""
    program = [sys.executable, "-X", "importtime", str(SCRIPT), *words]
    shown = subprocess.run([*program, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and "adamba surgery" in shown.stdout and not re.search(r"\| +torch$", shown.stderr)
    refused = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "required" in refused.stderr
