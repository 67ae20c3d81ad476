"""DeepSpeed's pipeline schedules played with given times: how long a step takes, who waits, what is kept meanwhile."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_adamba.blueprint.stages import StagePlan


@dataclass(frozen=True)
class Replay:
    """A step of a pipeline, from its first forward to its last backward. Times are in the unit that was given."""

    duration: float
    busy: tuple[float, ...]
    """of each rank"""
    peaks: tuple[dict[int, int], ...]
    """of each rank, by chunk: passes whose activations it kept when it kept most of them altogether"""

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they wait."""
        return 1 - sum(self.busy) / (self.duration * len(self.busy))


@dataclass
class _Rank:
    stages: StagePlan
    number: int
    commands: list
    clock: float = 0.0
    busy: float = 0.0
    at: int = 0
    counts: Counter = field(default_factory=Counter)
    queued_sends: list = field(default_factory=list)
    queued_receives: list = field(default_factory=list)
    in_flight: Counter = field(default_factory=Counter)
    peak: dict[int, int] = field(default_factory=dict)


def replay(stages: StagePlan, micro_steps: int, forward: Sequence[float], backward: Sequence[float]) -> Replay:
    """forward, backward: times of one pass through each chunk. Messages take no time; a rank waits for what it
    receives. Raises ValueError where the schedule cannot run so few passes."""
    ranks = [_Rank(stages, rank, list(_commands(stages, micro_steps, rank))) for rank in range(stages.pp)]
    sent: dict[tuple, float] = {}
    moved = True
    while moved:
        moved = False
        for rank in ranks:
            while rank.at < len(rank.commands) and _execute(rank, rank.commands[rank.at], sent, forward, backward):
                rank.at += 1
                moved = True
    assert all(rank.at == len(rank.commands) for rank in ranks), "the schedule waits for itself"
    duration = max(rank.clock for rank in ranks)
    return Replay(duration, tuple(rank.busy for rank in ranks), tuple(rank.peak for rank in ranks))


def _commands(stages: StagePlan, micro_steps: int, rank: int) -> Iterator:
    schedules = importlib.import_module("deepspeed.runtime.pipe.schedule")
    kind = schedules.TrainSchedule if stages.schedule == "1f1b" else schedules.DualPipeVSchedule
    for step in kind(micro_batches=micro_steps, stages=stages.pp, stage_id=rank):
        yield from step


def _execute(
    rank: _Rank, command, sent: dict[tuple, float], forward: Sequence[float], backward: Sequence[float]
) -> bool:
    """Whether the command could be carried out now."""
    chunk = rank.stages.numbers_of(rank.number)[command.kwargs.get("phase", 0)]
    # a message's name: what it is, the chunk that sends it, and how many came before
    names = {
        "SendActivation": ("activation", chunk),
        "RecvActivation": ("activation", chunk - 1),
        "SendGrad": ("gradient", chunk),
        "RecvGrad": ("gradient", chunk + 1),
    }
    at_once = rank.stages.schedule == "1f1b"
    if command.name == "ForwardPass":
        _work(rank, forward[chunk])
        rank.in_flight[chunk] += 1
        if rank.in_flight.total() > sum(rank.peak.values()):
            rank.peak = dict(rank.in_flight)
    elif command.name == "BackwardPass":
        _work(rank, backward[chunk])
        rank.in_flight[chunk] -= 1
    elif command.name in ("SendActivation", "SendGrad"):
        key = (*names[command.name], _count(rank, command, chunk))
        if at_once:
            sent[key] = rank.clock
        else:
            rank.queued_sends.append(key)
    elif command.name in ("RecvActivation", "RecvGrad"):
        key = (*names[command.name], rank.counts[command.name, chunk])
        if at_once and key not in sent:
            return False
        _count(rank, command, chunk)
        if at_once:
            rank.clock = max(rank.clock, sent[key])
        else:
            rank.queued_receives.append(key)
    elif command.name == "CommitP2P":
        for key in rank.queued_sends:
            sent[key] = rank.clock
        rank.queued_sends = []
        if any(key not in sent for key in rank.queued_receives):
            return False
        rank.clock = max([rank.clock, *(sent[key] for key in rank.queued_receives)])
        rank.queued_receives = []
    return True


def _work(rank: _Rank, time: float) -> None:
    rank.clock += time
    rank.busy += time


def _count(rank: _Rank, command, chunk: int) -> int:
    """How many such commands came before this one."""
    rank.counts[command.name, chunk] += 1
    return rank.counts[command.name, chunk] - 1
