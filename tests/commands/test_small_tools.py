"""evaluate, generate and plot on a small random model, as a user runs them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from oracles.dense import randomize

from megatron_adamba.blueprint.flops import forward_flops
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.checkpoint.canonical import write_canonical
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.data.indexed_builder import IndexedDatasetBuilder
from megatron_adamba.data.indexed_dataset import DatasetMeta
from megatron_adamba.data.tokenizer import ByteTokenizer
from megatron_adamba.elastic.plan import uniform_plan
from megatron_adamba.model.adamba import AdambaModel

ROOT = Path(__file__).resolve().parent.parent.parent
TEXTS = ["def f(x):\n    return x + 1\n", "print('häuser')\n", "x = [i * i for i in range(10)]\n"]
WIDTHS = [8, 16, 32]
PNG = b"\x89PNG\r\n\x1a\n"


def tiny_model() -> AdambaModel:
    config = ModelConfig(
        hidden_size=32,
        block_pattern="TM",
        vocab_size=257,
        head_dim=8,
        ffn_granule=16,
        widths=WIDTHS,
        mamba_d_state=8,
        mamba_head_dim=8,
        mamba_chunk_size=16,
    )
    model = AdambaModel(resolve_model(config))
    randomize(model, seed=2)
    return model.requires_grad_(False)


def write_model(folder: Path, config: dict | None = None) -> Path:
    model = tiny_model()
    settings = {"model": asdict(model.config), "data": {"tokenizer": "bytes"}, "tokenizer_hash": ByteTokenizer().hash}
    write_canonical(folder, {**settings, **(config or {})}, model.named_parameters(), max_shard_bytes=40_000)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("data") / "validation"
    tokenizer = ByteTokenizer()
    with IndexedDatasetBuilder(prefix, "<u2") as builder:
        for text in TEXTS:
            builder.add_document([*tokenizer.encode(text), tokenizer.eod_id], len(text.encode()))
        builder.finalize(
            DatasetMeta(
                tokenizer_name="bytes",
                tokenizer_hash=tokenizer.hash,
                vocab_size=tokenizer.vocab_size,
                eod_id=tokenizer.eod_id,
                num_documents=builder.num_documents,
                num_tokens=builder.num_tokens,
                num_bytes=builder.num_bytes,
                source="three lines of code",
            )
        )
    return prefix


def losses_by_hand(width: int, exit_layer: int | None = None) -> float:
    """Sum over the documents, each by itself behind an end-of-document token."""
    model, tokenizer, total = tiny_model(), ByteTokenizer(), 0.0
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.eod_id, *tokenizer.encode(text), tokenizer.eod_id]])
        logits = model(ids[:, :-1], plan=uniform_plan(model.config, width, exit_layer))
        total += torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
    return total


def test_evaluate_scores_every_width(adamba, checkpoint, dataset, tmp_path):
    table, picture = tmp_path / "deep" / "table.json", tmp_path / "pareto.png"
    words = ("--model", checkpoint, "--data", dataset, "--seq-len", 128, "--dtype", "fp32")
    code, out, err = adamba("evaluate", *words, "--json", table, "--plot", picture)
    assert (code, err) == (0, "")
    report = json.loads(table.read_text())
    assert (report["model"], report["data"], report["dtype"]) == (str(checkpoint), str(dataset), "fp32")
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    config = tiny_model().config
    assert [row["width"] for row in report["rows"]] == WIDTHS
    for row in report["rows"]:
        total = losses_by_hand(row["width"])
        assert row["tokens"] == num_bytes + len(TEXTS) and row["bytes"] == num_bytes
        assert row["nats_per_token"] == pytest.approx(total / row["tokens"], abs=1e-5)
        assert row["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, abs=1e-5)
        assert row["flops_per_token"] == forward_flops(config, (row["width"],) * 2, 128)
        assert f"{row['nats_per_token']:.4f}" in out and f"{row['bits_per_byte']:.4f}" in out
    assert picture.read_bytes().startswith(PNG)


def test_evaluate_scores_every_exit(adamba, checkpoint, dataset, tmp_path):
    words = ("--model", checkpoint, "--data", dataset, "--seq-len", 128, "--dtype", "fp32", "--exits")
    code, out, err = adamba("evaluate", *words, "--json", tmp_path / "t.json")
    assert (code, err) == (0, "") and "blocks" in out
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [(row["width"], row["exit_layer"]) for row in rows] == [*((width, None) for width in WIDTHS), (32, 1)]
    assert rows[-1]["nats_per_token"] == pytest.approx(losses_by_hand(32, 1) / rows[-1]["tokens"], abs=1e-5)
    assert rows[-1]["flops_per_token"] == forward_flops(tiny_model().config, (32, 32), 128, 1)


def test_evaluate_scores_as_many_tokens_as_asked(adamba, checkpoint, dataset, tmp_path):
    words = ("--model", checkpoint, "--data", dataset, "--max-tokens", 30, "--batch-size", 2, "--seq-len", 9)
    code, _, err = adamba("evaluate", *words, "--json", tmp_path / "t.json")
    assert (code, err) == (0, "")
    row = json.loads((tmp_path / "t.json").read_text())["rows"][0]
    # a byte a token but for the end of the first document, and the whole second's bytes in proportion
    first = len(TEXTS[0].encode()) + 1
    assert row["tokens"] == 30 > first
    second = len(TEXTS[1].encode())
    assert row["bytes"] == first - 1 + round(second * (30 - first) / (second + 1))


GREEDY = ("--temperature", 0, "--dtype", "fp32", "--max-new-tokens", 6)


def greedy_by_hand(prompt: str, width: int, steps: int = 6) -> str:
    model, tokenizer = tiny_model(), ByteTokenizer()
    ids = [tokenizer.eod_id, *tokenizer.encode(prompt)]
    for _ in range(steps):
        logits = model(torch.tensor([ids]), plan=uniform_plan(model.config, width))[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.eod_id:
            break
    return tokenizer.decode(ids[1:])


@pytest.mark.parametrize(
    ("words", "width"),
    [((), 32), (("--mode", "think"), 32), (("--mode", "ghost"), 8), (("--mode", "normal"), 16), (("--width", 16), 16)],
)
def test_generate_goes_on_from_the_prompt(adamba, checkpoint, tmp_path, words, width):
    target = tmp_path / "text.txt"
    code, out, err = adamba(
        "generate", "--model", checkpoint, "--prompt", "def ", *GREEDY, *words, "--output", target
    )  # fmt: skip
    assert code == 0
    assert out == greedy_by_hand("def ", width) + "\n" and out.startswith("def ")
    assert err.startswith(f"[width {width}, ") and "tokens/s]" in err
    assert target.read_text() == out


def test_generate_repeats_itself_with_a_seed(adamba, checkpoint):
    words = ("--model", checkpoint, "--prompt", "x", "--max-new-tokens", 12, "--temperature", 1.2, "--seed")
    texts = [adamba("generate", *words, seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--width", 15), 2, "error: width 15: not in this model's nest [8, 16, 32]; try 16"),
        (("--mode", "loud"), 2, "error: mode loud: unknown; modes of this model are ghost, whisper, normal, think"),
        (("--prompt", ""), 2, 'error: --prompt: is empty; for example --prompt "def "'),
        (("--max-new-tokens", 0), 2, "error: --max-new-tokens 0: must be above 0"),
        (("--top-p", 2), 2, "error: --top-p 2.0: must lie between 0 and 1"),
        (("--dtype", "fp8"), 2, "error: dtype fp8: must be one of bf16, fp32"),
        (("--model", "/nowhere"), 5, "error: /nowhere: no such folder; a run leaves one at RUN/model"),
    ],
    ids=str,
)
def test_generate_says_what_is_wrong(adamba, checkpoint, words, code, message):
    got, out, err = adamba("generate", "--model", checkpoint, "--prompt", "x", *words)
    assert (got, out) == (code, "") and err.startswith(message) and err.count("\n") == 1


def damage_shard(folder: Path) -> str:
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return shard.name


def lose_shard(folder: Path) -> str:
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.unlink()
    return shard.name


def lose_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").unlink()
    return "model.safetensors.index.json"


def lose_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


def change_config(**changes) -> Callable[[Path], str]:
    def change(folder: Path) -> str:
        path = folder / "config.json"
        values = json.loads(path.read_text())
        for key, value in changes.items():
            values["model"][key] = value
        path.write_text(json.dumps(values))
        return ""

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage_shard, "damaged"),
        (lose_shard, "missing, though model.safetensors.index.json names it"),
        (lose_index, "give a folder that holds a canonical checkpoint"),
        (lose_config, "cannot be read as JSON"),
        (change_config(linear_bias=True), "has no tensor"),
        (change_config(norm_weight=False), "has no place in this model"),
        (change_config(mamba_d_conv=3), "blocks.1.mixer.conv1d.weight has shape"),
        (change_config(hiden_size=8), "unknown model setting hiden_size"),
        (change_config(nest=[{"width": 32}]), "the model section is damaged"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("name", ["evaluate", "generate"])
def test_a_damaged_checkpoint_is_named(adamba, tmp_path, dataset, name, spoil, message):
    folder = write_model(tmp_path / "model")
    place = spoil(folder)
    words = ("--data", dataset) if name == "evaluate" else ("--prompt", "x")
    code, out, err = adamba(name, "--model", folder, *words)
    assert (code, out) == (5, "") and err.startswith("error: ") and err.count("\n") == 1
    assert message in err and place in err and str(folder) in err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tokenizer_hash": "0123456789abcdef"}, "its tokenizer is not the one it was trained with (0123456789ab)"),
        ({"data": {}}, "holds no tokenizer, and its config.json names none"),
        ({"data": {"tokenizer": "gone.model"}}, "gone.model: no such file"),
    ],
    ids=["wrong hash", "none", "gone"],
)
def test_the_tokenizer_must_be_the_models(adamba, tmp_path, config, message):
    folder = write_model(tmp_path / "model", config)
    code, out, err = adamba("generate", "--model", folder, "--prompt", "x")
    assert (code, out) == (4, "") and message in err and err.count("\n") == 1


def test_evaluate_needs_its_dataset(adamba, checkpoint, tmp_path):
    code, _, err = adamba("evaluate", "--model", checkpoint, "--data", tmp_path / "nothing")
    assert code == 3 and err.startswith("error: ") and str(tmp_path / "nothing") in err


def metrics_file(folder: Path, lines: list[str]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(lines))
    return path


def test_curves_are_drawn(adamba, tmp_path):
    steps = [{"step": s, "loss": 3 / s, "grad_norm": None if s == 2 else 1.0, "lr_factor": 0.1 * s} for s in (1, 2, 3)]
    evaluations = [{"step": 3, "eval_width": width, "eval_nats_per_token": 2.0} for width in WIDTHS]
    lines = [json.dumps(record) + "\n" for record in steps + evaluations]
    path = metrics_file(tmp_path, [*lines, '{"step": 4, "lo'])  # the last line was cut short by a kill
    code, out, err = adamba("plot", "--metrics", path, "--output", tmp_path / "new" / "curves.png")
    assert (code, err) == (0, "") and out.startswith("6 records drawn into ")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(("lines", "message"), [(None, "no such file"), ([], "holds no records yet")])
def test_nothing_to_draw(adamba, tmp_path, lines, message):
    path = tmp_path / "metrics.jsonl" if lines is None else metrics_file(tmp_path, lines)
    code, out, err = adamba("plot", "--metrics", path, "--output", tmp_path / "curves.png")
    assert (code, out) == (3, "") and err.startswith(f"error: --metrics {path}: {message}")
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("name", ["evaluate", "generate", "plot_metrics"])
def test_the_tools_are_scripts(name, tmp_path):
    """From any folder, without an installed package; --help loads no model library."""
    program = [sys.executable, str(ROOT / "tools" / f"{name}.py")]
    shown = subprocess.run([*program, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and f"  adamba {name.split('_')[0]} " in shown.stdout
    refused = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "required" in refused.stderr
