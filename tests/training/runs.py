"""Small runs of the real script, for the tests of this folder."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from forked import ForkedScript, run_forked

ROOT = Path(__file__).parent.parent.parent

TINY = {
    "model.hidden_size": "32",
    "model.block_pattern": "TM",
    "model.head_dim": "8",
    "model.widths": "[8,16,32]",
    "model.ffn_granule": "16",
    "model.mamba_head_dim": "16",
    "model.mamba_d_state": "8",
    "model.mamba_chunk_size": "16",
    "elastic.width_sampling": "per_layer",
    "elastic.plans_per_step": "2",
    "data.tokenizer": "bytes",
    "train.steps": "20",
    "train.seq_len": "32",
    "train.micro_batch_size": "2",
    "train.global_batch_size": "8",
    "train.eval_tokens": "2000",
    "optimizer.warmup_steps": "2",
    "checkpoint.interval": "5",
    "logging.interval": "1",
    "logging.tensorboard": "false",
}


def write_corpus(folder: Path) -> Path:
    """A small corpus, tokenized to bytes by the real tool; returns the folder of the train and validation sets."""
    texts = folder / "texts"
    texts.mkdir()
    source = random.Random(3)
    words = ["the", "quick", "model", "reads", "nested", "layers", "while", "attention", "sleeps", "and", "flows"]
    for number in range(30):
        text = " ".join(source.choice(words) for _ in range(60))
        (texts / f"text-{number}.txt").write_text(text)
    data = folder / "data"
    words = ["--tokenizer", "bytes", "--split"]
    words += ["--input", str(texts), "--output", str(data), "--validation-fraction", "0.2"]
    run_forked(ROOT / "tools/preprocess_data.py", words).check_returncode()
    return data


def arguments(data: Path, run_dir: Path, **overrides: Any) -> list[str]:
    settings = TINY | {
        "data.train": f"[{data / 'train'}]",
        "data.validation": f"[{data / 'validation'}]",
        "logging.run_dir": str(run_dir),
    }
    settings |= {key.replace("__", "."): str(value) for key, value in overrides.items()}
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1"}


def command(ranks: int, words: list[str]) -> list[str]:
    """The script as users start it: by hand for one rank, through DeepSpeed's launcher for more."""
    script = str(ROOT / "pretrain_adamba.py")
    if ranks == 1:
        return [sys.executable, script, *words]
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--num_gpus", str(ranks), "--master_port", str(free_port()), script, *words]


def free_port() -> int:
    """Nobody listens there, and it is not one of another connection, as a drawn one may be."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def train(ranks: int, words: list[str], check: bool = True, patience: float = 300) -> subprocess.CompletedProcess[str]:
    """A run to its end, as a plain launcher starts it: one process a rank that finds the others by the environment.

    The result is the first rank's, its exit code the first one that is not zero. patience: seconds.
    """
    script = ROOT / "pretrain_adamba.py"
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(ForkedScript(script, words, environment() | (places if ranks > 1 else {})))
    try:
        out, errors = processes[0].communicate(timeout=patience)
        if processes[0].returncode:
            print(out[-2000:], errors[-4000:])
        codes = [process.wait(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    done = subprocess.CompletedProcess(processes[0].args, next((code for code in codes if code), 0), out, errors)
    if check and done.returncode:
        raise RuntimeError(f"exits {codes}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> loss, from metrics.jsonl."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}
