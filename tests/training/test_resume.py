"""Stopping and going on: the loss curve continues bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from training.runs import ROOT, arguments, command, environment, losses, train, write_corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize(
    ("ranks", "ds_config", "optimizer"),
    [
        (2, "zero1.json", "muon"),
        (2, "zero2_fp32.json", "adamw"),
        (2, "zero3.json", "adamw"),
        (1, "zero0_fp32.json", "muon"),
        (1, "zero3_offload_fp32.json", "adamw"),
        (2, "zero2_offload.json", "adamw"),
    ],
)
def test_resume_is_bit_for_bit(tmp_path, data, ranks, ds_config, optimizer):
    """20 steps at once, and the last 10 again from a checkpoint with frozen weights in it."""
    options = {"optimizer__name": optimizer, "train__freeze": "[attention]", "checkpoint__interval": 10}
    extra = ["--deepspeed_config", str(ROOT / "ds_configs" / ds_config)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(ranks, arguments(data, whole, **options) + extra)
    shutil.copytree(whole, parts)
    forget_after(parts, 10)
    done = train(ranks, [*arguments(data, parts, **options), *extra, "--resume", "auto"])
    assert "at step 10" in done.stdout
    assert losses(parts) == losses(whole)
    assert (parts / "model" / "model-00001-of-00001.safetensors").read_bytes() == (
        whole / "model" / "model-00001-of-00001.safetensors"
    ).read_bytes()


def forget_after(run, step):
    """The run as it stood when it had saved at `step`."""
    kept = run / "checkpoints" / f"step-{step:08}"
    for path in [run / "model", *(run / "checkpoints").glob("step-*")]:
        if path != kept:
            shutil.rmtree(path)
    (run / "checkpoints" / "latest").write_text(kept.name)
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if json.loads(line).get("step", 0) <= step))
    assert max(losses(run)) == step


def test_resume_on_another_layout(tmp_path, data):
    """Checkpoints hold rectangles of whole tensors, so one rank goes on where two stopped."""
    options = {"checkpoint__interval": 10}
    zero = lambda name: ["--deepspeed_config", str(ROOT / "ds_configs" / name)]
    run = tmp_path / "run"
    train(2, arguments(data, run, **options) + zero("zero1_fp32.json"))
    expected = losses(run)
    (run / "checkpoints" / "latest").write_text("step-00000010")
    train(1, [*arguments(data, run, **options), *zero("zero3_fp32.json"), "--resume", "auto"])
    resumed = losses(run)
    assert resumed.keys() == expected.keys()
    assert all(abs(resumed[step] - expected[step]) < 1e-5 for step in expected)


def test_tensor_parallel_run_goes_on_anywhere(tmp_path, data):
    """Saved in the background by two tensor-parallel ranks; they go on bit for bit, and one rank at ZeRO 3 as well."""
    options = {"checkpoint__interval": 10, "checkpoint__asynchronous": "true", "model__mamba_num_groups": 2}
    zero = lambda name: ["--deepspeed_config", str(ROOT / "ds_configs" / name)]
    run = tmp_path / "run"
    words = arguments(data, run, **options)
    shared = [*words, "--parallel.tp", "2", "--parallel.sp", "true", *zero("zero2_fp32.json")]
    assert "2 x tensor parallel, sequence parallel" in train(2, shared).stdout
    expected = losses(run)
    latest = run / "checkpoints" / "latest"
    latest.write_text("step-00000010")
    train(2, [*shared, "--resume", "auto"])
    assert losses(run) == expected
    latest.write_text("step-00000010")
    train(1, [*words, *zero("zero3_fp32.json"), "--resume", "auto"])
    resumed = losses(run)
    assert resumed.keys() == expected.keys()
    assert all(abs(resumed[step] - expected[step]) < 1e-5 for step in expected)


def test_expert_parallel_run_goes_on_anywhere(tmp_path, data):
    """Two expert-parallel ranks at ZeRO 2 go on bit for bit, and one at ZeRO 1; metrics say how full experts are."""
    options = {"checkpoint__interval": 10, "model__block_pattern": "EM", "model__num_experts": 4}
    options |= {"model__experts_per_token": 2, "model__router_balance_weight": 0.01, "elastic__plans_per_step": 1}
    zero = lambda name: ["--deepspeed_config", str(ROOT / "ds_configs" / name)]
    run = tmp_path / "run"
    words = arguments(data, run, **options)
    shared = [*words, "--parallel.ep", "2", *zero("zero2_fp32.json")]
    assert "2 x expert parallel" in train(2, shared).stdout
    expected = losses(run)
    loads = [json.loads(line).get("expert_load") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(len(load["0"]) == 4 and abs(sum(load["0"]) - 4) < 1e-3 for load in loads if load)
    assert sum(load is not None for load in loads) == 20
    latest = run / "checkpoints" / "latest"
    latest.write_text("step-00000010")
    train(2, [*shared, "--resume", "auto"])
    assert losses(run) == expected
    latest.write_text("step-00000010")
    train(1, [*words, *zero("zero1_fp32.json"), "--resume", "auto"])
    resumed = losses(run)
    assert all(abs(resumed[step] - expected[step]) < 1e-5 for step in expected)


def kill_and_resume(words, ranks, run_dir, kills, longest, source):
    """Start, kill -9 every process of the job at a random moment, again and again; then let it finish."""
    for _ in range(kills):
        process = subprocess.Popen(
            command(ranks, words),
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(timeout=source.uniform(0.3, 1.0) * longest)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        time.sleep(0.5)
    train(ranks, words, patience=1500)
    return losses(run_dir)


def test_killed_runs_reach_the_same_loss(tmp_path, data):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"train__steps": 60, "checkpoint__interval": 4}
    start = time.monotonic()
    train(2, arguments(data, whole, **options))
    taken = time.monotonic() - start
    words = [*arguments(data, parts, **options), "--resume", "auto"]
    assert kill_and_resume(words, 2, parts, 3, taken, random.Random(5)) == losses(whole)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_tiny_hybrid_killed_at_random_points(tmp_path):
    """200 steps of the quickstart's preset, on the quickstart's data."""
    data = ROOT / "runs" / "quickstart" / "data"
    if not (data / "train.idx").exists():
        subprocess.run(["bash", str(ROOT / "examples" / "quickstart_data.sh")], check=True, cwd=ROOT)
    options = ["--preset", "tiny-hybrid", "--train.steps", "200", "--checkpoint.interval", "20", "--resume", "auto"]
    words = lambda name: [*options, "--logging.interval", "1", "--logging.run_dir", str(tmp_path / name)]
    start = time.monotonic()
    train(2, words("whole"), patience=1500)
    taken = time.monotonic() - start
    resumed = kill_and_resume(words("parts"), 2, tmp_path / "parts", 3, taken, random.Random(11))
    assert resumed == losses(tmp_path / "whole")


def test_sigterm_saves_and_goes_on(tmp_path, data):
    run = tmp_path / "run"
    words = arguments(data, run, train__steps=2000, checkpoint__interval=0)
    process = subprocess.Popen(
        command(1, words), env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 8
    assert "SIGTERM" in errors and "--resume auto" in errors
    saved = (run / "checkpoints" / "latest").read_text()
    steps = int(saved.removeprefix("step-"))
    done = train(1, [*arguments(data, run, train__steps=steps + 3, checkpoint__interval=0), "--resume", "auto"])
    assert f"at step {steps}" in done.stdout
    assert max(losses(run)) == steps + 3
