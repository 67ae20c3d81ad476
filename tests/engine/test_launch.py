"""Who this process is, from the variables of each launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SCRIPT = """
import json, sys
from megatron_adamba.engine.launch import start_distributed, stop_distributed
from megatron_adamba.errors import ConfigError
try:
    info = start_distributed()
except ConfigError as error:
    sys.exit(f"error: {error}")
import os
print(json.dumps([info.rank, info.world_size, info.local_rank, info.backend, os.environ["MASTER_ADDR"]]))
stop_distributed()
"""


def start(**variables: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCHERS and not key.startswith("SLURM_")}
    env = kept | variables | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=120)


def answer(**variables: str) -> list:
    done = start(**variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_without_a_launcher():
    assert answer() == [0, 1, 0, "gloo", "127.0.0.1"]


def test_one_rank_of_torchrun_or_deepspeed():
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29617"}
    assert answer(**variables) == [0, 1, 0, "gloo", "localhost"]


def test_ranks_of_srun():
    """srun sets none of torch's variables."""
    shared = {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": "29619"}
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=kept | shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in ranks]
    assert found == [[0, 2, 0, "gloo", "127.0.0.1"], [1, 2, 1, "gloo", "127.0.0.1"]]


def test_a_rank_that_cannot_be():
    done = start(RANK="3", WORLD_SIZE="2", MASTER_PORT="29621")
    assert done.returncode != 0
    assert "RANK 3" in done.stderr and "WORLD_SIZE 2" in done.stderr


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node7", "node7"), ("node[03-07,12]", "node03"), ("a1,b[2-3]", "a1"), ("gpu[1,4]", "gpu1")],
)
def test_first_host_of_a_slurm_list(nodes, first):
    from megatron_adamba.engine.launch import first_host

    assert first_host(nodes) == first
