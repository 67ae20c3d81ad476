"""A run whose narrow passes learn from the full one: it says so, and gates beside it see the text's losses."""

from __future__ import annotations

import json

import pytest
from training.runs import arguments, train


def records(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_narrow_passes_learn_beside_gates(data, tmp_path):
    """At the first step the weights are the same: the full pass is, the narrow one is not, and what gates are taught
    does not know of the divergence."""
    options = {"elastic__width_sampling": "sandwich", "train__phase": 2, "train__steps": 3, "checkpoint__interval": 0}
    options |= {"elastic__exit_fraction": 0.0, "gates__warmup_steps": 0, "gates__size": 8, "train__eval_tokens": 200}
    options |= {"elastic__plans_per_step": 1}
    found = {}
    for share in (0.0, 0.7):
        run = tmp_path / f"share-{share}"
        said = train(1, arguments(data, run, **options, distill__share=share, distill__temperature=1.5)).stdout
        found[share] = next(record for record in records(run) if record["step"] == 1 and "loss" in record)
        line = "distill    0.7 of a narrow pass's loss is the forward divergence from the full pass, at temperature 1.5"
        assert (line in " ".join(said.replace("\n", " ").split(" "))) == bool(share)
    plain, learns = found[0.0], found[0.7]
    assert learns["loss_full"] == plain["loss_full"] and learns["loss"] < plain["loss"] - 0.1
    for name in ("gate_error", "predictor_error"):
        assert learns[name] == pytest.approx(plain[name], rel=1e-4), name
    assert learns["mfu"] != plain["mfu"]
