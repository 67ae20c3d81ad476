"""tools/checkpoint.py converts and shows checkpoints of real runs."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import (
    FP32,
    INDEX,
    SIZES,
    TOOL,
    config_of,
    edit_json,
    model_of,
    only_weights,
    reassemble,
    refused,
    same_bits,
    save_as,
    seal,
    specs_of,
    weights_of,
)
from torch import Tensor
from training.runs import arguments, losses, train

from megatron_adamba.checkpoint.canonical import load_into
from megatron_adamba.data.blend import build_dataset
from megatron_adamba.data.loader import load_micro_batch
from megatron_adamba.data.sentencepiece_training import train_sentencepiece
from megatron_adamba.data.tokenizer import ByteTokenizer, load_tokenizer
from megatron_adamba.model.adamba import AdambaModel


def test_training_becomes_canonical(call, run, tmp_path):
    """RUN/checkpoints means the latest; its weights, with their dtypes, config and nothing else."""
    step = run / "checkpoints" / "step-00000010"
    code, out, err = call("convert", run / "checkpoints", tmp_path / "model")
    assert (code, err) == (0, "") and out.startswith(f"{tmp_path / 'model'}: canonical, 24 tensors, ")
    held = weights_of(tmp_path / "model")
    same_bits(held, only_weights(reassemble(step)))
    assert {t.dtype for t in held.values()} == {torch.float32} | (
        {torch.bfloat16} if run.parent.name.startswith("one") else set()
    )
    assert config_of(tmp_path / "model") == json.loads((step / "state.json").read_text())["config"]
    total = json.loads((tmp_path / "model" / INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(t.numel() * t.element_size() for t in held.values())
    code, _, _ = call("convert", run / "checkpoints" / "step-00000005", tmp_path / "earlier")
    assert code == 0
    same_bits(weights_of(tmp_path / "earlier"), only_weights(reassemble(run / "checkpoints" / "step-00000005")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier", "model"]


def elements_of_rank(spec, tp: int, dp: int, tp_rank: int, dp_rank: int) -> Tensor:
    """Numbers of the elements of a canonical tensor that a rank should hold, by the words of the design: units dealt
    round-robin (u % p == r), the vocabulary and Mamba in one run of units a rank, each part by itself; then dp runs."""
    numbers = torch.arange(math.prod(spec.shape)).reshape(spec.shape)
    if spec.unit is None:
        numbers = numbers if tp_rank == 0 else numbers[:0]
    else:
        rows, start = [], 0
        for length, unit in spec.parts:
            count = -(-length // unit)
            for u in range(count):
                dealt = u % tp if spec.unit in ("kv_group", "ffn_granule") else ((u + 1) * tp - 1) // count
                if dealt == tp_rank:
                    rows += range(start + u * unit, start + min(u * unit + unit, length))
            start += length
        numbers = numbers.index_select(spec.unit_axis, torch.tensor(rows, dtype=torch.int64))
    flat = numbers.reshape(-1)
    length = math.ceil(flat.numel() / dp)
    return flat[dp_rank * length : (dp_rank + 1) * length]


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 2), (2, 1), (1, 3)])
def test_canonical_becomes_training_and_back(call, two_ranks, tmp_path, tp, dp):
    model, start = two_ranks / "model", tmp_path / "start"
    code, out, err = call("convert", model, start, *(("--tp", tp, "--dp", dp) if tp * dp > 1 else ()))
    assert (code, err) == (0, "") and f"for tp {tp} x dp {dp}; train on with adamba train --resume {start}" in out
    ranks = {f"__{rank}_0.distcp" for rank in range(tp * dp)}
    assert {path.name for path in start.iterdir()} == ranks | {"metadata.json", "state.json", "files.json"}
    held = reassemble(start)
    same_bits(only_weights(held), weights_of(model))
    assert all(name.startswith("weight/") and tensor.dtype == torch.float32 for name, tensor in held.items())
    state = json.loads((start / "state.json").read_text())
    assert state["config"] == config_of(model) and len(state["config"]["tokenizer_hash"]) == 64
    zeros = dict.fromkeys(("step", "consumed_samples", "optimizer_steps", "skipped", "skipped_in_a_row"), 0)
    assert state["counters"] == zeros
    chunks = json.loads((start / "metadata.json").read_text())["tensors"]
    # one to two thousand bytes of torch.save's own beside the values, not the tensor that a chunk was cut from
    for chunk in (chunk for held_here in chunks.values() for chunk in held_here["chunks"]):
        assert chunk["length"] < 4 * math.prod(chunk["size"]) + 2000
    specs = specs_of(model)
    for spec, (dp_rank, tp_rank) in itertools.product(specs, itertools.product(range(dp), range(tp))):
        numbers = torch.arange(math.prod(spec.shape)).reshape(spec.shape)
        held_here = [
            numbers[tuple(slice(low, low + size) for low, size in zip(chunk["offset"], chunk["size"]))].reshape(-1)
            for chunk in chunks[f"weight/{spec.name}"]["chunks"]
            if chunk["file"] == f"__{dp_rank * tp + tp_rank}_0.distcp"
        ]
        got = torch.cat([*held_here, torch.empty(0, dtype=torch.int64)]).sort().values
        assert torch.equal(got, elements_of_rank(spec, tp, dp, tp_rank, dp_rank).sort().values), spec.name
    assert call("verify", start)[0] == 0
    assert call("convert", start, tmp_path / "back")[0] == 0
    same_bits(weights_of(tmp_path / "back"), weights_of(model))
    assert config_of(tmp_path / "back") == config_of(model)


def test_low_precision_becomes_fp32(call, one_rank, tmp_path):
    assert call("convert", one_rank / "model", tmp_path / "start")[0] == 0
    held = only_weights(reassemble(tmp_path / "start"))
    same_bits(held, {name: tensor.float() for name, tensor in weights_of(one_rank / "model").items()})


def test_a_run_trains_on_from_a_converted_checkpoint(call, two_ranks, corpus, tmp_path):
    start, run = tmp_path / "start", tmp_path / "run"
    assert call("convert", two_ranks / "model", start, "--tp", 2, "--dp", 2)[0] == 0
    options = SIZES | {"elastic__width_sampling": "full", "elastic__plans_per_step": 1}
    done = train(1, [*arguments(corpus, run, **options), *FP32, "--resume", str(start)])
    said = "".join(done.stdout.split())  # the console folds lines
    assert f"resumedfrom{start}atstep0" in said and "optimizerstatereset:48tensors" in said
    assert "dropped" not in said
    model = AdambaModel(model_of(two_ranks / "model"))
    load_into(model, two_ranks / "model")
    dataset = build_dataset(
        [str(corpus / "train")], 32, config_of(two_ranks / "model")["train"]["seed"], ByteTokenizer()
    )
    with torch.no_grad():
        batches = [load_micro_batch(dataset, first, 2) for first in range(0, 8, 2)]
        expected = [
            model(batch["tokens"], batch["labels"], batch["seq_idx"] if batch["packed"] else None).item()
            for batch in batches
        ]
    found = losses(run)
    assert found[1] == pytest.approx(sum(expected) / 4, abs=1e-5)
    assert sorted(found) == list(range(1, 11)) and len(set(found.values())) == 10
    assert abs(found[1] - losses(two_ranks)[1]) > 0.01  # not what a fresh start begins with


def test_a_target_is_not_written_over(call, one_rank, two_ranks, tmp_path):
    model, other = tmp_path / "model", tmp_path / "folder"
    assert call("convert", one_rank / "checkpoints", model)[0] == 0
    before = weights_of(model)
    refused(call("convert", two_ranks / "checkpoints", model), 2, model, "--force")
    same_bits(weights_of(model), before)
    assert call("convert", two_ranks / "checkpoints", model, "--force")[0] == 0
    same_bits(weights_of(model), weights_of(two_ranks / "model"))
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    refused(call("convert", two_ranks / "checkpoints", other), 2, other, "--force")
    refused(call("convert", two_ranks / "checkpoints", other, "--force"), 2, other, "is no checkpoint")
    assert (other / "thesis.tex").exists()
    refused(call("convert", two_ranks / "model", two_ranks / "model", "--force"), 2, "holds the checkpoint to convert")
    # the folder of all checkpoints of a run is not one of them
    refused(call("convert", two_ranks / "model", one_rank / "checkpoints", "--force"), 2, "is no checkpoint")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "model"]


def test_what_cannot_be_converted(call, two_ranks, tmp_path):
    target = tmp_path / "target"
    refused(call("convert", tmp_path / "nothing", target), 5, tmp_path / "nothing", "no such folder")
    refused(call("convert", tmp_path, target), 5, tmp_path, "holds no checkpoint", "RUN/checkpoints")
    refused(call("convert", two_ranks / "model", target, "--tp", 3), 2, "--tp 3", "num_kv_groups (4)", "[1, 2]")
    refused(call("convert", two_ranks / "model", target, "--dp", 0), 2, "--dp 0", "--dp 1")
    refused(call("convert", two_ranks / "model", target, "--dp", 10**9), 2, "--dp 1000000000", "between 1 and 4096")
    refused(call("convert", two_ranks / "model", target, "--tp", 10**9), 2, "--tp 1000000000", "between 1 and 1024")
    refused(call("convert", two_ranks / "checkpoints", target, "--tp", 2), 2, "--tp", "whole tensors")
    for key, message in (("tokenizer_hash", "`tokenizer_hash`"), ("model", "`model`")):
        model = tmp_path / "model"
        shutil.copytree(two_ranks / "model", model)
        edit_json(model / "config.json", lambda values, key=key: values.pop(key))
        refused(call("convert", model, target), 5, model / "config.json", message)
        shutil.rmtree(model)
    save_as(two_ranks / "model", tmp_path / "double", lambda name, t: t.double() if name == "final_norm.weight" else t)
    refused(call("convert", tmp_path / "double", target), 5, "final_norm.weight", "float64")
    assert not list(tmp_path.glob("target*"))


def test_the_tokenizer_file_goes_along_where_it_is_the_runs(call, one_rank, tmp_path):
    """A path in a checkpoint that came from elsewhere is not reason enough to copy a file."""
    run, model, secret, own = (tmp_path / name for name in ("step", "model", "secret.json", "own.model"))
    secret.write_text('{"password": 1}')
    train_sentencepiece(["the quick model reads nested layers\n" * 40], 300, own)
    shutil.copytree(one_rank / "checkpoints" / "step-00000010", run)

    def convert(tokenizer: Path, tokenizer_hash: str) -> str:
        def change(values: dict) -> None:
            values["config"]["data"]["tokenizer"] = str(tokenizer)
            values["config"]["tokenizer_hash"] = tokenizer_hash

        edit_json(run / "state.json", change)
        seal(run)
        code, out, _ = call("convert", run, model, "--force")
        assert code == 0
        return out

    known = load_tokenizer(str(own)).hash
    assert "its tokenizer" not in convert(own, known)
    assert (model / "tokenizer.model").read_bytes() == own.read_bytes()
    for path, digest, why in (
        (secret, known, "cannot be read"),
        (tmp_path / "gone.model", known, "is not a file here"),
        (own, "0" * 64, "is not the run's"),
    ):
        assert f"its tokenizer {path} {why}" in convert(path, digest)
        assert {file.suffix for file in model.iterdir()} == {".json", ".safetensors"}
        assert not (model / secret.name).exists()


def test_inspect_lists_what_the_manifest_lists(call, two_ranks, tmp_path):
    code, out, err = call("inspect", two_ranks / "checkpoints", "--json", tmp_path / "new" / "held.json")
    assert (code, err) == (0, "")
    specs = specs_of(two_ranks / "model")
    elements = sum(spec.numel for spec in specs)
    report = json.loads((tmp_path / "new" / "held.json").read_text())
    step = two_ranks / "checkpoints" / "step-00000010"
    assert (report["path"], report["kind"]) == (str(step), "training")
    assert report["counters"]["step"] == 10 and report["layout"] == {"ranks": 2, "tp": 1, "dp": 2}
    assert report["totals"]["weight"] == {"tensors": len(specs), "elements": elements, "bytes": 4 * elements}
    rows = {row["name"]: row for row in report["tensors"]}
    assert set(rows) == set(reassemble(step))
    assert [rows[f"weight/{spec.name}"]["shape"] for spec in specs] == [list(spec.shape) for spec in specs]
    assert all(row["dtype"] == "float32" and row["chunks"] >= 1 for row in rows.values())
    assert sum(row["bytes"] for row in rows.values()) == sum(t.numel() * 4 for t in reassemble(step).values())
    lines = out.splitlines()
    assert lines[0].startswith(f"{step}: training at step 10, written by 2 ranks (tp 1 x dp 2), {len(rows)} tensors, ")
    assert any(f"weight  ({len(specs)} tensors, {elements:,} elements, " in line for line in lines)
    assert sum("q_weight  [32, 32]  float32  4.1 kB" in line for line in lines) == 3
    shown = [line for line in lines if "  [" in line]
    assert len(shown) == len(rows)


def test_inspect_reads_headers_alone(call, one_rank, two_ranks, tmp_path):
    code, out, _ = call("inspect", one_rank / "model", "--json", tmp_path / "held.json")
    report = json.loads((tmp_path / "held.json").read_text())
    assert code == 0 and "layout" not in report and report["kind"] == "canonical"
    assert {row["name"]: row["dtype"] for row in report["tensors"]} == {
        f"weight/{name}": str(tensor.dtype).removeprefix("torch.")
        for name, tensor in weights_of(one_rank / "model").items()
    }
    assert out.splitlines()[1].endswith("embedding  (1 tensor, 8,224 elements, 32.9 kB)")
    assert call("convert", two_ranks / "model", tmp_path / "start", "--tp", 2, "--dp", 3)[0] == 0
    _, out, _ = call("inspect", tmp_path / "start")
    assert "training at step 0, written by 6 ranks (tp 2 x dp 3), 24 tensors" in out.splitlines()[0]


@pytest.mark.parametrize("command", [(), ("convert",), ("inspect",), ("verify",), ("diff",)])
def test_help(tmp_path, command):
    """From any folder, without an installed package, and before any library of models is loaded."""
    program = [sys.executable, "-X", "importtime", str(TOOL), *command]
    shown = subprocess.run([*program, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and "usage: adamba checkpoint" in shown.stdout and " torch\n" not in shown.stderr
    wrong = subprocess.run([sys.executable, str(TOOL), *command], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and ("required" if command else "COMMAND --help") in wrong.stderr
