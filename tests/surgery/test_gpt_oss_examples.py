"""The scripts of examples/gpt_oss, at the size of their tiny twin, on two expert-parallel ranks."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.runs import free_port

ROOT = Path(__file__).resolve().parent.parent.parent


def write_data(folder: Path) -> Path:
    """A little text under `folder`, and a sentencepiece tokenizer of its own; returns the folder of the datasets."""
    texts, source = folder / "texts", random.Random(4)
    texts.mkdir()
    for number in range(200):
        words = ["".join(source.choice("abcdefgh") for _ in range(4)) for _ in range(40)]
        (texts / f"{number}.txt").write_text(" ".join(words))
    tokenizer = folder / "data" / "tokenizer.model"
    tool = lambda name, *words: subprocess.run(
        [sys.executable, ROOT / "tools" / name, "--input", texts, *words], check=True, capture_output=True
    )
    tool("train_tokenizer.py", "--vocab-size", "300", "--output", tokenizer)
    tool("preprocess_data.py", "--tokenizer", tokenizer, "--output", folder / "data", "--split")
    return folder / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("text"))


@pytest.mark.slow
def test_the_whole_road(data, tmp_path):
    """Pretrain, publish, import, graft, phases 1 and 2, generate; phase 1 changes what was grafted and nothing else."""
    small = "--model.hidden_size 64 --model.num_heads 4 --model.num_kv_groups 2 --model.head_dim 16 "
    small += "--model.expert_ffn_size 64 --model.widths [16,32,64] --train.seq_len 64 --optimizer.name adamw"
    places = {"DATA": str(data), "STEPS": "10", "MODEL_SETTINGS": small, "WIDTHS": "16,32,64", "OMP_NUM_THREADS": "1"}
    places |= {"MASTER_PORT": str(free_port()), "RUN_SETTINGS": "--logging.interval 1"}
    script = ["bash", str(ROOT / "examples/gpt_oss/tiny.sh"), str(tmp_path)]
    done = subprocess.run(script, env=os.environ | places, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    said = " ".join(done.stdout.split())
    assert "2 x expert parallel" in said and "weights of" in said and said.count("OK: ") == 2
    history = json.loads((tmp_path / "hybrid" / "surgery.json").read_text())
    assert [entry["operation"] for entry in history][-2:] == ["import gpt-oss", "graft"]
    imported, hybrid, trained = (
        load_file(tmp_path / name / "model-00001-of-00001.safetensors")
        for name in ("imported", "hybrid", "phase1/model")
    )
    assert len(hybrid) > len(imported) and trained.keys() == hybrid.keys()
    # the run is bf16, and what it does not train is fp32 all the same
    changed = {name for name in hybrid if not torch.equal(hybrid[name].float(), trained[name].float())}
    assert changed and all(".mixer" in name for name in changed)
    nested = load_file(tmp_path / "phase2/model/model-00001-of-00001.safetensors")
    assert all(not torch.equal(nested[name], trained[name]) for name in nested if "experts" in name)
    records = [json.loads(line) for line in (tmp_path / "phase2/metrics.jsonl").read_text().splitlines()]
    assert {record["eval_exit"] for record in records if "eval_exit" in record} == {1, 2, 3, 4, 5}
    assert any("@" in record.get("width", "") for record in records), "no plan left early"


@pytest.mark.parametrize("script", ["import.sh", "graft.sh", "phase.sh"])
def test_without_arguments_the_usage(script):
    done = subprocess.run(["bash", str(ROOT / "examples/gpt_oss" / script)], capture_output=True, text=True)
    assert done.returncode == 2 and "usage:" in done.stderr
