"""Real runs, and the checkpoint tool around its real `main`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from checkpoint_helpers import FP32, SIZES, TOOL, Call
from training.runs import ROOT, arguments, train, write_corpus

from megatron_adamba.config.script import run_script


@pytest.fixture
def call(monkeypatch, capsys) -> Call:
    """call(words...): exit code, stdout and stderr of the script around its real `main`."""

    def start(*words: object) -> tuple[int, str, str]:
        spec = importlib.util.spec_from_file_location("tool_checkpoint", TOOL)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclasses look their module up
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", ["checkpoint.py", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_script(module.main)
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return start


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory, corpus) -> Path:
    """A run of one rank in bf16, its attention frozen: weights of two dtypes. Checkpoints at 5 and 10."""
    run = tmp_path_factory.mktemp("one") / "run"
    bf16 = ["--deepspeed_config", str(ROOT / "ds_configs" / "zero1.json")]
    train(1, arguments(corpus, run, **SIZES, train__freeze="[attention]") + bf16)
    return run


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory, corpus) -> Path:
    """Two ranks, ZeRO 1, fp32."""
    run = tmp_path_factory.mktemp("two") / "run"
    train(2, arguments(corpus, run, **SIZES) + FP32)
    return run


@pytest.fixture(params=["one_rank", "two_ranks"])
def run(request) -> Path:
    return request.getfixturevalue(request.param)
