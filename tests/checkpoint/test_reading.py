"""Damage that checksums do not show: lists that agree with each other and not with the tensors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from megatron_adamba.checkpoint.rectangles import Fragment, Placement
from megatron_adamba.checkpoint.training import latest_checkpoint, load_fragments, read_state, verify_files
from megatron_adamba.errors import CheckpointError


@pytest.fixture
def saved(workers, tmp_path):
    """A checkpoint of one tensor, weight/x [4, 3], in one chunk."""
    workers(1).run("checkpoint_jobs", "save_one_tensor", folder=str(tmp_path))
    return tmp_path / "step-00000001"


def fragment() -> Fragment:
    return Fragment(torch.full((12,), -1.0), 0, Placement((4, 3), (4, 3)))


def edit(path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_the_whole_one_loads(saved):
    verify_files(saved)
    target = fragment()
    load_fragments(saved, {"weight/x": target})
    assert torch.equal(target.pieces[(0, 0)].flatten(), torch.arange(12.0))


def test_a_tensor_that_no_chunk_covers_is_not_loaded(saved):
    edit(saved / "metadata.json", lambda values: values["tensors"]["weight/x"]["chunks"].clear())
    target = fragment()
    with pytest.raises(CheckpointError, match="weight/x"):
        load_fragments(saved, {"weight/x": target})
    assert (target.pieces[(0, 0)] == -1).all()


def test_a_file_without_a_checksum_is_refused(saved):
    file = next(saved.glob("*.distcp"))
    shutil.copy(file, saved / "other.distcp")
    edit(saved / "metadata.json", lambda values: values["tensors"]["weight/x"]["chunks"][0].update(file="other.distcp"))
    with pytest.raises(CheckpointError, match=r"does not list other\.distcp"):
        verify_files(saved)


@pytest.mark.parametrize("name", ["state.json", "metadata.json"])
def test_lists_nested_without_end_are_damaged(saved, name):
    (saved / name).write_text("[" * 100000)
    with pytest.raises(CheckpointError, match=name):
        read_state(saved) if name == "state.json" else load_fragments(saved, {"weight/x": fragment()})


def test_a_latest_that_is_no_text(saved):
    (saved.parent / "latest").write_bytes(b"\xff\xfe\x00 step")
    with pytest.raises(CheckpointError, match="latest: damaged"):
        latest_checkpoint(saved.parent)
