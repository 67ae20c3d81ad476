"""Which blocks each pipeline stage runs: chunks of a model, cut by cost, by count, or where the pattern says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_adamba.blueprint.flops import block_flops
from megatron_adamba.blueprint.manifest import ParamSpec
from megatron_adamba.blueprint.nest import block_rows
from megatron_adamba.blueprint.pattern import parse_cuts
from megatron_adamba.blueprint.resolve import attention_windows
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.config.sections import ParallelConfig
from megatron_adamba.errors import ConfigError


def num_chunks(pp: int, schedule: str) -> int:
    """1F1B (arXiv 2104.04473, section 2.2) runs a chunk a rank; under DualPipeV (https://github.com/deepseek-ai/DualPipe)
    rank r runs chunks r and 2 pp - 1 - r."""
    return pp if schedule == "1f1b" else 2 * pp


def least_micro_steps(pp: int, schedule: str) -> int:
    """Passes of micro-batches in a step from which on every stage is busy at some time; DualPipeV cannot run fewer."""
    return pp if schedule == "1f1b" else 2 * pp


@dataclass(frozen=True)
class Chunk:
    """Blocks first .. last - 1, behind the embedding where `embedding` is set, before final norm and head where `head`
    is."""

    first: int
    last: int
    embedding: bool
    head: bool

    @property
    def blocks(self) -> range:
        return range(self.first, self.last)

    def holds(self, name: str, tied: bool) -> bool:
        """Whether a parameter lies here, by its canonical name. tied: the embedding is the head too."""
        part, _, rest = name.partition(".")
        if part == "blocks":
            return int(rest.partition(".")[0]) in self.blocks
        if part == "embedding":
            return self.embedding or (tied and self.head)
        return self.head


def whole_model(num_layers: int) -> Chunk:
    return Chunk(0, num_layers, True, True)


@dataclass(frozen=True)
class StagePlan:
    """A pipeline: `bounds` holds where each chunk begins and, last, the number of blocks."""

    pp: int
    schedule: str
    bounds: tuple[int, ...]

    @property
    def num_chunks(self) -> int:
        return len(self.bounds) - 1

    @property
    def chunks(self) -> list[Chunk]:
        last = self.num_chunks - 1
        ends = zip(self.bounds, self.bounds[1:])
        return [Chunk(first, end, index == 0, index == last) for index, (first, end) in enumerate(ends)]

    def numbers_of(self, pp_rank: int) -> tuple[int, ...]:
        """Numbers of the chunks that a rank runs."""
        return (pp_rank,) if self.num_chunks == self.pp else (pp_rank, self.num_chunks - 1 - pp_rank)

    def chunks_of(self, pp_rank: int) -> tuple[Chunk, ...]:
        return tuple(self.chunks[number] for number in self.numbers_of(pp_rank))

    def owner_of(self, number: int) -> int:
        """pp_rank of a chunk."""
        return number if number < self.pp else self.num_chunks - 1 - number

    @property
    def loss_rank(self) -> int:
        """pp_rank that has the head."""
        return self.owner_of(self.num_chunks - 1)

    def bubble(self, micro_steps: int) -> float:
        """Share of a step in which ranks wait, were all chunks alike and backward twice forward.

        1F1B: (pp - 1) / (M + pp - 1). DualPipeV as DeepSpeed 0.19.8 runs it, weight gradients inside backward:
        (5 pp - 6) / (6 M + 5 pp - 6).
        """
        if self.pp == 1:
            return 0.0
        if self.num_chunks == self.pp:
            return (self.pp - 1) / (micro_steps + self.pp - 1)
        waits = 5 * self.pp - 6
        return waits / (6 * micro_steps + waits)

    def in_flight(self, pp_rank: int, micro_steps: int) -> int:
        """Passes through a chunk whose activations a rank keeps at the most: pp - r under 1F1B, of both chunks together
        2 pp + 1 under DualPipeV, whose chunks are half as large."""
        if self.num_chunks == self.pp:
            return min(micro_steps, self.pp - pp_rank)
        return min(2 * micro_steps, 2 * self.pp + 1)


def plan_stages(
    config: ResolvedModel, parallel: ParallelConfig, seq_len: int, pattern: str | Sequence[str] | None = None
) -> StagePlan:
    """The pipeline of a resolved model: cut where `pattern`, as the user wrote it, has `|`, else at
    `parallel.stage_bounds`, else as `parallel.stage_split` says.

    Raises ConfigError where bounds and degrees disagree.
    """
    wanted = num_chunks(parallel.pp, parallel.pipeline_schedule)
    cuts = parse_cuts(pattern) if parallel.pp > 1 else None
    bounds, depth = cuts or parallel.stage_bounds, config.num_layers
    if bounds is None:
        costs = block_costs(config, seq_len)
        by_cost = parallel.stage_split == "cost"
        bounds = (
            balanced_bounds(costs, parallel.pp, parallel.pipeline_schedule) if by_cost else equal_bounds(depth, wanted)
        )
    elif len(bounds) != wanted + 1:
        raise ConfigError(
            f"--model.block_pattern: has {len(bounds) - 1} parts between |, and --parallel.pp {parallel.pp} with "
            f"{parallel.pipeline_schedule} runs {wanted} chunks; write {wanted - 1} | or leave all of them out"
        )
    elif list(bounds) != sorted(set(bounds)) or (bounds[0], bounds[-1]) != (0, depth):
        raise ConfigError(
            f"--parallel.stage_bounds {list(bounds)}: must ascend from 0 to {depth}; try "
            f"{list(equal_bounds(depth, wanted))}, or leave it out"
        )
    return StagePlan(parallel.pp, parallel.pipeline_schedule, tuple(bounds))


def specs_held(specs: Sequence[ParamSpec], chunks: Sequence[Chunk], tied: bool) -> tuple[ParamSpec, ...]:
    """The part of a manifest that a stage holds."""
    return tuple(spec for spec in specs if any(chunk.holds(spec.name, tied) for chunk in chunks))


def block_costs(config: ResolvedModel, seq_len: int) -> list[float]:
    """Forward FLOPs of each block per token, a mean over the nest's widths, with the head added to the last one. The
    embedding is a look-up."""
    rows, windows = block_rows(config), attention_windows(config)
    widths = [row.width for row in config.nest]
    costs = [
        sum(block_flops(config, letter, rows[index][width], windows[index], seq_len) for width in widths) / len(widths)
        for index, letter in enumerate(config.block_pattern)
    ]
    costs[-1] += 2 * config.hidden_size * config.vocab_size
    return costs


def balanced_bounds(costs: Sequence[float], pp: int, schedule: str) -> tuple[int, ...]:
    """Bounds that make the most expensive rank as cheap as can be; every chunk has a block.

    Ranks of DualPipeV hold a pair of chunks, from both ends; their sum counts.
    """
    return _one_way(costs, pp) if schedule == "1f1b" else _both_ways(costs, pp)


def _one_way(costs: Sequence[float], parts: int) -> tuple[int, ...]:
    """Dynamic programming over (parts, blocks): the cheapest largest part."""
    sums = _prefix_sums(costs)
    count = len(costs)
    best = [sums[end] for end in range(count + 1)]
    cuts: list[list[int]] = []
    for part in range(2, parts + 1):
        row, chosen = [float("inf")] * (count + 1), [0] * (count + 1)
        for end in range(part, count + 1):
            for start in range(part - 1, end):
                cost = max(best[start], sums[end] - sums[start])
                if cost < row[end]:
                    row[end], chosen[end] = cost, start
        best = row
        cuts.append(chosen)
    bounds = [count]
    for chosen in reversed(cuts):
        bounds.append(chosen[bounds[-1]])
    return (*reversed([*bounds, 0]),)


def _both_ways(costs: Sequence[float], pp: int) -> tuple[int, ...]:
    """Peel pairs off both ends: over (ranks so far, blocks taken in front, blocks taken behind)."""
    sums, count = _prefix_sums(costs), len(costs)
    best: dict[tuple[int, int], tuple[float, tuple[tuple[int, int], ...]]] = {(0, 0): (0.0, ())}
    for rank in range(pp):
        left = pp - 1 - rank
        found: dict[tuple[int, int], tuple[float, tuple[tuple[int, int], ...]]] = {}
        for (front, behind), (worst, path) in best.items():
            for a in range(front + 1, count - behind - 2 * left):
                behinds = range(behind + 1, count - a - 2 * left + 1) if left else (count - a,)
                for b in behinds:
                    if b <= behind:
                        continue
                    own = sums[a] - sums[front] + sums[count - behind] - sums[count - b]
                    entry = (max(worst, own), (*path, (a, b)))
                    if (a, b) not in found or entry[0] < found[a, b][0]:
                        found[a, b] = entry
        best = found
    _, path = min(best.values(), key=lambda entry: entry[0])
    return (0, *(a for a, _ in path), *(count - b for _, b in reversed(path[:-1])), count)


def equal_bounds(count: int, parts: int) -> tuple[int, ...]:
    """As many blocks in every chunk, the first ones taking what is left over."""
    base, more = divmod(count, parts)
    sizes = [base + (part < more) for part in range(parts)]
    return tuple(sum(sizes[:part]) for part in range(parts + 1))


def _prefix_sums(costs: Sequence[float]) -> list[float]:
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    return sums
