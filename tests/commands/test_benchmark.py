"""The benchmarks run and write what they promise; how fast anything is, is not asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
KEPT = ", freed pages kept"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subcommand", "names"),
    [
        ("nested", ["bf16 width 8 vs dense", "fp32 width 64 vs masked", "bf16 width 8, optimizer step (peer dense)"]),
        ("train", ["bf16 training throughput vs NanoChatForCausalLM", "bf16 optimizer step"]),
        ("blocks", ["M over T, two models, not compared: 32 tokens"]),
        ("mixer", [f"bf16 d_state 16, peer's chunk 256{kept}, forward + backward" for kept in ("", KEPT)]),
        ("moe", ["bf16 quick vs deepspeed", "bf16 quick vs transformers eager"]),
        ("tp", ["bf16 width 8, dealt in turn vs in halves", "fp32 width 64, dealt in turn vs in halves"]),
        ("decode", ["batch 1, think, 0% of the compute saved", "M over T, two models, not compared: 32 tokens, cache"]),
        ("surgery", ["surgery expand write rate", "surgery import gpt-oss MXFP4 peak anonymous memory"]),
    ],
)
def test_every_subcommand_writes_its_rows(subcommand, names, tmp_path):
    target = tmp_path / "rows.json"
    command = [sys.executable, ROOT / "tools" / "benchmark.py", subcommand, "--quick", "--threads", "1"]
    done = subprocess.run([*command, "--json", target], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text())
    for row in rows:
        assert list(row) == ["name", "ours", "peer", "unit", "ratio"]
        assert row["ours"] > 0 and row["unit"]
        assert row["peer"] is None or row["peer"] > 0
        assert row["ratio"] is None or (row["ratio"] > 0 and row["peer"] is not None)
    assert set(names) <= {row["name"] for row in rows}
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        if "optimizer step" in row["name"] or "hand-over" in row["name"]:
            assert row["ratio"] is None
    assert rows[0]["name"].split(":")[0] in done.stdout


def test_a_comparison_stops_where_the_sides_differ():
    from megatron_adamba.commands.benchmarks.common import ComparisonError, require_close

    require_close("same", torch.ones(3), torch.ones(3), 1e-6)
    for other in (torch.tensor([1.0, 1.0, 1.1]), torch.tensor([1.0, 1.0, float("nan")]), torch.ones(4)):
        with pytest.raises(ComparisonError, match=r"output.*nothing was timed"):
            require_close("output", other, torch.ones(3), 1e-2)


def test_the_ratio_is_the_median_over_pairs():
    from megatron_adamba.commands.benchmarks.common import time_row

    row = time_row("x", [1.0, 10.0, 2.0], [2.0, 20.0, 8.0])
    assert (row.ours, row.peer, row.ratio) == (2000.0, 8000.0, 2.0)
    assert time_row("x", [1.0], [2.0], compared=False).ratio is None
