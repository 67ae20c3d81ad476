"""A run on a GPU is the run on the CPU: one loss curve."""

from __future__ import annotations

import pytest
from cuda_marks import NEEDS_CUDA
from training.runs import ROOT, arguments, losses, train, write_corpus
from training.test_resume import forget_after

pytestmark = NEEDS_CUDA

RUNS = {
    "hybrid": ("zero1_fp32.json", {"model__block_pattern": "TMTM", "optimizer__name": "muon"}),
    "exits and gates": (
        "zero2_fp32.json",
        {
            "train__phase": 2,
            "model__block_pattern": "TMTM",
            "elastic__width_sampling": "sandwich",
            "elastic__plans_per_step": 1,
            "elastic__exit_fraction": 0.5,
            "elastic__mixed_exit_fraction": 0.5,
            "gates__warmup_steps": 2,
            "gates__size": 8,
            "gates__positions": 6,
        },
    ),
    "experts, windows, sinks": (
        "zero3_fp32.json",
        {
            "model__block_pattern": "EME",
            "model__num_experts": 4,
            "model__experts_per_token": 2,
            "model__expert_ffn_size": 32,
            "model__sliding_window": 8,
            "model__window_pattern": "SL",
            "model__attention_sinks": True,
        },
    ),
}
TOLERANCE = 2e-3
"""of a loss: Triton's float32 products may use TF32"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("name", RUNS)
def test_a_gpu_learns_as_the_cpu_does(tmp_path, data, name, monkeypatch):
    ds_config, options = RUNS[name]
    words = ["--deepspeed_config", str(ROOT / "ds_configs" / ds_config)]
    curves = []
    for device, visible in (("gpu", None), ("cpu", "")):
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        run = tmp_path / device
        train(1, [*arguments(data, run, **options, train__steps=10), *words])
        curves.append(losses(run))
    on_gpu, on_cpu = curves
    assert list(on_gpu) == list(range(1, 11)) and abs(on_cpu[1] - on_cpu[10]) > 20 * TOLERANCE
    for step, loss in on_cpu.items():
        assert abs(on_gpu[step] - loss) <= TOLERANCE * loss, step


def test_a_gpu_run_goes_on_from_its_checkpoint(tmp_path, data):
    """In bfloat16, as runs are by default; the second half is that of a run that never stopped."""
    run = tmp_path / "run"
    words = arguments(data, run, model__block_pattern="TM", train__steps=10, checkpoint__interval=5)
    train(1, words)
    want = losses(run)
    forget_after(run, 5)
    train(1, [*words, "--resume", "auto"])
    got = losses(run)
    for step in range(6, 11):
        assert abs(got[step] - want[step]) <= TOLERANCE * want[step], step
