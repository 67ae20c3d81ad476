"""Saving and resuming a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_adamba.blueprint.gates import gate_manifest
from megatron_adamba.checkpoint.background import BackgroundSaver
from megatron_adamba.checkpoint.canonical import canonical_from_training
from megatron_adamba.checkpoint.training import (
    read_state,
    together,
    verify_files,
)
from megatron_adamba.engine.state import own_fragments, restore
from megatron_adamba.errors import CheckpointError
from megatron_adamba.training.phase_change import describe_phase_change
from megatron_adamba.training.run import Run
from megatron_adamba.training.start import checkpoint_root


def start_saving(run: Run, saver: BackgroundSaver, counters: dict[str, Any]) -> None:
    """Training may go on when this returns. counters: the trainer's own JSON values, `step` among them."""
    fragments = own_fragments(run.session)
    if run.gates is not None and run.gates.writes:
        fragments |= run.gates.fragments()
    config = run.plan.config.to_dict()
    config["tokenizer_hash"] = run.plan.tokenizer.hash
    state = {"counters": dict(counters), "config": config, "history": run.history}
    keep = run.plan.config.checkpoint.keep_last
    saver.start(checkpoint_root(run.plan.config), counters["step"], fragments, state, keep)


def resume(run: Run, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Verify, compare and load; every rank fails where one does, before anything is changed.

    Returns the trainer's counters, and lines for people: a change of phase, and what became of optimizer state.
    """
    together(lambda: verify_files(folder, (dist.get_rank(), dist.get_world_size())))
    state = together(lambda: _checked_state(run, folder))
    gates = {spec.name for spec in gate_manifest(run.plan.config.model)}
    counters, run.history = state["counters"], state.get("history", [])
    change = describe_phase_change(run.plan.specs, state["config"].get("train"), run.plan.config.train)
    report = restore(run.session, folder, counters["optimizer_steps"])
    report["dropped"] = [name for name in report["dropped"] if name.partition("/")[2] not in gates]
    if state["config"]["model"].get("gate_size"):
        together(lambda: None if run.gates is None else run.gates.restore(folder, counters.get("gate_steps", 0)))
    lines = [change] if change else []
    if change or report["reset"] or report["dropped"]:
        lines += [
            f"optimizer state {what}: {len(names)} tensors, {names[0]} first" for what, names in report.items() if names
        ]
    return counters, lines


def _checked_state(run: Run, folder: Path) -> dict[str, Any]:
    state = read_state(folder)
    ours, theirs = run.plan.config.to_dict()["model"], state["config"]["model"]
    if not theirs.get("gate_size"):
        theirs = theirs | {"gate_size": ours["gate_size"]}
    if theirs["gate_size"] and not ours["gate_size"]:
        raise CheckpointError(
            f"{folder}: holds gates, which this run leaves out; add --model.gate_size {theirs['gate_size']} to carry "
            "them along"
        )
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise CheckpointError(f"{folder}: was trained with model.{key} {theirs.get(key)}, this run has {value}")
    if state["config"]["tokenizer_hash"] != run.plan.tokenizer.hash:
        raise CheckpointError(f"{folder}: was trained with another tokenizer; give --data.tokenizer of that run")
    return state


def write_final_model(run: Run, checkpoint: Path) -> Path:
    """The run's canonical checkpoint, `RUN/model`, converted by rank 0 from what was just saved."""
    folder = run.run_dir / "model"
    together(lambda: canonical_from_training(checkpoint, folder) if dist.get_rank() == 0 else None)
    return folder
