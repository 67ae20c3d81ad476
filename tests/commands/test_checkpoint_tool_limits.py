"""tools/checkpoint.py and the shard writer under it at the limits of memory and disk."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import TOOL, same_bits, weights_of
from training.runs import environment

from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.checkpoint.canonical import write_canonical
from megatron_adamba.checkpoint.shards import TensorInfo
from megatron_adamba.config.model import ModelConfig


@pytest.mark.parametrize("source", ["checkpoints", "model"])
def test_a_full_disk_leaves_nothing_behind(two_ranks, tmp_path, source):
    """A limit on the size of files stands in for the end of the disk."""
    words = [sys.executable, str(TOOL), "convert", str(two_ranks / source), str(tmp_path / "target")]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), preexec_fn=limit, timeout=120)
    assert done.returncode == 6 and done.stderr.startswith(f"error: {tmp_path / 'target'}: "), done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["checkpoints", "model"])
def test_everything_is_on_disk_before_it_takes_its_name(call, two_ranks, tmp_path, monkeypatch, source):
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    rename = Path.rename

    def checked(path: Path, target: Path) -> Path:
        if target == tmp_path / "target":
            # a file that was itself written aside and renamed was synced under that other name
            names = {Path(name).name.partition(".tmp-")[0] for name in synced if Path(name).parent == path}
            assert str(path) in synced and names >= {file.name for file in path.iterdir()}
            synced.clear()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", checked)
    assert call("convert", two_ranks / source, tmp_path / "target", "--force")[0] == 0
    assert synced == [str(tmp_path)]


def test_streamed_shards_are_the_librarys_byte_for_byte(tmp_path):
    """Mixed dtypes, a scalar, an empty tensor, a name beyond ASCII; several shards."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"b": torch.randn(7, 3, generator=generator), "a": torch.randn(5, generator=generator).bfloat16()}
    tensors |= {"ä": torch.tensor(2.5), "empty": torch.empty(0, 4), "n": torch.arange(3), "h": torch.ones(3).half()}
    tensors |= {"d": torch.randn(2, 2, generator=generator).double(), "t": torch.randn(4, 6, generator=generator).T}
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    for limit in (1, 100, 10_000):
        write_canonical(tmp_path / "streamed", {}, tensors.items(), max_shard_bytes=limit, infos=infos)
        write_canonical(tmp_path / "held", {}, tensors.items(), max_shard_bytes=limit)
        names = sorted(path.name for path in (tmp_path / "held").iterdir())
        assert names == sorted(path.name for path in (tmp_path / "streamed").iterdir())
        for name in names:
            assert (tmp_path / "held" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes(), name
    wrong = [list(tensors.items())[:-1], [*tensors.items(), ("x", torch.ones(1))], list(tensors.items())[::-1]]
    wrong.append([*list(tensors.items())[:-1], ("t", torch.ones(6, 4).half())])
    for given in wrong:
        with pytest.raises(ValueError, match="announced"):
            write_canonical(tmp_path / "wrong", {}, given, infos=infos)
    assert not list(tmp_path.glob("wrong*"))


PROGRAM = """
import atexit, runpy, sys
peak = lambda: next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
atexit.register(lambda: print(peak(), file=sys.stderr))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def peak_megabytes(*words: object) -> float:
    """Of the tool's own process: getrusage would count what the process that started it had at that moment. What is
    freed goes back at once (mallopt(3)): how much malloc would keep of it depends on where things happen to lie."""
    program = [sys.executable, "-c", PROGRAM, str(TOOL), *map(str, words)]
    returning = environment() | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(program, env=returning, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split()[-2]) / 1024


def synthetic(folder: Path, blocks: int, hidden: int) -> tuple[Path, float, float]:
    """A canonical checkpoint of random fp32 values; megabytes of all tensors and of the largest."""
    config = resolve_model(
        ModelConfig(hidden_size=hidden, block_pattern="T" * blocks, vocab_size=257, ffn_size=2 * hidden)
    )
    specs = manifest(config)
    infos = {spec.name: TensorInfo(spec.shape, torch.float32) for spec in specs}
    tensors = ((spec.name, torch.randn(spec.shape)) for spec in specs)
    write_canonical(folder, {"model": asdict(config), "tokenizer_hash": "0" * 64}, tensors, infos=infos)
    sizes = [spec.numel * 4 / 2**20 for spec in specs]
    return folder, sum(sizes), max(sizes)


@pytest.mark.slow
def test_memory_is_bounded_by_tensors_not_by_the_model(tmp_path):
    small, *_ = synthetic(tmp_path / "small", 2, 64)
    large, total, tensor = synthetic(tmp_path / "large", 10, 1024)
    assert total > 300 and 7.9 < tensor < 8.1
    start, back = tmp_path / "start", tmp_path / "back"
    least = peak_megabytes("convert", small, tmp_path / "small-start")
    for words in (
        ("convert", large, start, "--dp", 2),
        ("verify", start),
        ("convert", start, back),
        ("verify", back),
        ("diff", large, start),
        ("inspect", start),
    ):
        growth = peak_megabytes(*words) - least
        assert growth < 8 * tensor, (words[0], growth)
    same_bits(weights_of(back), weights_of(large))
