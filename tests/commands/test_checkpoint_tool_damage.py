"""tools/checkpoint.py on damaged checkpoints and on ones with a trap inside."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import BIG, GAIN, INDEX, edit_json, refused, save_as, seal, spoil_value
from torch import Tensor


def test_whole_checkpoints_are_ok(call, run):
    for path in (run / "checkpoints", run / "checkpoints" / "step-00000005", run / "model"):
        code, out, err = call("verify", path)
        assert (code, err) == (0, "") and out.startswith("OK: ") and out.count("\n") == 1


def flip(folder: Path) -> str:
    path = folder / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    return "__1_0.distcp: damaged (checksum differs)"


def truncate(folder: Path) -> str:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    return "__0_0.distcp: "


def lose(name: str) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        (folder / name).unlink()
        return name

    damage.__name__ = f"lose {name}"
    return damage


def edit_metadata(change: Callable[[dict], str]) -> Callable[[Path], str]:
    """Change the tensors of `metadata.json`, and its checksum with it."""

    def damage(folder: Path) -> str:
        said: list[str] = []
        edit_json(folder / "metadata.json", lambda values: said.append(change(values["tensors"])))
        seal(folder)
        return said[0]

    damage.__name__ = change.__name__
    return damage


EMBEDDING, UP = "weight/embedding.weight", "exp_avg/blocks.0.mlp.up.up_weight"


def cut_weight(tensors: dict) -> str:
    """One that several chunks share."""
    return next(name for name, held in tensors.items() if name.startswith("weight/") and len(held["chunks"]) > 1)


def missing_chunk(tensors: dict) -> str:
    name = cut_weight(tensors)
    lost, whole = tensors[name]["chunks"].pop(1)["size"], tensors[name]["shape"]
    return f"{name}: its chunks hold {math.prod(whole) - math.prod(lost):,} of {math.prod(whole):,} elements"


def missing_tensor(tensors: dict) -> str:
    del tensors["weight/final_norm.gain"]
    return "has no tensor final_norm.gain"


def overlapping_chunk(tensors: dict) -> str:
    """As many elements as before, one row of them twice and one not at all."""
    name = cut_weight(tensors)
    tensors[name]["chunks"][1]["offset"][0] -= 1
    return f"{name}: its chunks of "


def repeated_chunk(tensors: dict) -> str:
    tensors[UP]["chunks"] *= 2
    return f"{UP}: its chunks of "


def chunk_beyond_the_tensor(tensors: dict) -> str:
    tensors[UP]["chunks"][0]["offset"] = [1, 0]
    return f"{UP}: the chunk of size"


def chunk_beyond_the_file(tensors: dict) -> str:
    chunk = max((c for t in tensors.values() for c in t["chunks"]), key=lambda chunk: chunk["start"])
    chunk["length"] += 1
    return f"{chunk['file']}: "


def chunk_of_another_tensor(tensors: dict) -> str:
    first, second = (tensors[name]["chunks"][0] for name in (EMBEDDING, "exp_avg/embedding.weight"))
    assert first["size"] == second["size"] and first["file"] == second["file"]
    second["start"] = first["start"]
    return "overlaps the chunk before it"


def wrong_dtype(tensors: dict) -> str:
    tensors[UP]["dtype"] = "torch.bfloat16"
    return f"{UP} is not the torch.bfloat16"


def unknown_dtype(tensors: dict) -> str:
    tensors[UP]["dtype"] = "torch.load"
    return "metadata.json: damaged"


def other_folder(tensors: dict) -> str:
    tensors[UP]["chunks"][0]["file"] = "../__0_0.distcp"
    return "leaves the folder"


def huge_shape(tensors: dict) -> str:
    tensors[UP]["shape"] = tensors[UP]["chunks"][0]["size"] = [10**9, 10**6]
    tensors[UP]["chunks"] = tensors[UP]["chunks"][:1]
    tensors[UP]["chunks"][0]["offset"] = [0, 0]
    return "is too short for 4000000000000000 bytes"


def unlisted_file(folder: Path) -> str:
    edit_json(folder / "files.json", lambda marks: marks.pop("__1_0.distcp"))
    return "files.json: does not list __1_0.distcp"


def other_model(folder: Path) -> str:
    edit_json(folder / "state.json", lambda values: values["config"]["model"].update(mamba_d_conv=3))
    seal(folder)
    return "blocks.1.mixer.conv1d.weight has shape (96, 4)"


def no_zip_inside(folder: Path) -> str:
    """The checksums agree, and yet what lies there is no tensor."""
    chunk = json.loads((folder / "metadata.json").read_text())["tensors"][UP]["chunks"][0]
    content = bytearray((folder / chunk["file"]).read_bytes())
    content[chunk["start"] : chunk["start"] + chunk["length"]] = b"x" * chunk["length"]
    (folder / chunk["file"]).write_bytes(content)
    seal(folder)
    return f"{chunk['file']}: {UP} cannot be read"


DAMAGES = [
    *(flip, truncate, unlisted_file, other_model, no_zip_inside),
    *map(lose, ("__0_0.distcp", "metadata.json", "state.json", "files.json")),
    *map(edit_metadata, (missing_chunk, missing_tensor, overlapping_chunk, repeated_chunk, chunk_beyond_the_tensor)),
    *map(edit_metadata, (chunk_beyond_the_file, chunk_of_another_tensor, wrong_dtype, unknown_dtype, other_folder)),
    edit_metadata(huge_shape),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_verify_names_the_damage_of_a_training_checkpoint(call, two_ranks, tmp_path, damage):
    folder = tmp_path / "step"
    shutil.copytree(two_ranks / "checkpoints" / "step-00000010", folder)
    said = damage(folder)
    refused(call("verify", folder), 5, folder, said)
    if damage.__name__ not in ("unlisted_file", "no_zip_inside", "wrong_dtype"):  # the weights themselves are whole
        refused(call("convert", folder, tmp_path / "model"), 5, folder, said)
        assert not (tmp_path / "model").exists()


def change_tensors(change: Callable[[str, Tensor], Tensor | None], said: str) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        save_as(folder, folder, change)
        return said

    damage.__name__ = said
    return damage


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def cut_shard(folder: Path) -> str:
    path = shard_of(folder, "embedding.weight")
    path.write_bytes(path.read_bytes()[:-4])
    return f"{path.name}: damaged"


def longer_shard(folder: Path) -> str:
    path = shard_of(folder, "embedding.weight")
    path.write_bytes(path.read_bytes() + bytes(4))
    return f"{path.name}: damaged"


def lose_shard(folder: Path) -> str:
    path = shard_of(folder, "embedding.weight")
    path.unlink()
    return f"{path.name}: missing"


def stray_shard(folder: Path) -> str:
    shutil.copy(shard_of(folder, "embedding.weight"), folder / "model-00009-of-00009.safetensors")
    return "model-00009-of-00009.safetensors: is not in"


def index_without_a_tensor(folder: Path) -> str:
    edit_json(folder / INDEX, lambda values: values["weight_map"].pop("embedding.weight"))
    return "holds embedding.weight, which"


def index_with_another_tensor(folder: Path) -> str:
    edit_json(folder / INDEX, lambda v: v["weight_map"].update(more=v["weight_map"]["embedding.weight"]))
    return "has no tensor more"


def index_with_another_total(folder: Path) -> str:
    edit_json(folder / INDEX, lambda values: values["metadata"].update(total_size=8))
    return "says 8 bytes of tensors"


def index_that_is_a_list(folder: Path) -> str:
    (folder / INDEX).write_text("[]")
    return f"{INDEX}: damaged"


def config_of_another_model(folder: Path) -> str:
    edit_json(folder / "config.json", lambda values: values["model"].update(linear_bias=True))
    return "has no tensor blocks.0.attention.qkv.q_bias"


def config_that_is_damaged(folder: Path) -> str:
    edit_json(folder / "config.json", lambda values: values["model"].update(nest=[{"width": 32}]))
    return "config.json: the model section is damaged"


CANONICAL_DAMAGES = [
    *map(lose, ("config.json", INDEX)),
    *(cut_shard, longer_shard, lose_shard, stray_shard),
    *(index_without_a_tensor, index_with_another_tensor, index_with_another_total, index_that_is_a_list),
    *(config_of_another_model, config_that_is_damaged),
    change_tensors(lambda name, t: None if name == GAIN else t, f"has no tensor {GAIN}"),
    change_tensors(lambda name, t: t[:2] if name == GAIN else t, f"{GAIN} has shape (2,)"),
    change_tensors(lambda name, t: t.T.clone() if name == BIG else t, f"{BIG} has shape (32, 164)"),
    change_tensors(spoil_value(BIG, (163, 31), math.nan), f"{BIG} has 1 values that are not finite, nan at (163, 31)"),
    change_tensors(spoil_value(GAIN, (1,), -math.inf), f"{GAIN} has 1 values that are not finite, -inf at (1,)"),
]


@pytest.mark.parametrize("damage", CANONICAL_DAMAGES, ids=lambda damage: damage.__name__)
def test_verify_names_the_damage_of_a_canonical_checkpoint(call, two_ranks, tmp_path, damage):
    folder = save_as(two_ranks / "model", tmp_path / "model", lambda name, tensor: tensor)
    assert call("verify", folder)[0] == 0
    said = damage(folder)
    refused(call("verify", folder), 5, folder, said)


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def traps(marker: Path) -> dict[str, bytes]:
    """Every format that torch.load or pickle.load would open."""
    made = {"pickle": pickle.dumps(Trap(marker))}
    for kind, zipped in (("zip", True), ("legacy", False)):
        stream = io.BytesIO()
        torch.save({"weights": torch.ones(3), "trap": Trap(marker)}, stream, _use_new_zipfile_serialization=zipped)
        made[kind] = stream.getvalue()
    return made


def test_the_traps_are_live(tmp_path):
    for kind, content in traps(tmp_path / "marker").items():
        pickle.loads(content) if kind == "pickle" else torch.load(io.BytesIO(content), weights_only=False)
        (tmp_path / "marker").rmdir()


def replace_in(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


def put_into_every_chunk(folder: Path, name: str, content: bytes) -> None:
    """Behind the tensors of a file, and all its chunks say that they lie there, each in a copy of its own."""

    def change(values: dict) -> None:
        with open(folder / name, "ab") as stream:
            for chunk in (chunk for held in values["tensors"].values() for chunk in held["chunks"]):
                if chunk["file"] == name:
                    chunk["start"], chunk["length"] = stream.tell(), len(content) + math.prod(chunk["size"]) * 4
                    stream.write(content + bytes(math.prod(chunk["size"]) * 4))

    edit_json(folder / "metadata.json", change)


FILES = ("__0_0.distcp", "__1_0.distcp", "metadata.json", "state.json", "files.json")
PLACES = [(name, replace_in) for name in FILES] + [(name, put_into_every_chunk) for name in FILES[:2]]


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
@pytest.mark.parametrize(("name", "put"), PLACES, ids=[f"{put.__name__} {name}" for name, put in PLACES])
def test_a_trap_in_a_training_checkpoint_is_not_sprung(call, two_ranks, tmp_path, name, put, kind):
    folder, marker = tmp_path / "checkpoints" / "step-00000010", tmp_path / "marker"
    shutil.copytree(two_ranks / "checkpoints" / "step-00000010", folder)
    (folder.parent / "latest").write_text(folder.name)
    put(folder, name, traps(marker)[kind])
    if name != "files.json":
        seal(folder)
    for words in (("verify",), ("convert", tmp_path / "model"), ("diff", two_ranks / "checkpoints", "--all")):
        command, *rest = words
        result = call(command, folder.parent, *rest)
        if (command, name) != ("diff", "files.json"):  # reads no checksums
            assert result[0] == 5 and result[2].startswith("error: ") and result[2].count("\n") == 1, result
        assert not marker.exists() and not (tmp_path / "model").exists()
    call("inspect", folder)
    assert not marker.exists()


def test_a_trap_beside_the_files_is_not_looked_at(call, two_ranks, tmp_path):
    """torch's own `.metadata` is a pickle: nobody here reads it; `latest` is a name or nothing."""
    folder, marker = tmp_path / "checkpoints" / "step-00000010", tmp_path / "marker"
    shutil.copytree(two_ranks / "checkpoints" / "step-00000010", folder)
    content = traps(marker)["pickle"]
    (folder / ".metadata").write_bytes(content)
    assert call("verify", folder)[0] == 0 and call("convert", folder, tmp_path / "model")[0] == 0
    (folder.parent / "latest").write_bytes(content)
    refused(call("verify", folder.parent), 5, folder.parent / "latest")
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00001-of-00001.safetensors"])
def test_a_trap_in_a_canonical_checkpoint_is_not_sprung(call, two_ranks, tmp_path, name, kind):
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(two_ranks / "model", folder)
    (folder / name).write_bytes(traps(marker)[kind])
    for words in (("verify", folder), ("inspect", folder), ("diff", two_ranks / "model", folder)):
        refused(call(*words), 5, name)
    refused(call("convert", folder, tmp_path / "start"), 5, name)
    assert not marker.exists() and not (tmp_path / "start").exists()
