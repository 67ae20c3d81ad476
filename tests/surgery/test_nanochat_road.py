"""examples/nanochat_to_adamba.sh from end to end, on a model that trains in seconds."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from surgery.test_gpt_oss_examples import ROOT, write_data
from training.runs import free_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> tuple[Path, str]:
    """The folder that the script left, and what it said."""
    folder = tmp_path_factory.mktemp("road")
    data = write_data(folder)
    places = {"DATA": str(data), "STEPS": "12", "HIDDEN": "32", "WIDER": "48", "WIDTHS": "8,16,32"}
    places |= {
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(free_port()),
        "CALIBRATION_TOKENS": "3000",
        "EVALUATION_TOKENS": "2000",
    }
    places |= {"RUN_SETTINGS": "--train.eval_tokens 1000 --logging.interval 1"}
    script = ["bash", str(ROOT / "examples/nanochat_to_adamba.sh"), str(folder / "out")]
    done = subprocess.run(script, env=os.environ | places, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder / "out", done.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model-00001-of-00001.safetensors")


def test_each_step_is_recorded(road):
    folder, _ = road
    history = json.loads((folder / "extracted-48" / "surgery.json").read_text())
    operations = ["import nanochat", "reorder", "graft", "expand", "extract"]
    assert [entry["operation"] for entry in history if entry["operation"] in operations] == operations


def test_surgery_kept_the_function(road):
    """What `compare` printed on real text, behind reorder and behind expand."""
    differences = [float(text) for text in re.findall(r"differ by (\S+) at most", road[1])]
    assert len(differences) == 2 and max(differences) < 1e-5


def test_phase_1_trains_what_was_grafted(road):
    before, after = weights(road[0] / "grafted"), weights(road[0] / "phase-1" / "model")
    # the run is bf16, and what it does not train is fp32 all the same
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".mixer" in name for name in changed)


def test_phase_3_moves_new_weights_more(road):
    before, after = weights(road[0] / "expanded"), weights(road[0] / "phase-3" / "model")
    name = "blocks.0.mlp.up.up_weight"
    change = (after[name] - before[name]).abs()
    assert change[128:].mean() > 3 * change[:128, :32].mean() > 0


def test_extracted_models_score_what_the_nested_one_does(road):
    folder, _ = road
    nested = {(row["width"], row["exit_layer"]): row for row in json.loads((folder / "eval.json").read_text())["rows"]}
    assert {key[1] for key in nested} == {None, 1, 2, 3, 4, 5}
    for width in (8, 16, 32, 48):
        own = json.loads((folder / f"eval-{width}.json").read_text())["rows"]
        assert own[-1]["width"] == width
        for row in own:
            # both run in bf16, whose products depend on the shapes
            assert abs(row["nats_per_token"] - nested[row["width"], None]["nats_per_token"]) < 0.01


def test_the_pictures(road):
    for name in ("road.png", "pareto.png"):
        assert (road[0] / name).read_bytes().startswith(b"\x89PNG")
