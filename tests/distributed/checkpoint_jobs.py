"""Jobs about checkpoints between layouts: every rank saves, or loads and looks at what it got."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from curve import build_session, run_config, take_steps

from megatron_adamba.checkpoint.rectangles import Fragment, Placement
from megatron_adamba.checkpoint.training import save_training_checkpoint
from megatron_adamba.engine.session import TrainingSession
from megatron_adamba.engine.state import own_fragments, restore, training_fragments
from megatron_adamba.parallel.layout import cut

STEPS = 10


def canonical_value(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A random tensor that anybody can make from its name; second moments are positive."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "little")
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.abs_() if key.startswith("exp_avg_sq/") else values


def _session(info, setup: dict[str, Any], layout: dict[str, Any]) -> TrainingSession:
    return build_session(info, run_config(**setup["arguments"]), freeze=setup["freeze"], **layout)


def write_reference(info, setup: dict[str, Any], folder: str) -> None:
    """One rank at ZeRO 1 saves a state of random numbers."""
    session = _session(info, setup, {"stage": 1})
    fragments = training_fragments(session)
    for key, fragment in fragments.items():
        whole = canonical_value(key, tuple(fragment.shape))
        for offset, piece in fragment.pieces.items():
            piece.copy_(_box(whole, offset, piece.shape))
    save_training_checkpoint(Path(folder), STEPS, fragments, {"counters": {}})


def _box(whole: torch.Tensor, offset: tuple[int, ...], size: torch.Size) -> torch.Tensor:
    return whole[tuple(slice(low, low + length) for low, length in zip(offset, size))]


def load_and_save(info, setup: dict[str, Any], layout: dict[str, Any], source: str, folder: str) -> list[str]:
    """Load the random state, compare every fragment and every weight in use with it, save it again; what differs."""
    session = _session(info, setup, layout)
    restore(session, Path(source), STEPS)
    wrong = []
    for key, fragment in training_fragments(session).items():
        whole = canonical_value(key, tuple(fragment.shape))
        if not all(torch.equal(piece, _box(whole, offset, piece.shape)) for offset, piece in fragment.pieces.items()):
            wrong.append(key)
    wrong += _weights_in_use(session)
    save_training_checkpoint(Path(folder), STEPS, own_fragments(session), {"counters": {}})
    return wrong


def _weights_in_use(session: TrainingSession) -> list[str]:
    """Parameters that the model computes with and that are not the canonical ones; ZeRO 3 holds parts of them."""
    wrong = []
    for spec in session.specs:
        parameter = session.module.get_parameter(spec.name)
        shard = cut(spec, canonical_value(f"weight/{spec.name}", spec.shape), *session.module.share_of(spec))
        if hasattr(parameter, "ds_tensor"):
            part = parameter.ds_tensor
            start = part.numel() * session.topology.place("edp" if spec.group == "expert" else "dp")
            shard = shard.flatten()[start : start + part.numel()]
            held = part.flatten()[: shard.numel()]
        else:
            held = parameter
        if not torch.equal(held.detach(), shard):
            wrong.append(f"{spec.name} in use")
    return wrong


def train_and_save(info, setup: dict[str, Any], layout: dict[str, Any], folder: str) -> list[tuple[float, float]]:
    """The first ten steps, and a checkpoint."""
    session = _session(info, setup, layout)
    curve = take_steps(info, session, run_config(**setup["arguments"]), 0, STEPS)
    save_training_checkpoint(Path(folder), STEPS, own_fragments(session), {"counters": {}})
    return curve


def load_and_train(info, setup: dict[str, Any], layout: dict[str, Any], source: str) -> list[tuple[float, float]]:
    """The ten steps after them."""
    session = _session(info, setup, layout)
    restore(session, Path(source), STEPS)
    return take_steps(info, session, run_config(**setup["arguments"]), STEPS, 2 * STEPS)


def save_one_tensor(info, folder: str) -> None:
    """weight/x [4, 3] holds 0 to 11."""
    x = Fragment(torch.arange(12.0), 0, Placement((4, 3), (4, 3)))
    save_training_checkpoint(Path(folder), 1, {"weight/x": x}, {"counters": {}})
