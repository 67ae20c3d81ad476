"""Saving and resuming a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_adamba.blueprint.gates import gate_manifest
from megatron_adamba.checkpoint.background import BackgroundSaver
from megatron_adamba.checkpoint.canonical import canonical_from_training
from megatron_adamba.checkpoint.keeping import SET_ASIDE, STATE_FILE, later_than, run_id_of, set_aside
from megatron_adamba.checkpoint.training import from_first_rank, read_state, together, verify_files
from megatron_adamba.data.order import order_change
from megatron_adamba.engine.state import own_fragments, restore
from megatron_adamba.errors import CheckpointError, ConfigError
from megatron_adamba.training.phase_change import describe_phase_change
from megatron_adamba.training.run import Run
from megatron_adamba.training.start import checkpoint_root, in_own_root

FREE_TO_CHANGE = ("mamba_chunk_size", "modes", "end_tokens", "router_balance_weight", "router_z_weight")
"""settings of a model that change neither its tensors nor what it computes"""


@dataclass
class Resumed:
    """What a run that goes on knows of itself."""

    folder: Path
    counters: dict[str, Any]
    lines: list[str]
    """for people: what was passed over, a change of phase, what became of optimizer state"""


def start_saving(run: Run, saver: BackgroundSaver, counters: dict[str, Any]) -> None:
    """Training may go on when this returns. counters: the trainer's own JSON values, `step` among them."""
    fragments = own_fragments(run.session)
    if run.gates is not None and run.gates.writes:
        fragments |= run.gates.fragments()
    config = run.plan.config.to_dict()
    config["tokenizer_hash"], config["run_id"] = run.plan.tokenizer.hash, run.run_id
    state = {"counters": dict(counters), "config": config, "history": run.history}
    state |= {"optimizer_starts": run.optimizer_starts, "data_order": run.data_order}
    saver.start(checkpoint_root(run.plan.config), counters["step"], fragments, state)


def resume(run: Run, candidates: Sequence[Path]) -> Resumed:
    """Verify, compare and load the first candidate that is whole; every rank fails where one does, before anything is
    changed. What lies behind it in the run's own folder is set aside, never deleted."""
    folder, failures = first_whole(candidates)
    if folder is None:
        raise failures[0]
    lines = [f"WARNING: passed over {path}: {error}" for path, error in zip(candidates, failures)]
    state = together(lambda: _checked_state(run, folder))
    counters, run.history = state["counters"], state.get("history", [])
    lines += together(lambda: _check_order(run, state, folder, counters))
    lines += _load(run, folder, state, counters)
    config, step = run.plan.config, counters["step"]
    if in_own_root(config, folder):
        run.run_id = state["config"].get("run_id", run.run_id)
        later = from_first_rank(lambda: later_than(folder.parent, step))
        from_first_rank(lambda: set_aside(later))
        if later:
            names = ", ".join(path.name for path in later)
            lines.append(f"went back to step {step}: {names} set aside in {folder.parent / SET_ASIDE}")
    return Resumed(folder, counters, lines)


def first_whole(candidates: Sequence[Path]) -> tuple[Path | None, list[CheckpointError]]:
    """The first whose checksums agree, None where none does, and what is wrong with each before it; every rank calls
    this alike and reads its share."""
    share, failures = (dist.get_rank(), dist.get_world_size()), []
    for folder in candidates:
        try:
            together(partial(_check_whole, folder, share))
        except CheckpointError as error:
            failures.append(error)
            continue
        return folder, failures
    return None, failures


def _check_whole(folder: Path, share: tuple[int, int]) -> None:
    """Raises CheckpointError where a file is damaged, or the state is of no run."""
    verify_files(folder, share)
    state = read_state(folder)
    if "config" not in state or not {"step", "consumed_samples", "optimizer_steps"} <= set(state.get("counters", {})):
        raise CheckpointError(f"{folder / STATE_FILE}: damaged (no config or no counters); use an earlier checkpoint")


def _load(run: Run, folder: Path, state: dict[str, Any], counters: dict[str, Any]) -> list[str]:
    """Weights, optimizer state and gates; lines on what changed."""
    config = run.plan.config
    gates = {spec.name for spec in gate_manifest(config.model)}
    change = describe_phase_change(run.plan.specs, state["config"].get("train"), config.train)
    report = restore(run.session, folder, counters["optimizer_steps"], state.get("optimizer_starts", {}))
    run.optimizer_starts = report.starts
    if state["config"]["model"].get("gate_size"):
        carried = together(lambda: run.gates is None or run.gates.restore(folder, counters.get("gate_steps", 0)))
        if run.session.any_rank([not carried])[0]:
            counters["gate_steps"] = 0
    lines = [change] if change else []
    dropped = [name for name in report.dropped if name.partition("/")[2] not in gates]
    if change or report.reset or dropped:
        said = lambda names: f"{len(names)} tensors, {names[0]} first"
        lines += [f"optimizer state kept: {said(report.kept)}"] if report.kept else []
        why = f"none in the checkpoint, or another optimizer's; steps count from 0, not {counters['optimizer_steps']}"
        lines += [f"optimizer state reset: {said(report.reset)} ({why})"] if report.reset else []
        lines += [f"optimizer state dropped: {said(dropped)}"] if dropped else []
    return lines


def _check_order(run: Run, state: dict[str, Any], folder: Path, counters: dict[str, Any]) -> list[str]:
    """Whether the data still comes in the order that the run began with. Raises ConfigError where it does not."""
    theirs = state.get("data_order")
    change = None if theirs is None else order_change(theirs, run.data_order)
    if change is None:
        return []
    if not run.plan.config.data.allow_new_order:
        raise ConfigError(
            f"{change}, with which {folder.name} was trained; samples would be left out and others seen twice: set it "
            f"back, or add --data.allow_new_order true, which begins the new order at its first sample"
        )
    counters["order_start"] = counters["consumed_samples"]
    return [f"new data order from step {counters['step']} on ({change}): read from its first sample"]


def _checked_state(run: Run, folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = {**read_state(folder)}
    ours, theirs = run.plan.config.to_dict()["model"], state["config"]["model"]
    if not theirs.get("gate_size"):
        theirs = theirs | {"gate_size": ours["gate_size"]}
    if theirs["gate_size"] and not ours["gate_size"]:
        raise CheckpointError(
            f"{folder}: holds gates, which this run leaves out; add --model.gate_size {theirs['gate_size']} to carry "
            "them along"
        )
    for key, value in ours.items():
        if theirs.get(key) != value and key not in FREE_TO_CHANGE:
            raise CheckpointError(f"{folder}: was trained with model.{key} {theirs.get(key)}, this run has {value}")
    if state["config"].get("tokenizer_hash") != run.plan.tokenizer.hash:
        raise CheckpointError(f"{folder}: was trained with another tokenizer; give --data.tokenizer of that run")
    done, steps = state["counters"]["step"], run.plan.config.train.steps
    if done > steps:
        raise ConfigError(
            f"--train.steps {steps}: {folder} has made {done} already; give more than that, for example "
            f"--train.steps {2 * done}, or an earlier checkpoint"
        )
    return state


def write_final_model(run: Run, checkpoint: Path) -> Path:
    """The run's canonical checkpoint, `RUN/model`, converted by rank 0 from what was just saved; a model there that
    another run or tool wrote is set aside."""
    folder = run.run_dir / "model"
    if folder.is_dir():
        # a link to a larger disk stays one
        folder = folder.resolve()

    def convert() -> None:
        held = os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir()))
        if held and run_id_of(folder) != run.run_id:
            set_aside([folder])
        canonical_from_training(checkpoint, folder)

    from_first_rank(convert)
    return folder
