"""A stage that raises or dies ends the whole job within seconds, its own words first."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from training.runs import environment, free_port

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("how", "at", "schedule"),
    [
        ("raises", 1, "1f1b"),
        ("dies", 0, "1f1b"),
        pytest.param("raises", 0, "1f1b", marks=pytest.mark.slow),
        pytest.param("raises", 1, "dualpipev", marks=pytest.mark.slow),
        pytest.param("dies", 1, "1f1b", marks=pytest.mark.slow),
    ],
)
def test_the_job_ends(how, at, schedule):
    launcher = str(Path(sys.executable).parent / "deepspeed")
    port = str(free_port())
    words = ["-q", "--num_gpus", "2", "--master_port", port, str(HERE / "failing_stage.py"), how, str(at), schedule]
    start = time.monotonic()
    done = subprocess.run(
        [launcher, *words], env=environment(), cwd=HERE.parent.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and time.monotonic() - start < 60
    said = done.stderr + done.stdout
    if how == "raises":
        # the other stage's trouble comes later, if the launcher leaves it the time
        assert said.index("ValueError: the third pass went wrong") == said.index("Error: ") - len("Value")
        assert said.count("Traceback") == 1 or said.index("went wrong") < said.rindex("Traceback")
    else:
        # whether the survivor comes to say which one is gone, or the launcher is quicker, depends on the machine
        by_survivor = f"rank {at} ended without a word" in said
        assert by_survivor or f"'--local_rank={at}', 'dies', '{at}', '1f1b'] exits with return code = -9" in said
