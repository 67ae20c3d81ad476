"""The wheel, built from the sdist, in a fresh environment and outside the repository: the quickstart's steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = {
    "model.hidden_size": 32,
    "model.head_dim": 8,
    "model.num_heads": 4,
    "model.num_kv_groups": 2,
    "model.ffn_size": 64,
    "model.ffn_granule": 16,
    "model.mamba_head_dim": 8,
    "model.widths": "[8,16,32]",
    "train.steps": 6,
    "train.seq_len": 64,
    "train.eval_tokens": 500,
    "optimizer.warmup_steps": 1,
}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder with the sdist and the wheel."""
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return target


@pytest.fixture(scope="module")
def fresh(built, tmp_path_factory) -> Path:
    """Folder of the programs of an environment that has the wheel, and the libraries of this one."""
    place = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    packages = next((place / "lib").glob("python*")) / "site-packages"
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = built.glob("*.whl")
    command = [place / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True, capture_output=True)
    return place / "bin"


@pytest.mark.slow
def test_what_is_in_them(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ("config/presets/tiny-hybrid.yaml", "config/ds_configs/zero2.json", "py.typed", "__main__.py"):
        assert f"megatron_adamba/{name}" in names
    assert "megatron_adamba/inference/serving/chat.html" in names
    assert not [name for name in names if name.startswith(("tests", "tools", "examples"))]
    (metadata,) = (name for name in names if name.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    for line in (
        "Name: megatron_adamba",
        "License-Expression: Apache-2.0",
        "Requires-Python: >=3.11",
        "# megatron_adamba",
    ):
        assert line in text
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/LICENSE") for name in archive.getnames())


@pytest.mark.slow
def test_the_quickstarts_steps_outside_the_repository(fresh, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1"}

    def run(*words: object) -> str:
        command = [str(fresh / str(words[0])), *map(str, words[1:])]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    where = run("python", "-c", "import megatron_adamba; print(megatron_adamba.__file__)")
    assert where.startswith(str(fresh.parent))
    for number in range(30):
        (tmp_path / f"text-{number}.txt").write_text(f"Document {number} has words, and more words. " * 20)
    (tmp_path / "texts").mkdir()
    for path in tmp_path.glob("text-*.txt"):
        path.rename(tmp_path / "texts" / path.name)
    assert run("adamba", "--version").strip() == run("python", "-m", "megatron_adamba", "--version").strip()
    run("adamba", "tokenizer", "--input", "texts", "--vocab-size", 320, "--output", "data/tokenizer.model")
    run("adamba", "data", "--input", "texts", "--tokenizer", "data/tokenizer.model", "--output", "data", "--split")
    settings = {f"--{name}": value for name, value in SMALL.items()}
    settings |= {"--data.train": "data/train", "--data.validation": "data/validation"}
    settings |= {
        "--data.tokenizer": "data/tokenizer.model",
        "--logging.run_dir": "run",
        "--deepspeed_config": "zero1_fp32",
    }
    shown = run("adamba", "train", "--preset", "tiny-hybrid", *(word for pair in settings.items() for word in pair))
    assert "model written to run/model" in shown
    run("adamba", "evaluate", "--model", "run/model", "--data", "data/validation", "--json", "eval.json")
    assert [row["width"] for row in json.loads((tmp_path / "eval.json").read_text())["rows"]] == [8, 16, 32]
    run("adamba", "plot", "--metrics", "run/metrics.jsonl", "--output", "curves.png")
    run(
        "adamba",
        "generate",
        "--model",
        "run/model",
        "--mode",
        "ghost",
        "--prompt",
        "Document",
        "--output",
        "sample.txt",
    )
    assert (tmp_path / "sample.txt").read_text().startswith("Document") and (tmp_path / "curves.png").stat().st_size
    code = "import megatron_adamba as a; print(a.load('run/model').generate('Document', max_new_tokens=4, width=16))"
    run("python", "-c", code)
