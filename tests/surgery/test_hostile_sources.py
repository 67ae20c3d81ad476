"""Sources that are damaged or made to do harm: each is refused in a line, at once, whatever is wrong with it."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from surgery.gpt_oss_folders import make_source
from surgery.mutations import mutated_bytes, mutated_json
from surgery.nanochat_folders import own_metadata, own_tensors, random_nanochat, save_own

from megatron_adamba.checkpoint.history import extended_history, read_history
from megatron_adamba.errors import AdambaError, CheckpointError
from megatron_adamba.surgery.import_gpt_oss import import_gpt_oss
from megatron_adamba.surgery.import_hf import import_hugging_face
from megatron_adamba.surgery.import_nanochat import import_nanochat

SQUARE = "square experts, one key head"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, tuple[Path, Path, Callable]]:
    """Kind -> (folder, file of settings, import)."""
    folder = tmp_path_factory.mktemp("sources")
    _, theirs = make_source(SQUARE, "hf bf16", folder / "gpt-oss")
    _, original = make_source(SQUARE, "openai bf16", folder / "openai")
    model = random_nanochat()
    model.save_pretrained(folder / "nanochat-hf")
    own = save_own(folder / "nanochat", own_tensors(model), own_metadata(model))
    nanochat = folder / "nanochat-hf"
    return {
        "gpt-oss": (theirs, theirs / "config.json", import_hugging_face),
        "openai": (original, original / "config.json", import_gpt_oss),
        "nanochat of transformers": (nanochat, nanochat / "config.json", import_hugging_face),
        "nanochat": (own, next(own.glob("meta_*.json")), import_nanochat),
    }


def linked(source: Path, target: Path, without: str) -> Path:
    """A folder with the same files but one."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != without:
            (target / path.name).symlink_to(path)
    return target


def outcome(call: Callable, *arguments) -> str:
    """What came of it; anything but a clean refusal is a failure."""
    start = time.monotonic()
    try:
        call(*arguments)
        told = "taken"
    except AdambaError as error:
        told = str(error)
        assert "\n" not in told and 0 < len(told) < 2000
    assert time.monotonic() - start < 5
    return told


@pytest.mark.parametrize("kind", ["gpt-oss", "openai", "nanochat of transformers", "nanochat"])
def test_two_thousand_mutated_settings(kind, sources, tmp_path):
    source, path, read = sources[kind]
    folder = linked(source, tmp_path / "source", path.name)
    values, random_ = json.loads(path.read_text()), random.Random(21)
    for number in range(500):
        content = mutated_json(random_, values)
        (folder / path.name).write_bytes(content)
        try:
            outcome(read, folder)
        except Exception as error:
            raise AssertionError(f"{number}: {type(error).__name__}: {error}: {content[:3000]}") from error


LARGE = 2**40
HUGE = {
    "gpt-oss": {
        "vocab_size": LARGE,
        "num_hidden_layers": 10**9,
        "hidden_size": LARGE,
        "num_local_experts": LARGE,
        "intermediate_size": LARGE,
        "num_attention_heads": LARGE,
        "head_dim": LARGE,
        "num_key_value_heads": LARGE,
        "rms_norm_eps": 10**400,
        "sliding_window": LARGE,
    },
    "openai": {"vocab_size": LARGE, "num_hidden_layers": 10**9, "initial_context_length": 2**70},
    "nanochat of transformers": {"vocab_size": LARGE, "num_hidden_layers": 10**9, "rms_norm_eps": 10**400},
    "nanochat": {"vocab_size": LARGE, "n_layer": 10**9, "n_embd": LARGE, "n_head": LARGE},
}


@pytest.mark.parametrize(
    ("kind", "key", "value"), [(kind, *one) for kind, all_of in HUGE.items() for one in all_of.items()]
)
def test_huge_sizes(kind, key, value, sources, tmp_path):
    source, path, read = sources[kind]
    folder = linked(source, tmp_path / "source", path.name)
    values = json.loads(path.read_text())
    (values["model_config"] if kind == "nanochat" else values)[key] = value
    if key == "num_hidden_layers":
        values.pop("layer_types", None)
    (folder / path.name).write_text(json.dumps(values))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = outcome(read, folder)
    assert told != "taken" or key in ("sliding_window", "initial_context_length")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_two_thousand_mutated_torch_files(sources, tmp_path):
    """Their pickle and the archive around it; the values themselves are anybody's."""
    source, _, _ = sources["nanochat"]
    (path,) = source.glob("model_*.pt")
    folder = linked(source, tmp_path / "source", path.name)
    content, random_ = path.read_bytes(), random.Random(21)
    pickle_at, tail_at = content.index(b"\x80\x02"), content.rindex(b"PK\x01\x02") - 1500
    told = set()
    for number in range(2000):
        where = (0, pickle_at + 1500) if number % 3 else (tail_at, len(content))
        (folder / path.name).write_bytes(mutated_bytes(random_, content, *where))
        try:
            told.add(outcome(import_nanochat, folder))
        except Exception as error:
            raise AssertionError(f"{number}: {type(error).__name__}: {error}") from error
    assert len(told) > 20


@pytest.mark.parametrize("kind", ["stride 0", "overlapping", "absurd storage", "negative", "meta", "sparse", "nested"])
def test_tensors_that_are_not_what_they_say(kind, sources, tmp_path):
    """A file of a few kilobytes must not become terabytes."""
    source, _, _ = sources["nanochat"]
    (path,) = source.glob("model_*.pt")
    folder = linked(source, tmp_path / "source", path.name)
    held = torch.load(path, weights_only=True)
    name = "transformer.wte.weight"
    shape = held[name].shape
    bad = {
        "stride 0": lambda: torch.zeros(1).expand(shape),
        "overlapping": lambda: torch.zeros(shape[0] + shape[1]).as_strided(shape, (1, 1)),
        "absurd storage": lambda: torch.zeros(1).expand(2**40, shape[1]),
        "negative": lambda: torch.zeros(1).expand(0, shape[1]),
        "meta": lambda: torch.zeros(shape, device="meta"),
        "sparse": lambda: torch.zeros(shape).to_sparse(),
        "nested": lambda: {"x": [torch.zeros(1)] * 3},
    }
    torch.save({**held, name: bad[kind](), "resid_lambdas": torch.ones(1).expand(2**40)}, folder / path.name)
    assert "tensor" in outcome(import_nanochat, folder) or kind in ("negative", "meta", "sparse")
    # a view of a whole matrix is one
    torch.save({**held, name: held[name].T.contiguous().T}, folder / path.name)
    assert outcome(import_nanochat, folder) == "taken"


@pytest.mark.parametrize("kind", ["gpt-oss", "nanochat of transformers"])
def test_mutated_headers_and_indexes(kind, sources, tmp_path):
    source, _, read = sources[kind]
    folder = linked(source, tmp_path / "source", "model.safetensors")
    content, random_ = (source / "model.safetensors").read_bytes(), random.Random(21)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for number in range(1000):
        if number % 2:
            text = mutated_json(random_, header)
            changed = len(text).to_bytes(8, "little") + text + content[8 + length :]
        else:
            changed = mutated_bytes(random_, content, 0, 8 + length)
        (folder / "model.safetensors").write_bytes(changed)
        try:
            outcome(read, folder)
        except Exception as error:
            raise AssertionError(f"{number}: {type(error).__name__}: {error}: {changed[:2000]}") from error
    shutil.copy(source / "model.safetensors", folder / "model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(header, "model.safetensors")}
    del index["weight_map"]["__metadata__"]
    for _ in range(1000):
        (folder / "model.safetensors.index.json").write_bytes(mutated_json(random_, index))
        outcome(read, folder)


@pytest.mark.parametrize("kind", ["gpt-oss", "nanochat"])
@pytest.mark.parametrize("how", ["fifo", "folder", "zero"])
def test_what_is_no_file(kind, how, sources, tmp_path):
    """A pipe would be waited for, /dev/zero never ends."""
    source, _, read = sources[kind]
    for number, name in enumerate(path.name for path in source.iterdir() if path.suffix != ".jinja"):
        folder = linked(source, tmp_path / str(number), name)
        target = folder / name
        {"fifo": os.mkfifo, "folder": os.mkdir, "zero": lambda path: os.symlink("/dev/zero", path)}[how](target)
        told = outcome(read, folder)
        assert name in told or "holds no" in told or name == "generation_config.json", told


def test_two_thousand_mutated_histories(tmp_path):
    history = extended_history(tmp_path, "import hf", {"widths": [1, 2]}, "Hugging Face")
    history += extended_history(tmp_path, "graft", {"pattern": "TM"}, "canonical")
    random_ = random.Random(21)
    for _ in range(2000):
        (tmp_path / "surgery.json").write_bytes(mutated_json(random_, history))
        outcome(read_history, tmp_path)
    (tmp_path / "surgery.json").unlink()
    os.mkfifo(tmp_path / "surgery.json")
    with pytest.raises(CheckpointError, match=r"surgery\.json: is no regular file"):
        read_history(tmp_path)
