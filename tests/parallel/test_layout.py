"""Where canonical tensors lie under tensor parallelism, over random models and every legal degree."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_adamba.blueprint.manifest import ParamSpec, manifest
from megatron_adamba.blueprint.resolve import mamba_inner_size, resolve_model
from megatron_adamba.checkpoint.rectangles import Fragment, placement
from megatron_adamba.config.model import ModelConfig, NestRow
from megatron_adamba.layers.context import ForwardContext
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.ops.nested_linear import Accumulation
from megatron_adamba.parallel.layout import contiguous_rows, cut, join, local_shape, owned_runs, owned_units
from megatron_adamba.parallel.tensor import TensorParallel

DEGREES = range(1, 9)
RANDOM_MODELS = settings(max_examples=80, deadline=None)


@st.composite
def configs(draw) -> ModelConfig:
    """Small models of every kind of unit, their nest by rule or a table of no rule."""
    size = lambda low, high: draw(st.integers(low, high))
    hidden, granule = draw(st.sampled_from([16, 24, 40])), draw(st.sampled_from([1, 2, 5, 8]))
    groups, blocks, version = size(1, 8), size(1, 11), draw(st.sampled_from([1, 2]))
    widths = sorted({*draw(st.lists(st.integers(1, hidden), max_size=3)), hidden})
    nest = None
    if draw(st.booleans()):
        nest = [NestRow(width, size(1, 60), size(1, groups), size(1, blocks) * granule) for width in widths]
    mamba = {}
    if version == 2:
        num_groups = size(1, 8)
        mamba = {"mamba_num_groups": num_groups, "mamba_num_heads": num_groups * size(1, 3), "mamba_head_dim": 4}
    return resolve_model(
        ModelConfig(
            hidden_size=hidden,
            block_pattern=draw(st.sampled_from(["T", "M", "TM", "MT"])),
            vocab_size=draw(st.integers(1, 80) | st.sampled_from([4095, 4096, 4100, 4159, 4161])),
            num_heads=groups * size(1, 3),
            num_kv_groups=groups,
            head_dim=2 * size(1, 3),
            ffn_size=blocks * granule,
            ffn_granule=granule,
            activation=draw(st.sampled_from(["relu2", "swiglu"])),
            linear_bias=draw(st.booleans()),
            norm_weight=draw(st.booleans()),
            tie_embeddings=draw(st.booleans()),
            mamba_version=version,
            mamba_d_state=size(1, 5),
            mamba_d_conv=draw(st.sampled_from([2, 3, 4])),
            mamba_use_mlp=draw(st.booleans()),
            widths=None if nest else widths,
            nest=nest,
            **mamba,
        )
    )


def legal_degrees(config: ModelConfig) -> list[int]:
    """Tensor parallelism divides the KV groups, and Mamba's groups or channels."""
    whole = {"T": config.num_kv_groups, "M": config.mamba_num_groups}
    if config.mamba_version == 1:
        whole["M"] = mamba_inner_size(config)
    return [n for n in DEGREES if all(whole[letter] % n == 0 for letter in config.block_pattern)]


@st.composite
def cut_models(draw) -> tuple[ModelConfig, int]:
    config = draw(configs())
    return config, draw(st.sampled_from(legal_degrees(config)))


def numbered(spec: ParamSpec) -> Tensor:
    """Every element its own number."""
    return torch.arange(spec.numel).view(spec.shape)


@RANDOM_MODELS
@given(cut_models())
def test_shards_hold_every_element_once_and_join_to_the_whole(case):
    config, size = case
    for spec in manifest(config):
        whole = numbered(spec)
        shards = [cut(spec, whole, size, rank) for rank in range(size)]
        assert torch.equal(join(spec, shards), whole), spec.name
        if spec.unit is None:
            assert all(torch.equal(shard, whole) for shard in shards), spec.name
        else:
            held = torch.cat([shard.flatten() for shard in shards])
            assert torch.equal(held.sort().values, whole.flatten()), spec.name


@RANDOM_MODELS
@given(cut_models())
def test_runs_say_which_rows_a_shard_holds(case):
    config, size = case
    for spec in manifest(config):
        if spec.unit is None:
            continue
        rows = torch.arange(spec.shape[spec.unit_axis])
        assert [(run.local, run.canonical, run.size) for run in owned_runs(spec, 1, 0)] == [(0, 0, rows.numel())]
        column = rows.view([-1 if axis == spec.unit_axis else 1 for axis in range(len(spec.shape))])
        for rank in range(size):
            runs = owned_runs(spec, size, rank)
            listed = torch.cat([rows[:0], *(rows[run.canonical : run.canonical + run.size] for run in runs)])
            held = cut(spec, column.expand(spec.shape), size, rank)
            assert torch.equal(held.movedim(spec.unit_axis, 0).unsqueeze(-1).flatten(1)[:, 0], listed), spec.name
            starts = list(itertools.accumulate((run.size for run in runs), initial=0))
            assert [run.local for run in runs] == starts[: len(runs)]
            # rows that follow each other in both are one run
            assert all(a.canonical + a.size != b.canonical for a, b in itertools.pairwise(runs)), spec.name


@RANDOM_MODELS
@given(cut_models())
def test_the_model_of_a_rank_has_the_shapes_of_its_shards(case):
    config, size = case
    for rank in range(size):
        model = AdambaModel(config, device="meta", tp=TensorParallel(size, rank))
        held = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert set(held) == {spec.name for spec in manifest(config)}
        for spec in manifest(config):
            assert local_shape(spec, size, rank) == held[spec.name], spec.name
            assert tuple(cut(spec, numbered(spec), size, rank).shape) == held[spec.name], spec.name


@RANDOM_MODELS
@given(cut_models())
def test_a_width_is_a_prefix_of_every_shard(case):
    """What a rank's layers slice off at a width is, of the canonical slice, every `size`-th unit from its rank on."""
    config, size = case
    for spec, row, rank in itertools.product(manifest(config), config.nest, range(size)):
        if spec.unit not in ("kv_group", "ffn_granule"):
            continue
        units = row.kv_groups if spec.unit == "kv_group" else row.ffn // config.ffn_granule
        ((length, unit),) = spec.parts
        assert length == spec.shape[spec.unit_axis]
        canonical = torch.arange(units * unit)
        mine = canonical[canonical // unit % size == rank]
        local = TensorParallel(size, rank).owned(units) * unit
        whole = numbered(spec)
        prefix = cut(spec, whole, size, rank).narrow(spec.unit_axis, 0, local)
        assert torch.equal(prefix, whole.index_select(spec.unit_axis, mine)), (spec.name, row)


class Alone(TensorParallel):
    """A rank's share of every layer, with nobody there to meet."""

    exchange = None

    def reduce_output(self, x: Tensor) -> Tensor:
        return x


def flops(layer, row: NestRow, config: ModelConfig) -> int:
    """Of all matrix products that a forward of this rank's layer runs at a width."""
    angles = torch.empty(SEQ, config.head_dim // 2, device="meta")
    context = ForwardContext(Accumulation.DIRECT, angles, angles, {None: None}, None)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        y = layer(torch.empty(1, SEQ, row.width, device="meta"), row, context)
    assert y.shape == (1, SEQ, row.width)
    return counter.get_total_flops()


SEQ = 3


@RANDOM_MODELS
@given(cut_models())
def test_the_work_of_every_width_is_shared_to_within_a_unit(case):
    config, size = case
    model = AdambaModel(config, device="meta")
    shards = [AdambaModel(config, device="meta", tp=Alone(size, rank)) for rank in range(size)]
    for index, row in itertools.product(range(config.num_layers), config.nest):
        for name, units in (("attention", row.kv_groups), ("mlp", row.ffn // config.ffn_granule)):
            layer = getattr(model.blocks[index], name, None)
            if layer is None:
                continue
            total = flops(layer, row, config)
            parts = [flops(getattr(shard.blocks[index], name), row, config) for shard in shards]
            assert total > 0 and sum(parts) == total
            assert max(parts) - min(parts) <= total // units
            assert total % units == 0


@RANDOM_MODELS
@given(cut_models())
def test_what_never_nests_is_shared_evenly(case):
    config, size = case
    for spec in manifest(config):
        shapes = [local_shape(spec, size, rank) for rank in range(size)]
        if spec.unit == "mamba":
            assert len(set(shapes)) == 1, spec.name
        elif spec.unit == "vocab":
            rows = [shape[0] for shape in shapes]
            assert max(rows) - min(rows) <= spec.parts[0][1]
        if spec.unit in ("mamba", "vocab"):
            # one run of units a part: checkpoints hold few rectangles
            assert all(len(owned_runs(spec, size, rank)) <= len(spec.parts) for rank in range(size))


@RANDOM_MODELS
@given(cut_models(), st.data())
def test_checkpoint_fragments_of_all_ranks_make_up_the_tensor(case, data):
    """ZeRO cuts a rank's flat shard anywhere; the rectangles of all pieces of all ranks are the canonical tensor, and
    what is written into them arrives in the flat piece."""
    config, size = case
    for spec in manifest(config):
        whole = numbered(spec)
        target, seen = torch.full_like(whole, -1), torch.zeros_like(whole)
        for rank in range(size):
            flat = cut(spec, whole, size, rank).flatten().clone()
            inner = data.draw(st.lists(st.integers(0, flat.numel()), max_size=3).map(sorted))
            for start, stop in itertools.pairwise([0, *inner, flat.numel()]):
                fragment = Fragment(flat[start:stop], start, placement(spec, size, rank))
                assert fragment.shape == whole.shape
                for offset, piece in fragment.pieces.items():
                    box = tuple(slice(low, low + length) for low, length in zip(offset, piece.shape, strict=True))
                    target[box] = piece
                    seen[box] += 1
                    piece.neg_()
            assert torch.equal(flat, -cut(spec, whole, size, rank).flatten()), spec.name
        assert torch.equal(target, whole), spec.name
        assert (seen == (size if spec.unit is None else 1)).all(), spec.name


@given(st.integers(0, 200), st.integers(1, 16))
def test_the_first_units_go_round(count, size):
    owners = [unit % size for unit in range(count)]
    assert [owned_units(count, size, rank) for rank in range(size)] == [owners.count(rank) for rank in range(size)]


@given(st.integers(1, 5000), st.integers(1, 70), st.integers(1, 16))
def test_runs_of_units_follow_each_other(length, unit, size):
    bounds = [contiguous_rows(length, unit, size, rank) for rank in range(size)]
    assert bounds[0][0] == 0 and bounds[-1][1] == length
    assert all(before[1] == after[0] for before, after in itertools.pairwise(bounds))
    assert all(low % unit == 0 or low == length for low, _ in bounds)


def test_a_tensor_of_another_shape_is_not_cut():
    spec = ParamSpec("x", (4, 2), "mlp", "matrix", "linear", "ffn_granule", 0, ((4, 1),))
    with pytest.raises(AssertionError, match=r"x: \(4, 3\) is not its canonical \(4, 2\)"):
        cut(spec, torch.zeros(4, 3), 2, 0)
