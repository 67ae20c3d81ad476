"""Real runs, and the checkpoint tool around its real `main`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from checkpoint_helpers import FP32, SIZES, Call
from training.runs import ROOT, arguments, train, write_corpus


@pytest.fixture
def call(adamba) -> Call:
    """call(words...): exit code, stdout and stderr of `adamba checkpoint WORDS`."""
    return partial(adamba, "checkpoint")


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
