"""Two thousand mutations of each file of a checkpoint: the clean error, or a file that still is one."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from mutations import mutated_bytes, mutated_json

from megatron_adamba.blueprint.gates import stored_manifest
from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.checkpoint.canonical import CONFIG_FILE, INDEX_FILE, read_tensors, write_canonical
from megatron_adamba.checkpoint.offline import check_weights, open_checkpoint, to_training
from megatron_adamba.checkpoint.training import FILES_FILE, STATE_FILE, latest_checkpoint, verify_files
from megatron_adamba.checkpoint.verify import verify
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.root import AdambaConfig, find_tokenizer, read_model_config
from megatron_adamba.errors import AdambaError
from megatron_adamba.inference.load import load_model
from megatron_adamba.model.init import initial_tensor

MUTATIONS = 2000


TINY = {"hidden_size": 16, "vocab_size": 257, "head_dim": 4, "widths": [4, 16], "ffn_granule": 4, "ffn_size": 8}
MIXED = {"num_experts": 2, "experts_per_token": 1, "expert_ffn_size": 4, "mamba_head_dim": 8, "mamba_d_state": 4}


def written(folder, **shape):
    model = resolve_model(ModelConfig(**TINY, **shape))
    config = AdambaConfig(model=model).to_dict()
    config["data"]["tokenizer"] = "bytes"
    write_canonical(folder, config, [(spec.name, initial_tensor(spec, 3)) for spec in stored_manifest(model)])
    load_model(folder)
    return folder


@pytest.fixture(scope="module")
def canonical(tmp_path_factory):
    """Tiny, of every kind of block, with gates."""
    return written(tmp_path_factory.mktemp("canonical") / "model", block_pattern="TME", gate_size=2, **MIXED)


@pytest.fixture(scope="module")
def one_block(tmp_path_factory):
    return written(tmp_path_factory.mktemp("one") / "model", block_pattern="T")


@pytest.fixture(scope="module")
def training(canonical, tmp_path_factory):
    source = open_checkpoint(canonical)
    source.config["tokenizer_hash"] = "0" * 64
    folder = tmp_path_factory.mktemp("training") / "step-00000000"
    to_training(source, folder, 1, 1)
    verify(folder)
    return folder


def attack(folder: Path, name: str, mutate, read, seed: int, mutations: int = MUTATIONS) -> int:
    """How many mutations of a file were refused; every other failure is raised."""
    path, source, refused = folder / name, random.Random(seed), 0
    original = path.read_bytes()
    for number in range(mutations):
        content = mutate(source, original)
        path.write_bytes(content)
        try:
            read(folder)
        except AdambaError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 3000, str(error)[:300]
        except BaseException as error:
            raise AssertionError(f"mutation {number} of {name}: {content[:300]!r}") from error
    path.write_bytes(original)
    return refused


def of_json(source, original):
    return mutated_json(source, json.loads(original))


def read_canonical(folder):
    check_weights(open_checkpoint(folder))
    find_tokenizer(folder)
    read_model_config(folder)


@pytest.mark.parametrize("name", [CONFIG_FILE, INDEX_FILE])
def test_json_of_a_canonical_checkpoint(canonical, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(canonical, folder)
    assert attack(folder, name, of_json, read_canonical, 1) > MUTATIONS // 4


def test_what_a_config_says_is_loaded_or_refused(canonical, tmp_path):
    """A model that still fits its tensors runs."""
    folder = tmp_path / "model"
    shutil.copytree(canonical, folder)
    tokens = torch.arange(8)[None]

    def run(folder):
        loaded = load_model(folder, "fp32")
        with torch.no_grad():
            loaded.model(tokens)

    assert attack(folder, CONFIG_FILE, of_json, run, 2, 150) > 0


def test_a_flipped_byte_anywhere_in_a_shard_is_named(one_block, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(one_block, folder)
    (shard,) = [path.name for path in folder.glob("*.safetensors")]
    original = (folder / shard).read_bytes()

    def flipped(source, content):
        changed = bytearray(content)
        changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
        return bytes(changed)

    read = lambda folder: list(read_tensors(folder))
    # a bit of the header's own padding or metadata says nothing
    assert attack(folder, shard, flipped, read, 3) >= MUTATIONS * 0.97
    header = int.from_bytes(original[:8], "little") + 8
    attack(folder, shard, lambda source, content: mutated_bytes(source, content[:header]) + content[header:], read, 4)


@pytest.mark.parametrize("name", [STATE_FILE, FILES_FILE, "metadata.json"])
def test_json_of_a_training_checkpoint(training, tmp_path, name):
    folder = tmp_path / training.name
    shutil.copytree(training, folder)

    def read(folder):
        check_weights(open_checkpoint(folder))

    attack(folder, name, of_json, read, 5)
    assert attack(folder, name, of_json, verify_files, 6) > MUTATIONS * 0.9


def test_the_name_of_the_latest(training, tmp_path):
    shutil.copytree(training, tmp_path / training.name)
    (tmp_path / "latest").write_text(training.name)
    attack(tmp_path, "latest", mutated_bytes, latest_checkpoint, 7)
    (tmp_path / "latest").unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / training.name
    (tmp_path / "latest").mkdir()
    with pytest.raises(AdambaError, match="latest: Is a directory; "):
        latest_checkpoint(tmp_path)


def test_the_weights_of_an_unreadable_model_are_not_made(canonical, tmp_path):
    """Sizes beyond all memory end at once, whichever setting asks for them."""
    folder = tmp_path / "model"
    shutil.copytree(canonical, folder)
    values = json.loads((folder / CONFIG_FILE).read_text())
    for setting, size in (("vocab_size", 2**40), ("num_layers", 10**9), ("hidden_size", 2**50), ("num_heads", 2**45)):
        changed = json.loads(json.dumps(values))
        changed["model"][setting] = size
        (folder / CONFIG_FILE).write_text(json.dumps(changed))
        with pytest.raises(AdambaError, match=setting):
            load_model(folder)
