"""Weights and optimizer state of this rank as fragments of canonical tensors, for every kind of DeepSpeed optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_adamba.checkpoint.canonical import WEIGHT_PREFIX
from megatron_adamba.checkpoint.rectangles import Fragment, Placement, placement
from megatron_adamba.checkpoint.training import held_dtypes, load_fragments
from megatron_adamba.engine.frozen import saves
from megatron_adamba.engine.session import TrainingSession


@dataclass(frozen=True)
class Piece:
    """A slice of one of the optimizer's flat tensors that belongs to one parameter."""

    flat: Tensor
    """what the optimizer steps: a flat partition, or the parameter itself at stage 0"""
    low: int
    numel: int
    start: int
    """first element's place in the whole parameter"""

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.detach().view(-1)[self.low : self.low + self.numel]


def training_fragments(session: TrainingSession) -> dict[str, Fragment]:
    """`weight/NAME`, and `exp_avg/NAME`, `exp_avg_sq/NAME` where the parameter trains."""
    _make_optimizer_state(session)
    fragments: dict[str, Fragment] = {}
    places = _placements(session)
    for name, parameter in session.module.named_parameters():
        place = places[name]
        assert place.local_shape == tuple(getattr(parameter, "ds_shape", parameter.shape)), name
        if not parameter.requires_grad:
            flat, start = session.frozen.piece(name, parameter)
            fragments[WEIGHT_PREFIX + name] = Fragment(flat, start, place)
            continue
        piece = trained_piece(session, parameter)
        empty = torch.empty(0)
        fragments[WEIGHT_PREFIX + name] = Fragment(
            piece.of(piece.flat) if piece else empty, piece.start if piece else 0, place
        )
        for key in _state_keys(session, parameter):
            flat = piece.of(session.optimizer.state[piece.flat][key]) if piece else empty
            fragments[f"{key}/{name}"] = Fragment(flat, piece.start if piece else 0, place)
    return fragments


def _placements(session: TrainingSession) -> dict[str, Placement]:
    return {spec.name: placement(spec, *session.module.share_of(spec)) for spec in session.specs}


@dataclass(frozen=True)
class Restored:
    """What became of optimizer state, by tensor; of all pipeline stages together."""

    kept: list[str]
    reset: list[str]
    """trains, and the checkpoint holds none of its state, or that of another optimizer"""
    dropped: list[str]
    starts: dict[str, int]
    """optimizer step at which a parameter's state began, where that is not the run's first"""


def restore(
    session: TrainingSession, folder: Path, optimizer_steps: int, starts: Mapping[str, int] | None = None
) -> Restored:
    """Fill weights and optimizer state from a training checkpoint of any layout.

    The state of a parameter is taken whole or begins anew, with a step count of its own. optimizer_steps: how often the
    optimizer has stepped; starts: as the checkpoint was saved with.
    """
    held = held_dtypes(folder)
    exact = {name for name, dtype in held.items() if name.startswith(WEIGHT_PREFIX) and dtype == torch.float32}
    session.frozen.make_room(session.module, {name.removeprefix(WEIGHT_PREFIX) for name in exact})
    fragments = training_fragments(session)
    trained = {name: parameter for name, parameter in session.module.named_parameters() if parameter.requires_grad}
    states = _states_held(held)
    kept = [name for name, parameter in trained.items() if states.get(name) == set(_state_keys(session, parameter))]
    taken = {WEIGHT_PREFIX + name for name, _ in session.module.named_parameters()}
    taken |= {f"{key}/{name}" for name in kept for key in _state_keys(session, trained[name])}
    dropped = load_fragments(folder, {name: part for name, part in fragments.items() if name in taken})
    group = session.topology.group("pp") if session.topology.size("pp") > 1 else None
    if group is not None:
        dropped = _asked_by_nobody(dropped, group)
        kept = _of_all_stages(kept, group)
    session.frozen.refresh(session.module)
    begun = {name: start for name, start in (starts or {}).items() if name in kept}
    everyone = list(trained) if group is None else _of_all_stages(list(trained), group)
    begun |= dict.fromkeys(set(everyone) - set(kept), optimizer_steps) if optimizer_steps else {}
    _set_steps(session, {name: optimizer_steps - begun.get(name, 0) for name in trained})
    _refresh_low_precision(session)
    tensors = [f"{key}/{name}" for name, parameter in trained.items() for key in _state_keys(session, parameter)]
    tensors = tensors if group is None else _of_all_stages(tensors, group)
    took = [name for name in tensors if name.partition("/")[2] in kept]
    return Restored(sorted(took), sorted(set(tensors) - set(took)), dropped, begun)


def _states_held(held: Iterable[str]) -> dict[str, set[str]]:
    """Parameter -> keys of its optimizer state in a checkpoint."""
    states: dict[str, set[str]] = {}
    for key in held:
        kind, _, name = key.partition("/")
        if f"{kind}/" != WEIGHT_PREFIX:
            states.setdefault(name, set()).add(kind)
    return states


def _set_steps(session: TrainingSession, counts: Mapping[str, int]) -> None:
    """counts: steps that each trained parameter's state has seen."""
    by_flat: dict[Tensor, list[tuple[slice, int]]] = {}
    for name, parameter in session.module.named_parameters():
        piece = trained_piece(session, parameter) if name in counts else None
        if piece is not None:
            part = slice(piece.low, piece.low + piece.numel)
            by_flat.setdefault(piece.flat, []).append((part, counts[name]))
    for flat, parts in by_flat.items():
        session.optimizer.set_steps(flat, parts)
    for flat, state in session.optimizer.state.items():
        if "step" in state and flat not in by_flat:
            # a partition of padding, or of a filler
            state["step"].fill_(float(max(counts.values(), default=0)))


def _of_all_stages(names: list[str], group: dist.ProcessGroup) -> list[str]:
    """Names of this pipeline stage and of the others."""
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, names, group=group)
    return sorted(set().union(*everyone))


def _asked_by_nobody(names: list[str], group: dist.ProcessGroup | None) -> list[str]:
    """Of names that each pipeline stage left in a checkpoint, those that all of them left."""
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, names, group=group)
    return sorted(set.intersection(*map(set, everyone)))


def _state_keys(session: TrainingSession, parameter: nn.Parameter) -> tuple[str, ...]:
    return ("exp_avg",) if session.group_of(parameter)["use_muon"] else ("exp_avg", "exp_avg_sq")


def _flat_tensors(session: TrainingSession) -> list[list[Tensor]]:
    """Per parameter group: what the optimizer really steps."""
    optimizer = session.engine.optimizer
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return [[flat] for flat in optimizer.fp32_groups_flat_partition]
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return [[flat] for flat in optimizer.single_partition_of_fp32_groups]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        groups: list[list[Tensor]] = [[] for _ in session.optimizer.param_groups]
        for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            groups[optimizer.sub_group_to_group_id[number]].append(flat)
        return groups
    return [list(group["params"]) for group in session.optimizer.param_groups]


def _make_optimizer_state(session: TrainingSession) -> None:
    """State that a first step would make, so that a fresh engine has somewhere to load into."""
    for group, flats in zip(session.optimizer.param_groups, _flat_tensors(session)):
        for flat in flats:
            state: dict[str, Any] = session.optimizer.state[flat]
            if "exp_avg" in state:
                continue
            state["exp_avg"] = torch.zeros_like(flat)
            if not group["use_muon"]:
                state["exp_avg_sq"] = torch.zeros_like(flat)
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)


def trained_piece(session: TrainingSession, parameter: Any) -> Piece | None:
    """Where the optimizer steps a trainable parameter; None where this rank holds nothing of it."""
    optimizer = session.engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        group, low, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = dist.get_rank(parameter.ds_process_group) * size
        numel = min(size, parameter.ds_numel - start)
        return Piece(optimizer.fp32_partitioned_groups_flat[group], low, numel, start) if numel > 0 else None
    if hasattr(parameter, "_hp_mapping"):
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = _flat_tensors(session)[mapping.param_group_index][0]
        address = mapping.hp_fragment_address
        return Piece(flat, address.start, address.numel, mapping.lp_fragment_address.start)
    return Piece(parameter, 0, parameter.numel(), 0)


def own_fragments(session: TrainingSession) -> dict[str, Fragment]:
    """`training_fragments` for saving, where of several ranks that hold the same elements the first one writes them."""
    specs = {spec.name: spec for spec in session.specs}
    parameters = dict(session.module.named_parameters())
    fragments = training_fragments(session)
    for key, part in fragments.items():
        name = key.partition("/")[2]
        parameter = parameters[name]
        partitioned = hasattr(parameter, "ds_tensor") or (parameter.requires_grad and session.stage > 0)
        if not saves(specs[name], partitioned, session.topology) or getattr(parameter, "ds_pipe_replicated", False):
            empty = torch.empty(0, dtype=part.dtype, device=part.device)
            fragments[key] = Fragment(empty, 0, Placement(tuple(part.shape), tuple(part.shape)))
    return fragments


def _refresh_low_precision(session: TrainingSession) -> None:
    """Copy the restored fp32 weights into the model's own and share them between ranks."""
    optimizer = session.engine.optimizer
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for high, low in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat):
            low.data.copy_(high.data)
        for parameter in _persistent(session.module.parameters()):
            parameter.all_gather([parameter])


def _persistent(parameters: Iterator[nn.Parameter]) -> list[Any]:
    """Parameters, with what DeepSpeed adds to them, that ZeRO 3 keeps whole: their gathered copy has to follow."""
    return [parameter for parameter in parameters if getattr(parameter, "ds_persist", False)]
