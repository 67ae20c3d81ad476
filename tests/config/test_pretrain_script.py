"""The script itself, as a user starts it, where it does not train."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from forked import run_forked

from megatron_adamba.config.cli import preset_names

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120", **environment}
    return run_forked(ROOT / "pretrain_adamba.py", words, env)


def test_print_config_and_summary():
    result = run("--preset", "adamba-6b", "--print_config", "--summary", "--train.steps", "77")
    assert result.returncode == 0, result.stderr
    lines = [line.strip() for line in result.stdout.splitlines()]
    for line in (
        "hidden_size: 2048  # preset adamba-6b",
        "steps: 77  # command line",
        "weight_decay: 0.1  # preset adamba-6b",
        "beta2: 0.95  # default",
        "num_heads: 16  # derived from default",
        "ffn_size: 8192  # derived from default",
        "norm_eps: 1.0e-05  # default",
    ):
        assert line in lines, line
    nest = next(line for line in lines if line.startswith("nest:"))
    assert (
        "nest: [{width: 128, norm_size: 128, kv_groups: 1, ffn: 512, expert_ffn: 0}, {width: 512, " in nest
        and "# derived from default" in nest
    )
    assert "64 blocks, hidden size 2048" in result.stdout
    assert "2048 │        16 │     8192" in result.stdout and "100.0%" in result.stdout


@pytest.mark.parametrize("preset", preset_names())
def test_what_print_config_prints_is_read_back(adamba, preset, tmp_path):
    """To the letter, but for where a value came from; the second time from a folder without the preset's files."""
    code, printed, _ = adamba("train", "--preset", preset, "--print_config", "--optimizer.lr", "1e-5")
    assert code == 0
    (tmp_path / "config.yaml").write_text(printed)
    first = yaml.safe_load(printed)
    assert first["optimizer"]["lr"] == 1e-5 and first["model"]["nest"][-1]["width"] == first["model"]["hidden_size"]
    code, again, _ = adamba("train", "--config", tmp_path / "config.yaml", "--print_config")
    values = lambda text: [line.split("  # ")[0] for line in text.splitlines()]
    assert code == 0 and values(again) == values(printed)


def test_a_schedule_in_yaml_is_read_and_printed(adamba, tmp_path):
    stages = [{"until": 0.3, "width_sampling": "full"}, {"width_weights": [1, 1, 1, 3]}]
    values = {"elastic": {"width_sampling": "uniform", "schedule": stages}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    words = ("train", "--preset", "tiny-hybrid", "--config", tmp_path / "run.yaml", "--print_config")
    code, printed, errors = adamba(*words)
    assert code == 0, errors
    read = yaml.safe_load(printed)["elastic"]["schedule"]
    assert [{key: value for key, value in stage.items() if value is not None} for stage in read] == stages
    (tmp_path / "again.yaml").write_text(printed)
    code, again, errors = adamba("train", "--config", tmp_path / "again.yaml", "--print_config")
    assert code == 0 and yaml.safe_load(again) == yaml.safe_load(printed), errors
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"elastic": {"schedule": [{"til": 3}]}}))
    code, _, errors = adamba(*words)
    assert code == 2 and errors.startswith("error: ") and "til" in errors and errors.count("\n") == 1, errors


def test_stage_marks_stay(adamba):
    _, printed, _ = adamba("train", "--preset", "tiny-hybrid", "--model.block_pattern", "TM|TMTM", "--print_config")
    assert yaml.safe_load(printed)["model"]["block_pattern"] == "TM|TMTM"


def test_an_error_is_one_line_and_an_exit_code():
    result = run("--model.hiden_size", "8")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "error: --model.hiden_size: unknown flag; did you mean --model.hidden_size?\n"
    # of many ranks the first alone complains
    assert run("--model.hiden_size", "8", RANK="1").stderr == ""
    # but where it alone has the trouble
    alone = run(f"--model.hiden_size_{os.getpid()}", "8", RANK="1")
    assert alone.returncode == 2 and alone.stderr.startswith("error: --model.hiden_size_")


def test_without_data_it_says_what_to_give():
    result = run("--preset", "transformer-d20", "--train.global_batch_size", "8")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: --data.tokenizer: not given; try --data.tokenizer bytes")


def test_leaving_runs_exit_functions_and_nothing_else():
    """Output and exit functions are done; objects of the interpreter are not taken apart, as threads may use them."""
    program = """
import atexit, logging, sys
from megatron_adamba.config.script import leave
class Held:
    def __del__(self):
        print("taken apart")
held = Held()
handler = logging.StreamHandler(sys.stdout)
handler.close = lambda: print("log closed")
atexit.register(print, "exit function")
print("output", end=" ")
leave(7)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split("\n")) == (7, ["output exit function", "log closed", ""]), done.stderr
