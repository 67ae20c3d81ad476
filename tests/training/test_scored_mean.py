"""The loss of a step is the mean over its scored tokens, however they fall into micro-batches and ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from training.runs import ROOT, arguments, train

from megatron_adamba.data.indexed_dataset import HEADER, MAGIC


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """As others write it: nothing closes documents, and the token before each is not scored. Half of the documents are
    of one to three tokens, so that samples differ much in what they score."""
    folder = tmp_path_factory.mktemp("foreign")
    source = np.random.default_rng(5)
    for name, count in (("train", 240), ("validation", 30)):
        lengths = np.where(np.arange(count) < count // 2, source.integers(1, 4, count), source.integers(20, 60, count))
        tokens = source.integers(32, 120, lengths.sum()).astype("<u2")
        tokens.tofile(folder / f"{name}.bin")
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * 2
        with open(folder / f"{name}.idx", "wb") as stream:
            stream.write(HEADER.pack(MAGIC, 1, 8, count, count + 1))
            for array, dtype in ((lengths, "<i4"), (starts, "<i8"), (np.arange(count + 1), "<i8")):
                stream.write(array.astype(dtype).tobytes())
    return folder


def curve(data, run, ranks=1, **options):
    sizes = {
        "train__steps": 6,
        "train__seq_len": 16,
        "elastic__plans_per_step": 1,
        "elastic__width_sampling": "uniform",
    }
    zero = ["--deepspeed_config", str(ROOT / "ds_configs" / "zero1_fp32.json")]
    train(ranks, [*arguments(data, run, **(sizes | options)), *zero])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["loss"], record["grad_norm"]) for record in records if "loss" in record]


def test_no_micro_batch_size_and_no_layout_changes_it(data, tmp_path):
    expected = curve(data, tmp_path / "whole", train__micro_batch_size=8)
    assert len(expected) == 6
    groups = {"model__mamba_num_groups": 2}
    layouts = {
        "one": (1, {"train__micro_batch_size": 1}),
        "two": (2, {"train__micro_batch_size": 2}),
        "shared": (2, {"train__micro_batch_size": 2, "parallel__tp": 2, "parallel__sp": "true", **groups}),
        "staged": (2, {"train__micro_batch_size": 2, "parallel__pp": 2}),
    }
    for name, (ranks, options) in layouts.items():
        wanted = expected
        if name == "shared":
            wanted = curve(data, tmp_path / "groups", train__micro_batch_size=8, **groups)
        found = curve(data, tmp_path / name, ranks, **options)
        for (loss, norm), (other, other_norm) in zip(wanted, found, strict=True):
            assert abs(loss - other) < 1e-5 and norm == pytest.approx(other_norm, rel=1e-5), name


def test_balancing_losses_stay_per_micro_batch(data, tmp_path):
    """They are means over micro-batches and not weighed by scored tokens; the step's cross entropy is what it is
    without them."""
    experts = {"model__block_pattern": "EM", "model__num_experts": 4, "model__experts_per_token": 2}
    plain = curve(data, tmp_path / "plain", train__micro_batch_size=2, train__steps=1, **experts)
    weighed = {"model__router_balance_weight": 0.01, "train__steps": 1}
    balanced = curve(data, tmp_path / "balanced", train__micro_batch_size=2, **experts, **weighed)
    # four micro-batches of a loss that is 1 when balanced
    assert 0.009 < balanced[0][0] - plain[0][0] < 0.02
