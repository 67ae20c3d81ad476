"""An extracted model is what the nested one runs at that plan: the same logits, fewer bytes, a model of its own."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
from forked import run_forked
from inference.decoding import generated
from oracles.dense import DenseModel, used_part
from surgery.nested_models import (
    KINDS,
    MAMBA,
    content_of,
    load,
    lose_a_shard,
    made,
    refused,
    saved,
    size_of,
    some_tokens,
    source_model,
)
from training.runs import ROOT, losses, train, write_corpus
from training.test_start import from_base

from megatron_adamba.blueprint.flops import forward_flops
from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.blueprint.nest import block_rows
from megatron_adamba.blueprint.resolve import attention_windows, resolve_model
from megatron_adamba.checkpoint.canonical import read_tensors
from megatron_adamba.config.root import read_model_config
from megatron_adamba.elastic.plan import ElasticPlan, full_plan, uniform_plan
from megatron_adamba.errors import CheckpointError, ConfigError
from megatron_adamba.inference.load import load_model
from megatron_adamba.surgery.extract import extract
from megatron_adamba.surgery.graft import graft
from megatron_adamba.surgery.sources import TensorFolder
from megatron_adamba.surgery.writing import write_job

WIDTHS = (8, 16, 32)
PER_LAYER = [
    ("T", [16, 8, 32], None),
    ("T", [8, 16], 2),
    ("T, grouped, biases, sinks, tied", [32, 8, 16], None),
    ("T, another norm size, uneven rows", [16, 8, 8], None),
    ("T, another norm size, uneven rows", None, 1),
    ("E", [16, 16, 8], None),
    ("mixed", [16, 8, 32, 16, 8], None),
    ("mixed", [16, 32, 8, 8], 4),
    ("mixed", [16, 8], 2),
    ("mixed", None, 3),
    ("M with an MLP", [8, 16], 2),
    ("Mamba-1", [16, 8, 32], 2),
]
"""kind, widths, exit layer"""


def same_logits(old, new, asked, tokens) -> None:
    """Both at the plan; the new one is also asked for nothing where that is all it has."""
    want = old(tokens, plan=asked)
    assert want.std() > 0.1
    cut = ElasticPlan(asked.widths[: asked.exit_layer], asked.exit_layer)
    assert (new(tokens, plan=cut) - want).abs().max() <= 1e-5
    if cut == full_plan(new.config):
        assert (new(tokens) - want).abs().max() <= 1e-5


def at_most(own: list[int], width: int, depth: int) -> ElasticPlan:
    """A plan of the source: in each block `width`, or the extracted model's own where that is less."""
    widths = [min(width, each) for each in own]
    return ElasticPlan((*widths, *[8] * (depth - len(own))), len(own))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_one_width(kind, width, tmp_path):
    source = saved(source_model(kind), tmp_path / "a")
    before = content_of(source)
    new, old = load(made(extract(source, width), tmp_path / "b")), load(source)
    assert new.config.widths == [each for each in WIDTHS if each <= width] and new.config.hidden_size == 32
    for each in new.config.widths:
        same_logits(old, new, uniform_plan(old.config, each), some_tokens())
    assert content_of(source) == before


@pytest.mark.parametrize(("kind", "widths", "exit_layer"), PER_LAYER)
def test_a_width_for_each_block_and_an_exit(kind, widths, exit_layer, tmp_path):
    source = saved(source_model(kind), tmp_path / "a")
    new = load(made(extract(source, None, widths, exit_layer), tmp_path / "b"))
    old = load(source)
    own = (widths or [32] * old.config.num_layers)[:exit_layer]
    assert new.config.num_layers == len(own) and new.config.widths[-1] == max(own)
    assert new.config.layer_widths == (own if set(own) != {32} else None)
    for each in new.config.widths:
        plan = at_most(own, each, old.config.num_layers)
        same_logits(old, new, plan, some_tokens())
        # asked for more than a block has, it gives what it has
        asked = uniform_plan(new.config, each)
        given = ElasticPlan(plan.widths[: len(own)], len(own))
        assert torch.equal(new(some_tokens(), plan=asked), new(some_tokens(), plan=given))
        want = forward_flops(old.config, plan.widths, 100, plan.exit_layer)
        assert forward_flops(new.config, asked.widths, 100) == want


WITHOUT_EXPERTS = [kind for kind in KINDS if kind not in ("E", "mixed")]


@pytest.mark.parametrize("kind", WITHOUT_EXPERTS)
def test_against_dense_layers(kind, tmp_path):
    """Weights cut and layers computed by an implementation that knows nothing of slicing."""
    model = source_model(kind, attention_sinks=False)
    new = load(made(extract(saved(model, tmp_path / "a"), None, [16, 8, 8]), tmp_path / "b"))
    windows, plan = attention_windows(model.config), full_plan(new.config)
    want = DenseModel(model, plan.widths, windows).logits(some_tokens())
    assert (new(some_tokens()) - want).abs().max() <= 1e-5
    # what the extracted model holds is what the dense one is made of
    rows = {row.width: row for row in model.config.nest}
    held = dict(new.named_parameters())
    for name, tensor in model.named_parameters():
        part = tensor
        if name.startswith("blocks.") and ".mixer" not in name:
            row = rows[plan.widths[int(name.split(".")[1])]]
            gains = slice(WIDTHS.index(row.width) + 1)
            part = tensor[gains if name.endswith("gain") else used_part(model.config, row, name)]
        assert torch.equal(held.pop(name), part), name
    assert not held


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_part_keeps_its_dtype(dtype, tmp_path):
    source = saved(source_model("mixed"), tmp_path / "a", dtype)
    got = dict(read_tensors(made(extract(source, width=16), tmp_path / "b")))
    whole = dict(read_tensors(source))
    for name, tensor in got.items():
        assert torch.equal(tensor, whole[name][tuple(slice(n) for n in tensor.shape)]) and tensor.dtype == dtype


def test_a_file_that_loses_its_end_while_it_is_read_is_named(tmp_path):
    """The library looks at the size when it opens a file; afterwards it may still shrink."""
    source = saved(source_model("T"), tmp_path / "a")
    folder = TensorFolder(source)
    name, entry = next((name, entry) for name, entry in folder.entries.items() if len(entry.info.shape) == 2)
    whole = folder.leading(name, entry.info.shape)
    os.truncate(entry.path, entry.start + whole.numel() * whole.element_size() - 1)
    refused(lambda: folder.leading(name, entry.info.shape), str(entry.path), "ends in the middle of a tensor")


@pytest.mark.parametrize(("kind", "widths", "exit_layer"), PER_LAYER)
def test_every_tensor_is_the_beginning_of_its_source_or_of_a_block_left_out(kind, widths, exit_layer, tmp_path):
    source = saved(source_model(kind), tmp_path / "a", torch.bfloat16)
    job = extract(source, None, widths, exit_layer)
    folder = made(job, tmp_path / "b")
    config, left = read_model_config(folder), dict(read_tensors(source))
    assert config == resolve_model(config)
    got = dict(read_tensors(folder))
    assert {name: tuple(tensor.shape) for name, tensor in got.items()} == {s.name: s.shape for s in manifest(config)}
    for name, tensor in got.items():
        whole = left.pop(name)
        assert torch.equal(tensor, whole[tuple(slice(n) for n in tensor.shape)]) and tensor.dtype == torch.bfloat16
        static = not name.startswith("blocks.") or ".mixer" in name
        assert not static or tensor.shape == whole.shape, name
    depth = config.num_layers
    assert all(int(name.split(".")[1]) >= depth for name in left)
    blocks = f"blocks {depth}" if depth + 1 < len(KINDS[kind]["block_pattern"]) else f"block {depth} is left out"
    assert (blocks in job.promise) == bool(left)
    assert size_of(folder) < size_of(source)


def test_shapes_of_a_known_case(tmp_path):
    """Sizes written down by hand: 12 heads in 4 groups of width 16 of 32, FFN rows of the nest."""
    kind = "T, grouped, biases, sinks, tied"
    model = source_model(kind, ffn_size=96)
    folder = made(extract(saved(model, tmp_path / "a"), None, [16, 8, 8]), tmp_path / "b")
    shapes = {name: tuple(tensor.shape) for name, tensor in read_tensors(folder)}
    assert {name.removeprefix("blocks.0."): shape for name, shape in shapes.items() if "blocks.0" in name} == {
        "attention_norm.weight": (16,), "attention_norm.gain": (2,),
        "attention.qkv.q_weight": (48, 16), "attention.qkv.k_weight": (16, 16), "attention.qkv.v_weight": (16, 16),
        "attention.qkv.q_bias": (48,), "attention.qkv.k_bias": (16,), "attention.qkv.v_bias": (16,),
        "attention.sinks": (6,), "attention.out.o_weight": (16, 48), "attention.out.o_bias": (16,),
        "mlp_norm.weight": (16,), "mlp_norm.gain": (2,),
        "mlp.up.gate_weight": (48, 16), "mlp.up.up_weight": (48, 16),
        "mlp.up.gate_bias": (48,), "mlp.up.up_bias": (48,),
        "mlp.down.down_weight": (16, 48), "mlp.down.down_bias": (16,),
    }  # fmt: skip
    assert shapes["blocks.1.attention.qkv.q_weight"] == (24, 8) and shapes["blocks.1.mlp_norm.gain"] == (1,)
    assert shapes["embedding.weight"] == (257, 32) and shapes["final_norm.weight"] == (32,)
    config = read_model_config(folder)
    assert (config.num_heads, config.num_kv_groups, config.ffn_size, config.head_dim) == (6, 2, 48, 8)


def test_an_extract_of_an_extract_is_that_of_the_source(tmp_path):
    source = saved(source_model("mixed"), tmp_path / "a")
    first = made(extract(source, None, [32, 16, 16, 8, 16]), tmp_path / "b")
    for name, options in {"c": {"width": 16, "exit_layer": 4}, "d": {"widths": [8, 16, 8, 8], "exit_layer": 4}}.items():
        twice = made(extract(first, **options), tmp_path / name)
        own = [16, 16, 16, 8] if name == "c" else [8, 16, 8, 8]
        once = made(extract(source, None, own, 4), tmp_path / f"{name} at once")
        assert read_model_config(twice) == read_model_config(once)
        want = dict(read_tensors(once))
        got = dict(read_tensors(twice))
        assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    history = json.loads((twice / "surgery.json").read_text())
    assert [entry["operation"] for entry in history] == ["extract", "extract"]
    assert history[1] == {
        "operation": "extract",
        "arguments": {"widths": [8, 16, 8, 8], "exit_layer": 4},
        "source": {"path": str(first), "layout": "canonical"},
    }


def test_a_part_that_is_all_is_an_ordinary_model(tmp_path):
    """Without narrow blocks and without the E blocks above the exit nothing is left that says it was extracted."""
    source = saved(source_model("mixed"), tmp_path / "a")
    config = read_model_config(made(extract(source, exit_layer=2), tmp_path / "b"))
    assert (config.block_pattern, config.layer_widths, config.widths) == ("TM", None, [8, 16, 32])
    assert config.num_experts == 0 and all(row.expert_ffn == 0 for row in config.nest)


@pytest.mark.parametrize("kind", ["T, another norm size, uneven rows", "mixed"])
def test_caches_and_generation(kind, tmp_path):
    """Token by token, through caches that are as narrow as each block."""
    model = source_model(kind)
    own = [16, 8, 32, 16, 8][: model.config.num_layers]
    new = load(made(extract(saved(model, tmp_path / "a"), None, own), tmp_path / "b"))
    prompt = some_tokens(length=9)
    plan = ElasticPlan(tuple(own), len(own))
    want = generated(model, prompt, plan, 8)
    assert torch.equal(generated(new, prompt, full_plan(new.config), 8), want)
    wide = uniform_plan(new.config, new.config.widths[-1])
    assert torch.equal(generated(new, prompt, wide, 8), want)


def run_tool(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    done = run_forked(ROOT / "tools" / name, words)
    assert done.returncode == 0, done.stderr
    return done


def test_the_tool_and_what_reads_its_model(tmp_path):
    source, folder = saved(source_model("mixed"), tmp_path / "a"), tmp_path / "b"
    words = ("extract", source, folder, "--widths", "16,8,16,8", "--exit-layer", 4, "--max-shard-size", "9KB")
    shown = run_tool("surgery.py", *words, "--dry-run").stdout
    assert "blocks.0.mlp_norm.gain  [2] fp32  <- blocks.0.mlp_norm.gain, the beginning of [3]\n" in shown
    assert "embedding.weight  [257, 32] fp32  <- embedding.weight\n" in shown and not folder.exists()
    said = run_tool("surgery.py", *words).stdout
    assert said.strip() == shown.splitlines()[-1].replace("would hold", "holds") and "block 4 is left out" in said
    assert len(list(folder.glob("*.safetensors"))) > 3
    for width in (8, 16):
        words = ("--model", folder, "--prompt", "ab", "--max-new-tokens", 6, "--dtype", "fp32", "--width", width)
        assert f"[width {width}, " in run_tool("generate.py", *words).stderr
    assert "[width 16, " in run_tool("generate.py", *words[:-2], "--mode", "think").stderr
    assert load_model(folder).tokenizer.name == "bytes"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """Every kind of block; KV groups and FFN units that two ranks can share."""
    folder = tmp_path_factory.mktemp("narrow")
    changes = {"num_kv_groups": 4, "mamba_num_groups": 2, "ffn_size": 128, "vocab_size": 257}
    source = saved(source_model("mixed", **changes), folder / "a")
    return made(extract(source, None, [16, 16, 32, 16, 16]), folder / "b")


def test_it_trains_on_and_keeps_its_sizes(narrow, data, tmp_path):
    runs = {}
    settings = {"train__steps": 4, "elastic__width_sampling": "per_layer", "logging__interval": 1}
    ds_config = ["--deepspeed_config", str(ROOT / "ds_configs" / "zero1_fp32.json")]
    for ranks in (1, 2):
        run = tmp_path / str(ranks)
        layout = {"parallel__tp": 2} if ranks == 2 else {}
        train(ranks, [*from_base(narrow, data, run, **settings, **layout), *ds_config])
        runs[ranks] = losses(run)
        after, before = dict(read_tensors(run / "model")), dict(read_tensors(narrow))
        assert {name: tensor.shape for name, tensor in after.items()} == {
            name: tensor.shape for name, tensor in before.items()
        }
        assert read_model_config(run / "model") == read_model_config(narrow)
        assert not torch.equal(after["blocks.0.mlp.up.up_weight"], before["blocks.0.mlp.up.up_weight"].float())
    assert len(runs[1]) == 4 and all(abs(runs[1][step] - runs[2][step]) <= 1e-5 for step in runs[1]), runs
    records = [json.loads(line) for line in (tmp_path / "1" / "metrics.jsonl").read_text().splitlines()]
    assert {record["eval_width"] for record in records if "eval_width" in record} == {8, 16, 32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "extract: nothing says what; give --width, --widths or --exit-layer"),
        ({"width": 12}, "--width 12: not in the nest of {source} ([8, 16, 32]); try 8"),
        ({"width": 64}, "--width 64: not in the nest of {source} ([8, 16, 32]); try 32"),
        ({"widths": [8, 24, 8]}, "--widths 8,24,8: 24: not in the nest of {source} ([8, 16, 32]); try 16"),
        ({"widths": [8, 8]}, "--widths 8,8: lists 2 widths, 3 blocks of {source} run; for example --widths 32,32,32"),
        ({"widths": []}, "--widths : lists 0 widths, 3 blocks of {source} run"),
        ({"widths": [8], "exit_layer": 2}, "lists 1 widths, 2 blocks of {source} run; for example --widths 32,32"),
        ({"widths": [8] * 4, "exit_layer": 2}, "lists 4 widths, 2 blocks"),
        ({"width": 8, "widths": [8] * 3}, "--width 8 and --widths 8,8,8: give one of the two"),
        ({"exit_layer": 0}, "--exit-layer 0: {source} has 3 blocks; give 1 to 3"),
        ({"exit_layer": 4}, "--exit-layer 4: {source} has 3 blocks"),
    ],
    ids=str,
)
def test_what_cannot_be_extracted(options, message, tmp_path):
    source = saved(source_model("T"), tmp_path / "a")
    refused(lambda: extract(source, **options), message.format(source=source), kind=ConfigError)


def test_a_source_that_is_not_whole(tmp_path):
    source = saved(source_model("T"), tmp_path / "a")
    lost = lose_a_shard(source)
    refused(lambda: extract(source, 8), f"{lost}: missing", kind=CheckpointError)
    refused(lambda: extract(tmp_path / "nowhere", 8), "nowhere: no such folder", kind=CheckpointError)


def test_nothing_is_left_of_a_failure(surgery_tool, tmp_path):
    """At the command line, and where a file goes away while it is read."""
    source, folder = saved(source_model("T"), tmp_path / "a"), tmp_path / "b"
    job, before = extract(source, 16), content_of(source)
    for words in (("--width", 12), ("--widths", "8,8"), ("--widths", "8,big"), ("--exit-layer", 9), ()):
        out, err = surgery_tool("extract", source, folder, *words, code=2)
        assert err.count("\n") == 1 and err.startswith("error: ") and not out
    assert content_of(source) == before
    lost = lose_a_shard(source)
    _, err = surgery_tool("extract", source, folder, "--width", 8, code=5)
    assert f"{lost}: missing" in err and err.count("\n") == 1
    refused(lambda: write_job(job, folder, 20_000, lambda *_: None), lost.name, kind=CheckpointError)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_graft_of_an_extract(tmp_path):
    """Old blocks keep their widths when others come between them."""
    part = made(extract(saved(source_model("T"), tmp_path / "a"), None, [16, 8, 16]), tmp_path / "b")
    new, old = load(made(graft(part, "TMTMT", MAMBA, 3), tmp_path / "c")), load(part)
    assert new.config.layer_widths == [16, 16, 8, 16, 16]
    for width in (8, 16):
        want = old(some_tokens(), plan=uniform_plan(old.config, width))
        assert torch.equal(new(some_tokens(), plan=uniform_plan(new.config, width)), want)


def test_rows_of_blocks(tmp_path):
    source = saved(source_model("T"), tmp_path / "a")
    config = read_model_config(made(extract(source, None, [16, 8, 16]), tmp_path / "b"))
    assert [{width: row.width for width, row in rows.items()} for rows in block_rows(config)] == [
        {8: 8, 16: 16},
        {8: 8, 16: 8},
        {8: 8, 16: 16},
    ]
    assert full_plan(config) == ElasticPlan((16, 8, 16), 3)
