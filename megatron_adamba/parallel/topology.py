"""Which ranks work together: one explicit object, made once and handed to whoever needs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megatron_adamba.errors import ConfigError

KINDS = ("dp", "tp", "pp", "ep", "edp", "model")
"""kinds of groups; `model` is tp x pp: the ranks that hold one replica together"""
ENDS = "ends"
"""the group of a pipeline's first and last stage, in which stages between them have no part"""


@dataclass(frozen=True)
class RankGrid:
    """Ranks as numbers: tp fastest, then dp, pp slowest: rank = (pp_rank * dp + dp_rank) * tp + tp_rank.

    ep folds over the dp * tp ranks of one stage: stage_rank = dp_rank * tp + tp_rank = edp_rank * ep + ep_rank.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if self.world_size % (self.tp * self.pp):
            legal = [n for n in range(1, self.world_size + 1) if self.world_size % (n * self.pp) == 0]
            raise ConfigError(
                f"--parallel.tp {self.tp} x --parallel.pp {self.pp}: must divide the {self.world_size} ranks; "
                + (f"with pp {self.pp} tp may be one of {legal}" if legal else "try --parallel.pp 1")
            )
        if (self.dp * self.tp) % self.ep:
            legal = [n for n in range(1, self.dp * self.tp + 1) if self.dp * self.tp % n == 0]
            raise ConfigError(f"--parallel.ep {self.ep}: must divide dp x tp = {self.dp * self.tp}; one of {legal}")

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.pp)

    @property
    def edp(self) -> int:
        return self.dp * self.tp // self.ep

    def places(self, rank: int) -> dict[str, int]:
        """{"tp": tp_rank, "dp": ..., "pp": ..., "ep": ..., "edp": ...} of a rank."""
        outer, tp_rank = divmod(rank, self.tp)
        pp_rank, dp_rank = divmod(outer, self.dp)
        edp_rank, ep_rank = divmod(dp_rank * self.tp + tp_rank, self.ep)
        return {"tp": tp_rank, "dp": dp_rank, "pp": pp_rank, "ep": ep_rank, "edp": edp_rank}

    def groups(self, kind: str) -> list[list[int]]:
        """All groups of a kind, each in the order of its own ranks."""
        if kind == ENDS:
            return [sorted({group[0], group[-1]}) for group in self.groups("pp")]
        fixed = {
            "tp": ("dp", "pp"),
            "dp": ("tp", "pp"),
            "pp": ("tp", "dp"),
            "ep": ("edp", "pp"),
            "edp": ("ep", "pp"),
            "model": ("dp",),
        }[kind]
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self.places(rank)
            found.setdefault(tuple(place[name] for name in fixed), []).append(rank)
        return list(found.values())


@dataclass(frozen=True)
class Topology:
    """The grid, this rank's place in it, and its process groups."""

    grid: RankGrid
    rank: int
    process_groups: dict[str, dist.ProcessGroup | None]
    """by kind; None without torch.distributed, where every group is this process alone"""
    sequence_parallel: bool = False
    """whether the tp ranks share out the sequence between the tensor-parallel parts of a layer"""

    @property
    def world_size(self) -> int:
        return self.grid.world_size

    def size(self, kind: str) -> int:
        """Ranks in this rank's group of a kind."""
        return self.grid.tp * self.grid.pp if kind == "model" else getattr(self.grid, kind)

    def place(self, kind: str) -> int:
        """This rank's number in its group of a kind."""
        places = self.grid.places(self.rank)
        return places["pp"] * self.grid.tp + places["tp"] if kind == "model" else places[kind]

    def group(self, kind: str) -> dist.ProcessGroup | None:
        return self.process_groups[kind]


def single_process() -> Topology:
    """One rank that needs nobody."""
    return Topology(RankGrid(1), 0, dict.fromkeys((*KINDS, ENDS)))


def build_topology(grid: RankGrid, sequence_parallel: bool = False) -> Topology:
    """Process groups over the ranks of torch.distributed, which must be running; every rank calls this alike.

    Groups of all ranks are the world's own, and equal lists of ranks share one group.
    """
    rank = dist.get_rank()
    assert grid.world_size == dist.get_world_size()
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = {tuple(range(grid.world_size)): dist.group.WORLD}
    own: dict[str, dist.ProcessGroup | None] = dict.fromkeys((*KINDS, ENDS))
    for kind in (*KINDS, ENDS):
        for ranks in grid.groups(kind):
            key = tuple(ranks)
            if key not in made:
                made[key] = dist.new_group(ranks)
            if rank in ranks:
                own[kind] = made[key]
    return Topology(grid, rank, own, sequence_parallel)
