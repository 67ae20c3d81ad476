"""Tables fit 80 columns, with values as they come: nothing is cut, and no number is torn apart."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands.test_small_tools import tiny_model
from rich.console import Console

from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.blueprint.stages import plan_stages
from megatron_adamba.commands.benchmarks.common import Row
from megatron_adamba.commands.benchmarks.common import print_rows as print_rows_of
from megatron_adamba.commands.compare_evaluations import named, print_losses
from megatron_adamba.commands.data import print_report
from megatron_adamba.commands.policies import print_policies
from megatron_adamba.commands.prompts import print_tokens
from megatron_adamba.config.cli import parse_arguments
from megatron_adamba.config.sections import ParallelConfig
from megatron_adamba.evaluation.widths import EvaluationRow
from megatron_adamba.inference.adaptive_evaluation import PolicyRow
from megatron_adamba.inference.generate import NewToken
from megatron_adamba.inference.modes import Mode
from megatron_adamba.training.report import print_rows, print_stages, print_summary


def rendered(show, *given) -> str:
    """What a table prints on a console of 80 columns, once it is known to fit."""
    console = Console(width=80, file=io.StringIO())
    show(console, *given)
    text = console.file.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    return text


@pytest.mark.parametrize("preset", ["tiny-hybrid", "adamba-20b", "gpt-oss-120b"])
def test_the_summary_of_a_run(preset):
    config = parse_arguments(["--preset", preset]).config
    model = resolve_model(config.model, config.model.vocab_size or 1000)
    text = rendered(print_summary, model, config.train)
    assert "training" in text and "100.0%" in text


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_the_stages_of_a_pipeline(schedule):
    config = parse_arguments(["--preset", "gpt-oss-120b"]).config
    model = resolve_model(config.model, 201_088)
    stages = plan_stages(model, ParallelConfig(pp=8, pipeline_schedule=schedule), 4096)
    text = rendered(print_stages, model, stages, config.train, 64)
    assert "passes kept" in text and "35, head" in text.replace("and", "")


@pytest.mark.parametrize("exits", [False, True])
def test_an_evaluation(exits):
    row = EvaluationRow(2880, 12.34567, 1.23456, 123_456_789_012, 1_234_567_890, 12_345_678_901)
    rows = [row, replace(row, bits_per_byte=None, bytes=None), *([replace(row, exit_layer=123)] if exits else [])]
    text = rendered(print_rows, rows)
    assert "1,234,567,890 held-out tokens" in text and "12.3457" in text and "1.235e+11" in text


def test_the_policies():
    """All of quality and compute, in two tables."""
    row = PolicyRow("adaptive", "exit 0.9995, price 0.00025", 12.34567, 1.23456, 0.98765, 1.0, 1.2345e11, 0.5678, 0, 0)
    rows = [row, replace(row, kind="width", name="width 2880", bits_per_byte=None, mean_exit=35.25, mean_width=2345)]
    text = rendered(print_policies, rows, "123,456,789 scored tokens of 1,234,567 pieces")
    for word in ("12.3457", "1.2346", "98.8%", "100.0%", "1.234e+11", "56.8%", "35.25", "2345", "0.00025"):
        assert word in text


def test_the_compute_of_tokens():
    """Whatever the tokens are: brackets are no markup, and a long one is folded."""
    model = tiny_model()
    texts = ["[/b]", "[bold]x", "\u3000" * 16, "w" * 70]
    loaded = SimpleNamespace(model=model, tokenizer=SimpleNamespace(decode=lambda ids: texts[ids[0]]))
    policy = Mode("full").policy(loaded, [0])
    news = [NewToken(0, token, "", 1, token % 2 + 1, None) for token in range(4)]
    text = rendered(print_tokens, loaded, policy, news)
    assert "'[/b]'" in text and "'[bold]x'" in text and text.count("w") >= 70 and "compute saved" in text


def test_evaluations_side_by_side():
    """Many plans are many lines; many evaluations are several tables."""
    plans = ["width 1024", "mean below", *(f"{layer} blocks" for layer in range(90, 110))]
    names = [f"a-run-with-a-rather-long-name-{number}/eval-of-it" for number in range(12)]
    text = rendered(print_losses, {name: dict.fromkeys(plans, 12.345678) for name in names})
    assert text.count("12.3457") == 12 * len(plans) and text.count("nats per token") == 3
    gaps = rendered(print_losses, {"a": {"width 8": 1.0}, "[/b]": {"width 16": 2.0}})
    assert "1.0000" in gaps and "2.0000" in gaps and "[/b]" in gaps


def test_evaluations_of_one_name_are_told_apart():
    """As every run calls its own eval.json."""
    of = lambda *words: list(named([Path(word) for word in words]))
    assert of("runs/a/eval.json", "runs/b/eval.json") == ["a/eval", "b/eval"]
    assert of("runs/a/eval.json", "runs/b/own.json") == ["eval", "own"]
    assert of("a/x/eval.json", "b/x/eval.json", "eval.json") == ["a/x/eval", "b/x/eval", "eval"]
    assert of("eval.json", "eval.json") == ["eval"]


def test_two_runs_are_compared(adamba, tmp_path):
    for name, loss in (("a", 1.5), ("b", 2.5)):
        (tmp_path / name).mkdir()
        rows = [{"width": width, "nats_per_token": loss + width / 100} for width in (8, 16)]
        (tmp_path / name / "eval.json").write_text(json.dumps({"rows": rows}))
    files = [tmp_path / name / "eval.json" for name in "ab"]
    code, out, _ = adamba("compare-evaluations", *files, "--json", tmp_path / "all.json")
    assert code == 0 and "1.5800" in out and "2.6600" in out
    assert list(json.loads((tmp_path / "all.json").read_text())) == ["a/eval", "b/eval"]


def test_the_datasets_that_were_made():
    meta = {"num_documents": 123_456_789, "num_tokens": 123_456_789_012, "num_bytes": 512_345_678_901}
    sides = {f"/home/somebody/projects/corpora/[/b]/dataset/{side}": meta for side in ("train", "validation")}
    report = {"datasets": sides, "seconds": 1234.5, "megabytes_per_second": 12.3}
    text = rendered(print_report, report, "")
    assert "512,345,678,901" in text and "123,456,789 " in text and "4.150" in text


def test_a_benchmark():
    """The longest names of the benchmarks' first rows stay whole, as they are searched for in logs."""
    name = "bf16 training throughput vs NanoChatForCausalLM"
    rows = [Row(name, 123_456.78, 98_765.43, "tokens/s", 1.25), Row("surgery extract source", 9.8765, None, "MB", None)]
    rows.append(Row("batch 128, a mode of a long name, 26 to 31% of the compute saved", 1.0, 999.994, "tokens/s", 1.0))
    text = rendered(lambda console: print_rows_of("a benchmark beside its peers, of a long title " * 2, rows, console))
    assert name in text and "123,457" in text and "9.88" in text and "999.99" in text
