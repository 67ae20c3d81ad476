"""Saving in the background: what it waits for, what it copies, and how it fails."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from megatron_adamba.checkpoint.background import BackgroundSaver
from megatron_adamba.checkpoint.rectangles import Fragment, Placement
from megatron_adamba.errors import StorageError


def fragment(values: torch.Tensor) -> Fragment:
    return Fragment(values.flatten(), 0, Placement(tuple(values.shape), tuple(values.shape)))


class Writer:
    """In the place of the disk: waits to be let go, keeps what it was given."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.go, self.seen, self.failure = threading.Event(), [], failure

    def __call__(self, root, step, fragments, state, group) -> Path:
        assert self.go.wait(20)
        self.seen.append({name: part.pieces[(0, 0)].clone() for name, part in fragments.items()})
        if self.failure is not None:
            raise self.failure
        return root / str(step)


def test_training_goes_on_while_the_disk_is_slow(tmp_path):
    writer = Writer()
    saver = BackgroundSaver(None, writer)
    weight = torch.ones(3, 4)
    saver.start(tmp_path, 7, {"weight/x": fragment(weight)}, {})
    assert writer.seen == []
    weight.zero_()  # the next step
    writer.go.set()
    assert saver.finish() == tmp_path / "7"
    assert torch.equal(writer.seen[0]["weight/x"], torch.ones(3, 4))
    assert saver.finish() is None


def test_a_second_checkpoint_waits_for_the_first(tmp_path):
    writer = Writer()
    saver = BackgroundSaver(None, writer)
    saver.start(tmp_path, 1, {"weight/x": fragment(torch.ones(1, 1))}, {})
    second = threading.Thread(target=saver.start, args=(tmp_path, 2, {"weight/x": fragment(torch.ones(1, 1))}, {}))
    second.start()
    second.join(0.2)
    assert second.is_alive() and writer.seen == []
    writer.go.set()
    second.join(20)
    assert saver.finish() == tmp_path / "2" and len(writer.seen) == 2


def test_a_failure_is_seen_and_raised_once(tmp_path):
    writer = Writer(StorageError("disk full"))
    saver = BackgroundSaver(None, writer)
    saver.start(tmp_path, 1, {"weight/x": fragment(torch.ones(1, 1))}, {})
    assert not saver.failed
    writer.go.set()
    with pytest.raises(StorageError, match="disk full"):
        saver.finish()
    assert not saver.failed and saver.finish() is None
