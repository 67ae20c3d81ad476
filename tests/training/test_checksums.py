"""A byte that flips in a tensor of a canonical checkpoint is found by whoever reads it, and the file is named."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess

import pytest
from forked import run_forked
from training.runs import ROOT, arguments, command, environment, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    run = tmp_path_factory.mktemp("whole") / "run"
    train(1, arguments(data, run, train__steps=2, checkpoint__interval=0))
    return run / "model"


@pytest.fixture
def flipped(whole, tmp_path):
    """One bit of one value, which stays finite."""
    model = tmp_path / "model"
    shutil.copytree(whole, model)
    (shard,) = model.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-4001] ^= 4
    shard.write_bytes(content)
    return model


def tool(*words) -> tuple[int, str, str]:
    script, *rest = map(str, words)
    done = run_forked(ROOT / "tools" / script, rest, environment())
    return done.returncode, done.stdout, done.stderr


def test_every_tensor_has_a_checksum(whole):
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    assert index["crc32"].keys() == index["weight_map"].keys()


def test_who_reads_parts_of_tensors_sees_it_too(flipped, whole, tmp_path, adamba):
    readers = [
        ("extract", flipped, tmp_path / "part", "--width", 16),
        ("extract", flipped, tmp_path / "part", "--width", 32, "--exit-layer", 1),
        ("merge-average", whole, flipped, tmp_path / "part"),
    ]
    for words in readers:
        code, _, errors = adamba("surgery", *words)
        assert code == 5 and "damaged (" in errors and "checksum differs" in errors, (words, errors)
        assert not (tmp_path / "part").exists()
    assert adamba("surgery", *readers[0], "--no-verify")[0] == 0


def test_verify_and_every_reader_name_the_shard(flipped, data, tmp_path):
    named = "model-00001-of-00001.safetensors: damaged ("
    readers = [
        ("checkpoint.py", "verify", flipped),
        ("checkpoint.py", "convert", flipped, tmp_path / "start"),
        ("generate.py", "--model", flipped, "--prompt", "a", "--max-new-tokens", 2),
        ("evaluate.py", "--model", flipped, "--data", data / "validation", "--max-tokens", 64),
        ("surgery.py", "expand", flipped, tmp_path / "wider", "--hidden", 64),
    ]
    for words in readers:
        code, _, errors = tool(*words)
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert code == 5 and len(lines) == 1 and named in lines[0] and "checksum differs" in lines[0], (words, errors)
    assert not (tmp_path / "start").exists() and not (tmp_path / "wider").exists()
    words = arguments(data, tmp_path / "run", train__steps=1, checkpoint__interval=0)
    done = train(1, [*words, "--checkpoint.init_from", str(flipped)], check=False)
    assert done.returncode == 5 and named in done.stderr


def test_those_who_ask_for_it_read_without(flipped, data, tmp_path):
    assert tool("generate.py", "--model", flipped, "--prompt", "a", "--max-new-tokens", 2, "--no-verify")[0] == 0
    words = arguments(data, tmp_path / "run", train__steps=1, checkpoint__interval=0, checkpoint__verify="false")
    train(1, [*words, "--checkpoint.init_from", str(flipped)])


def test_a_folder_of_others_has_none_and_loads(whole, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(whole, model)
    index = model / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    sums = values.pop("crc32")
    index.write_text(json.dumps(values))
    code, out, _ = tool("checkpoint.py", "verify", model)
    assert code == 0 and "has no checksums" in out
    sums.popitem()
    index.write_text(json.dumps(values | {"crc32": sums}))
    code, _, errors = tool("checkpoint.py", "verify", model)
    assert code == 5 and "index.json: has no checksum of " in errors


def test_a_full_disk_while_metrics_are_written_is_named(data, tmp_path):
    """A limit on the size of files stands in for the end of the disk."""
    run = tmp_path / "run"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    words = arguments(data, run, train__steps=200, checkpoint__interval=0, data__validation="[]")
    done = subprocess.run(
        command(1, words), capture_output=True, text=True, env=environment(), cwd=ROOT, preexec_fn=limit, timeout=120
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 6 and len(lines) == 1 and "metrics.jsonl: File too large" in lines[0], done.stderr
    assert "None" not in lines[0] and "Traceback" not in done.stderr and "Logging error" not in done.stderr
