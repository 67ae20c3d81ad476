"""The mean of checkpoints, value by value, and what is not of the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from surgery.nested_models import (
    content_of,
    copied,
    load,
    lose_a_shard,
    made,
    refused,
    saved,
    some_tokens,
    source_model,
)

from megatron_adamba.checkpoint.canonical import read_tensors
from megatron_adamba.config.root import read_model_config
from megatron_adamba.errors import CheckpointError, ConfigError, TokenizerError
from megatron_adamba.surgery import merge_average as module
from megatron_adamba.surgery.extract import extract
from megatron_adamba.surgery.merge_average import merge_average
from megatron_adamba.surgery.writing import write_job


def three(tmp_path: Path, kind: str = "mixed", dtypes=(torch.float32,) * 3) -> list[Path]:
    return [
        saved(source_model(kind, seed), tmp_path / name, dtype) for name, seed, dtype in zip("abc", (1, 2, 3), dtypes)
    ]


@pytest.mark.parametrize("weights", [None, [0.5, 0.3, 0.2], [2.0, 0.0, 6.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values(weights, dtype, tmp_path, monkeypatch):
    """Against numpy's weighted mean in float64; in pieces, the last of them shorter."""
    import numpy

    monkeypatch.setattr(module, "_PIECE", 100)
    sources = three(tmp_path, dtypes=(dtype, torch.float32, torch.bfloat16))
    held = [dict(read_tensors(source)) for source in sources]
    folder = made(merge_average(sources, weights), tmp_path / "mean")
    got = dict(read_tensors(folder))
    assert got.keys() == held[0].keys()
    for name, tensor in got.items():
        values = [tensors[name].double().numpy() for tensors in held]
        want = torch.from_numpy(numpy.average(values, axis=0, weights=weights))
        assert tensor.dtype == dtype and tensor.shape == want.shape
        if dtype == torch.float32:
            assert (tensor.double() - want).abs().max() <= 1e-7 * want.abs().max(), name
        else:
            assert torch.equal(tensor, want.to(dtype)), name
    model = load(folder)
    assert model(some_tokens()).std() > 0.01 and model.config == load(sources[0]).config


def test_sums_are_not_kept_in_the_files_precision(tmp_path):
    """In bf16, or in fp32, 2^30 + 1 is 2^30 and the ones would be lost."""
    model = source_model("T")
    folders = []
    for name, value in (("a", 2.0**30), ("b", 1.0), ("c", 1.0), ("d", -(2.0**30))):
        for parameter in model.parameters():
            parameter.fill_(value)
        folders.append(saved(model, tmp_path / name))
    for tensor in dict(read_tensors(made(merge_average(folders), tmp_path / "mean"))).values():
        assert (tensor == 0.5).all()


def test_the_mean_of_one_model_is_that_model(tmp_path):
    source = saved(source_model("mixed"), tmp_path / "a")
    folder = made(merge_average([source] * 3), tmp_path / "mean")
    want = dict(read_tensors(source))
    assert all(torch.equal(tensor, want[name]) for name, tensor in read_tensors(folder))


def test_extracted_models_too(tmp_path):
    parts = [made(extract(source, 16), tmp_path / f"{source.name}-16") for source in three(tmp_path)]
    folder = made(merge_average(parts), tmp_path / "mean")
    assert read_model_config(folder) == read_model_config(parts[0])
    assert load(folder)(some_tokens()).isfinite().all()


def test_the_tool(surgery_tool, tmp_path):
    sources, folder = three(tmp_path), tmp_path / "mean"
    (sources[0] / "surgery.json").write_text('[{"operation": "earlier"}]')
    (sources[0] / "tokenizer.model").write_bytes(b"some tokenizer")
    before = [content_of(source) for source in sources]
    words = ("merge-average", *sources, folder, "--weights", "0.5,0.3,0.2", "--max-shard-size", "20KB")
    shown = surgery_tool(*words, "--dry-run")[0]
    assert "final_norm.gain  [1] fp32  <- mean of 3\n" in shown and not folder.exists()
    said = surgery_tool(*words)[0]
    assert said.strip() == shown.splitlines()[-1].replace("would hold", "holds")
    assert "the weights are the mean of 3 checkpoints" in said and len(list(folder.glob("*.safetensors"))) > 2
    assert json.loads((folder / "surgery.json").read_text()) == [
        {"operation": "earlier"},
        {
            "operation": "merge-average",
            "arguments": {"sources": list(map(str, sources)), "weights": [0.5, 0.3, 0.2]},
            "source": {"path": str(sources[0]), "layout": "canonical"},
        },
    ]
    assert (folder / "tokenizer.model").read_bytes() == b"some tokenizer"
    configs = [json.loads((place / "config.json").read_text()) for place in (sources[0], folder)]
    assert configs[0] == configs[1] and [content_of(source) for source in sources] == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 4, "num_heads": 8}, "model.num_heads is 8, {a} has 4"),
        ({"widths": [16, 32]}, "model.widths is [16, 32], {a} has [8, 16, 32]"),
        ({"norm_eps": 1e-6}, "model.norm_eps is 1e-06, {a} has 1e-05"),
        ({"block_pattern": "TT"}, "model.num_layers is 2, {a} has 3"),
    ],
    ids=str,
)
def test_another_model_is_refused(changes, message, tmp_path):
    a, b = saved(source_model("T"), tmp_path / "a"), saved(source_model("T", **changes), tmp_path / "b")
    refused(lambda: merge_average([a, a, b]), f"{b}: {message.format(a=a)}; merge", kind=CheckpointError)


def test_another_tokenizer_is_refused(tmp_path):
    a = saved(source_model("T"), tmp_path / "a")
    b = copied(a, tmp_path / "b")
    values = json.loads((b / "config.json").read_text())
    (b / "config.json").write_text(json.dumps(values | {"tokenizer_hash": "0" * 64}))
    refused(lambda: merge_average([a, b]), f"{b}: was trained with another tokenizer than {a}", kind=TokenizerError)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.5], "--weights 0.5,0.5: 2 for 3 sources; for example --weights 1,1,1"),
        ([0.5, 0.7, -0.2], "--weights 0.5,0.7,-0.2: must be 0 or more each"),
        ([0.0, 0.0, 0.0], "--weights 0,0,0: must be 0 or more each, and above 0 together"),
        ([1.0, 1.0, float("nan")], "--weights 1,1,nan: must be"),
        ([1.0, 1.0, float("inf")], "--weights 1,1,inf: must be"),
        ([], "--weights : 0 for 3 sources"),
    ],
    ids=str,
)
def test_weights_that_make_no_mean(weights, message, tmp_path):
    refused(lambda: merge_average(three(tmp_path, "T"), weights), message, kind=ConfigError)


def test_nothing_is_left_of_a_failure(surgery_tool, tmp_path):
    a, b, _ = three(tmp_path, "T")
    folder, left = tmp_path / "mean", sorted(path.name for path in tmp_path.iterdir())
    job, before = merge_average([a, b]), content_of(a)
    for words, code, message in (
        ((a, folder), 2, "merge-average: 1 source(s); give two or more"),
        ((a, b, folder, "--weights", "1,much"), 2, "--weights 1,much: must be numbers; for example --weights 1,1"),
        ((a, b, a), 2, f"{a}: exists already"),
        ((a, tmp_path / "nowhere", folder), 5, "nowhere: no such folder"),
    ):
        out, err = surgery_tool("merge-average", *words, code=code)
        assert err.count("\n") == 1 and message in err and not out
    lost = lose_a_shard(b)
    out, err = surgery_tool("merge-average", a, b, folder, code=5)
    assert err.count("\n") == 1 and f"{lost}: missing" in err and not out
    refused(lambda: write_job(job, folder, 20_000, lambda *_: None), lost.name, kind=CheckpointError)
    assert sorted(path.name for path in tmp_path.iterdir()) == left and content_of(a) == before
