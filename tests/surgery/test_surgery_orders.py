"""Operations that keep what a model computes, alone and one after the other in every order, against float64.

A chain of operations carries the logits that the formulas of `oracles/dense.py` give for the model it started from.
After each operation the new model has to give them at every plan for which the operations promise it, and so have the
new weights under the same formulas, which know nothing of growing and sorting.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from ops.test_selective_scan import recurrence as scan_by_steps
from ops.test_ssd import recurrence as ssd_by_steps
from oracles.dense import DenseModel, below, linear, mlp, nested_part, norm, randomize, rotary, used_part
from surgery.nested_models import KINDS, MAMBA, load, saved, some_tokens, source_model
from torch import Tensor

from megatron_adamba.blueprint.resolve import attention_windows, resolve_model
from megatron_adamba.checkpoint.canonical import read_tensors
from megatron_adamba.config.model import ModelConfig, NestRow
from megatron_adamba.config.root import read_model_config
from megatron_adamba.data.indexed_builder import IndexedDatasetBuilder
from megatron_adamba.data.indexed_dataset import IndexedDataset
from megatron_adamba.data.packed import evaluation_batches
from megatron_adamba.elastic.plan import ElasticPlan, full_plan
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.surgery.calibration import Calibration
from megatron_adamba.surgery.expand import Noise, expand
from megatron_adamba.surgery.expand_config import ADD_HEADS, GROW_DIM, Sizes
from megatron_adamba.surgery.extract import extract
from megatron_adamba.surgery.graft import graft
from megatron_adamba.surgery.merge_average import merge_average
from megatron_adamba.surgery.reorder import reorder, shuffle
from megatron_adamba.surgery.writing import Job, write_job

TIED, NO_QK_NORM, MAMBA1 = {"tie_embeddings": True}, {"qk_norm": False}, {"mamba_version": 1, "mamba_d_state": 4}
ROWS = [NestRow(8, 6, 1, 16), NestRow(16, 24, 3, 64), NestRow(32, 20, 4, 128)]
MODELS = {
    "T": ("T", {}, {**MAMBA, "mamba_num_groups": 2}),
    "grouped, tied": ("T, grouped, biases, sinks, tied", {}, {**MAMBA1, "mamba_use_mlp": True}),
    "norm sizes, tied": ("T, another norm size, uneven rows", {"nest": ROWS, **TIED}, {**MAMBA, "mamba_num_heads": 6}),
    "no norm weights": ("T, without norm weights", NO_QK_NORM, {**MAMBA, "mamba_use_mlp": True}),
    "E": ("E", {}, {**MAMBA, "mamba_num_groups": 4}),
    "TE, tied": ("E", {"block_pattern": "TE", "activation": "swiglu", **TIED, **NO_QK_NORM}, MAMBA1),
    "mixed": ("mixed", {"mamba_num_groups": 2, "attention_sinks": True, "num_kv_groups": 2}, None),
    "MET, Mamba-1": ("mixed", {"block_pattern": "MET", **MAMBA1, **NO_QK_NORM}, None),
    "M, tied": ("M with an MLP", {"block_pattern": "MM", "mamba_num_groups": 4, **TIED}, None),
    "Mamba-1": ("Mamba-1", {"mamba_use_mlp": True, "linear_bias": True}, None),
}
"""kind of `nested_models`, changes to it, and settings of the blocks that are grafted where it has none of Mamba"""
TOKENS = some_tokens(length=9)


def used_weights(config: ModelConfig, row: NestRow, name: str) -> tuple[slice, ...]:
    """`used_part`, and what it leaves out: experts, routers and sinks."""
    if ".experts." in name:
        return (slice(None), *used_part(config, replace(row, ffn=row.expert_ffn), name))
    if name.endswith("router.weight"):
        return (slice(None), slice(row.width))
    if name.endswith("sinks"):
        return (slice(row.kv_groups * config.num_heads // config.num_kv_groups),)
    return used_part(config, row, name.replace("moe_norm", "mlp_norm"))


def dense_logits(folder: Path, plans: Sequence[ElasticPlan]) -> dict[ElasticPlan, Tensor]:
    """A checkpoint's model in float64, from its files and the formulas."""
    config, weights = read_model_config(folder), {name: tensor.double() for name, tensor in read_tensors(folder)}
    return {plan: forward(config, weights, plan) for plan in plans}


def forward(config: ModelConfig, weights: dict[str, Tensor], plan: ElasticPlan) -> Tensor:
    rows, windows = {row.width: row for row in config.nest}, attention_windows(config)
    own = config.layer_widths or [config.widths[-1]] * config.num_layers
    static = lambda x, p: norm(x, p.get("weight"), p["gain"], config.static_norm_size, config.norm_eps)
    x = weights["embedding.weight"][TOKENS]
    if config.embedding_norm:
        x = norm(x, None, 1.0, config.static_norm_size, config.norm_eps)
    for index, letter in enumerate(config.block_pattern[: plan.exit_layer]):
        row = rows[min(plan.widths[index], own[index])]
        p = {k: v[used_weights(config, row, k)] for k, v in below(weights, f"blocks.{index}").items()}
        if letter == "M":
            x = x + mixer(static(x, below(p, "mixer_norm")), below(p, "mixer"), config)
        else:
            x = nested_part(x, p, config, row, "attention", lambda u, p=p, i=index: attention(u, p, config, windows[i]))
        if letter == "E":
            x = nested_part(x, p, config, row, "moe", lambda u, p=p: experts(u, below(p, "moe"), config))
        elif letter == "T" or config.mamba_use_mlp:
            x = nested_part(x, p, config, row, "mlp", lambda u, p=p: mlp(u, p, config))
    x = static(x, below(weights, "final_norm"))
    logits = x @ weights["embedding.weight" if config.tie_embeddings else "head.weight"].T
    return config.logit_softcap * torch.tanh(logits / config.logit_softcap) if config.logit_softcap else logits


def attention(u: Tensor, p: dict[str, Tensor], config: ModelConfig, window: int | None) -> Tensor:
    """With sinks, and with heads that have grown: each step is turned like a head of its own size."""
    q, k, v = (linear(u, p, f"attention.qkv.{name}").unflatten(-1, (-1, config.head_dim)) for name in "qkv")
    steps = config.head_dim_steps or [config.head_dim]
    parts = lambda x: [x.unflatten(-1, (2, -1))[..., a // 2 : b // 2].flatten(-2) for a, b in zip([0, *steps], steps)]
    q, k = (torch.cat([rotary(part, config.rope_theta, config.rope_sign) for part in parts(x)], -1) for x in (q, k))
    if config.qk_norm:
        q, k = (norm(t, None, 1.0, steps[0], config.norm_eps) for t in (q, k))
    k, v = (t.repeat_interleave(config.num_heads // config.num_kv_groups, dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / steps[0] ** 0.5
    back = torch.arange(u.shape[1])[:, None] - torch.arange(u.shape[1])
    scores = scores.masked_fill((back < 0) | (back >= (window or len(back))), float("-inf"))
    if "attention.sinks" in p:
        sinks = p["attention.sinks"].view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1)[..., : len(back)], v)
    return linear(mixed.flatten(2), p, "attention.out.o")


def experts(u: Tensor, p: dict[str, Tensor], config: ModelConfig) -> Tensor:
    """All experts for every token, of which those that it did not choose weigh nothing."""
    best = (u @ p["router.weight"].T + p["router.bias"]).topk(config.experts_per_token)
    share = u.new_zeros(*u.shape[:2], config.num_experts).scatter_(2, best.indices, best.values.softmax(-1))
    total = torch.zeros_like(u)
    for e in range(config.num_experts):
        one = {name: tensor[e] for name, tensor in below(p, "experts").items()}
        gate = linear(u, one, "gate").clamp(max=config.expert_gate_limit)
        up = linear(u, one, "up").clamp(-config.expert_gate_limit, config.expert_gate_limit)
        inner = gate * torch.sigmoid(config.expert_gate_slope * gate) * (up + 1)
        total += share[..., e, None] * linear(inner, one, "down")
    return total


def mixer(u: Tensor, p: dict[str, Tensor], config: ModelConfig) -> Tensor:
    """Mamba-1 and Mamba-2, token by token."""
    silu, state, (batch, seq) = torch.nn.functional.silu, config.mamba_d_state, u.shape[:2]
    zero, one_document = u.new_zeros(()), torch.zeros(batch, seq)

    def convolved(x: Tensor) -> Tensor:
        taps = p["conv1d.weight"].shape[1]
        past = torch.cat([x.new_zeros(batch, taps - 1, x.shape[2]), x], dim=1)
        return silu(sum(past[:, t : t + seq] * p["conv1d.weight"][:, t] for t in range(taps)) + p["conv1d.bias"])

    projected = u @ p["in_proj.weight"].T
    if config.mamba_version == 1:
        x, z = projected.chunk(2, dim=-1)
        x = convolved(x)
        dt, B, C = (x @ p["x_proj.weight"].T).split([p["dt_proj.weight"].shape[1], state, state], dim=-1)
        start = zero.expand(batch, x.shape[2], state)
        parts = (x, dt @ p["dt_proj.weight"].T, -p["A_log"].exp(), B.unsqueeze(2), C.unsqueeze(2), p["D"], z)
        y, _ = scan_by_steps(*parts, p["dt_proj.bias"], start, one_document)
        return y @ p["out_proj.weight"].T
    heads, groups = config.mamba_num_heads, config.mamba_num_groups
    inner, bc = heads * config.mamba_head_dim, groups * state
    z, xBC, dt = projected.split([inner, inner + 2 * bc, heads], dim=-1)
    x, B, C = convolved(xBC).split([inner, bc, bc], dim=-1)
    x, B, C = x.unflatten(-1, (heads, -1)), B.unflatten(-1, (groups, state)), C.unflatten(-1, (groups, state))
    start = zero.expand(batch, heads, config.mamba_head_dim, state)
    y, _ = ssd_by_steps(x, dt, -p["A_log"].exp(), B, C, p["D"], p["dt_bias"], start, one_document)
    gated = (y.flatten(2) * silu(z)).unflatten(-1, (groups, -1))
    normed = norm(gated, None, 1.0, inner // groups, config.norm_eps).flatten(2) * p["norm.weight"]
    return normed @ p["out_proj.weight"].T


class Chain:
    """A checkpoint under surgery, and the logits that it has to give, by plan."""

    def __init__(self, model: AdambaModel, place: Path) -> None:
        self.place, depth, widths = place, model.config.num_layers, model.config.widths
        self._write(model)
        mixed = tuple(widths[(2 * index + 1) % len(widths)] for index in range(depth))
        plans = [ElasticPlan((width,) * depth, depth) for width in widths]
        plans += [ElasticPlan(mixed, depth), ElasticPlan((widths[-1],) * depth, 1)]
        self.wanted = dense_logits(self.folder, plans)

    def _write(self, what: Job | AdambaModel) -> None:
        self.folder = self.place / str(len(list(self.place.iterdir())))
        if isinstance(what, Job):
            write_job(what, self.folder, 10**7, lambda *_: None)
        else:
            saved(what, self.folder)

    @property
    def config(self) -> ModelConfig:
        return read_model_config(self.folder)

    def graft(self, mamba: dict) -> None:
        """A block of Mamba behind the first block and behind the last."""
        letters = self.config.block_pattern
        pattern = f"{letters[:1]}M{letters[1:]}M"
        self._write(graft(self.folder, pattern, mamba, 5))
        kept = [place for place, letter in enumerate(pattern) if letter != "M"]

        def moved(plan: ElasticPlan) -> ElasticPlan:
            widths = [max(plan.widths)] * len(pattern)
            for place, width in zip(kept, plan.widths):
                widths[place] = width
            return ElasticPlan(tuple(widths), [*kept[1:], len(pattern)][plan.exit_layer - 1])

        self.wanted = {moved(plan): want for plan, want in self.wanted.items()}

    def expand(self, hidden: int, heads: str = ADD_HEADS, sizes: Sizes | None = None, rank: int = 4) -> None:
        """What is new is far from small, so that whoever reads it where it should not, shows."""
        old, noise = self.config.hidden_size, Noise(rank, 0.3, seed=3)
        self._write(expand(self.folder, hidden, heads, noise, sizes or Sizes()))
        for plan, want in list(self.wanted.items()):
            wide = tuple(hidden if width == old else width for width in plan.widths)
            self.wanted[ElasticPlan(wide, plan.exit_layer)] = want

    def reorder(self, job: Job | None = None) -> None:
        """Everything at random, or as the job does. Nothing is promised of narrow widths: they have new logits."""
        self._write(job or shuffle(self.folder, seed=len(self.wanted)))
        self._renew([plan for plan in self.wanted if min(plan.widths) < self.config.hidden_size])

    def average(self) -> None:
        self._write(merge_average([self.folder] * 3, [2.0, 3.0, 5.0]))

    def train(self) -> None:
        """All weights are others from now on, those of new blocks, units and channels too."""
        model = load(self.folder)
        randomize(model, seed=9)
        self._write(model)
        self._renew(list(self.wanted))

    def extract(self, widths: tuple[int, ...], exit_layer: int) -> None:
        whole = ElasticPlan(widths, exit_layer)
        if whole not in self.wanted:
            self._renew([whole])
        self._write(extract(self.folder, None, list(widths), exit_layer))
        self.wanted = {
            ElasticPlan(plan.widths[:exit_layer], plan.exit_layer): want
            for plan, want in self.wanted.items()
            if plan.exit_layer <= exit_layer and all(asked <= own for asked, own in zip(plan.widths, widths))
        }

    def _renew(self, plans: list[ElasticPlan]) -> None:
        self.wanted |= dense_logits(self.folder, plans)

    def check(self) -> None:
        model, by_formulas = load(self.folder), dense_logits(self.folder, list(self.wanted))
        assert full_plan(model.config) in self.wanted, "runs where nothing is asked for"
        for plan, want in self.wanted.items():
            size = max(want.abs().max(), 1)
            assert want.std() > 0.02, "too little to see a mistake"
            assert (model(TOKENS, plan=plan).double() - want).abs().max() <= 1e-5 * size, plan.label
            assert (by_formulas[plan] - want).abs().max() <= 1e-9 * size, f"weights at {plan.label}"


def chain_of(name: str, place: Path) -> Chain:
    kind, changes, _ = MODELS[name]
    return Chain(source_model(kind, **changes), place)


def follow(chain: Chain, order: Sequence[str], mamba: dict | None = None) -> None:
    for step in order:
        config = chain.config
        hidden, depth, groups = config.hidden_size, config.num_layers, config.num_kv_groups
        if step == "graft":
            chain.graft(mamba)
        elif step == "expand":
            chain.expand(hidden + 16, sizes=Sizes(num_kv_groups=-(-groups * (hidden + 16) // hidden)))
        elif step == "grow":
            chain.expand(larger_heads(config)[0], GROW_DIM)
        elif step == "leave":
            chain.extract((hidden,) * depth, depth - 1)
        elif step == "narrow":
            chain.extract((config.widths[1],) * depth, depth)
        else:
            getattr(chain, step)()


def larger_heads(config: ModelConfig) -> list[int]:
    """Hidden sizes up to twice the old one to which heads can grow in proportion."""
    old = config.hidden_size
    return [hidden for hidden in range(old + 1, 2 * old + 1) if config.head_dim * hidden % (2 * old) == 0]


def orders() -> list[tuple[str, str]]:
    found = []
    for name, (kind, changes, mamba) in MODELS.items():
        steps = ("graft", "expand", "reorder") if mamba else ("expand", "reorder")
        own = ["average", "narrow", *(" ".join(order) for size in (1, 2, 3) for order in permutations(steps, size))]
        if mamba:
            own += ["leave graft expand narrow", "graft train reorder expand", "expand graft train expand"]
        else:
            own += ["leave expand narrow", "expand train expand average"]
        if not {**KINDS[kind], **changes}.get("qk_norm", True):
            own += ["grow reorder expand", "reorder expand grow", "grow train grow"]
        found += [(name, order) for order in own]
    return found


@pytest.mark.parametrize(("name", "order"), orders())
def test_every_order_keeps_what_it_promises(name, order, tmp_path):
    """And a width for each block, cut out of what has come of it."""
    chain = chain_of(name, tmp_path)
    follow(chain, order.split(), MODELS[name][2])
    chain.check()
    depth, widths = chain.config.num_layers, chain.config.widths
    chain.extract(tuple(widths[-1 - index % len(widths)] for index in range(depth)), depth)
    chain.check()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_wanted_is_the_dense_models(name, tmp_path):
    """Before any surgery. `DenseModel` has no experts and no sinks: those are held against our model alone, which other
    tests hold against transformers. Mamba's decays are fp32 in it."""
    chain = chain_of(name, tmp_path)
    chain.check()
    model = load(chain.folder).double()
    if "E" in model.config.block_pattern or model.config.attention_sinks:
        return
    for plan, want in chain.wanted.items():
        dense = DenseModel(model, plan.widths, attention_windows(model.config))
        assert (dense.logits(TOKENS, exit_layer=plan.exit_layer) - want).abs().max() <= 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_the_real_reordering_between_two_expansions(name, tmp_path, monkeypatch):
    """By measured importance; each ordering is said to help, so that all are kept."""
    with IndexedDatasetBuilder(tmp_path / "text", np.uint16) as builder:
        builder.add_document(np.random.default_rng(3).integers(0, 250, 240))
        builder.finalize()
    batches = evaluation_batches(IndexedDataset(tmp_path / "text"), 30, 4, 256, None)
    losses = iter(range(20, 0, -1))
    monkeypatch.setattr(Calibration, "narrow_losses", lambda *_: (next(losses),) * 2)
    chain = chain_of(name, tmp_path)
    follow(chain, ["expand"])
    job, trials = reorder(chain.folder, Calibration(batches), {})
    letters = {*chain.config.block_pattern}
    kinds = {"hidden", "ffn"} | ({"heads"} if letters & {*"TE"} else set()) | ({"experts"} if "E" in letters else set())
    assert {trial.kind for trial in trials if trial.helps} == kinds
    chain.reorder(job)
    chain.check()
    follow(chain, ["expand"])
    chain.check()


@st.composite
def shapes(draw) -> ModelConfig:
    """Sizes that are no multiples of each other, and every switch."""
    number, of, switch = lambda low, high: draw(st.integers(low, high)), lambda *each: draw(st.sampled_from(each)), {}
    for name in ("qk_norm", "linear_bias", "attention_sinks", "norm_weight", "embedding_norm", "tie_embeddings"):
        switch[name] = draw(st.booleans())
    hidden, granule, groups, parts = number(6, 24), number(1, 5), number(1, 4), number(1, 3)
    pattern = of("T", "E", "TE", "ET", "M", "TM", "ME", "MT")
    mamba2 = {"mamba_num_groups": parts, "mamba_num_heads": parts * number(1, 2), "mamba_head_dim": 3}
    mamba = of({"mamba_version": 1, "mamba_expand": 1}, mamba2)
    experts = {"num_experts": 3, "experts_per_token": 2, "expert_ffn_size": granule * number(1, 5)}
    config = ModelConfig(
        block_pattern=pattern, hidden_size=hidden, vocab_size=257, head_dim=2 * number(1, 4), num_kv_groups=groups,
        num_heads=groups * number(1, 3), ffn_granule=granule, ffn_size=granule * number(1, 6),
        widths=sorted({number(1, hidden), number(1, hidden), hidden}), activation=of("relu2", "swiglu"),
        mamba_d_state=number(1, 5), mamba_d_conv=number(2, 4), mamba_use_mlp=draw(st.booleans()),
        sliding_window=3, window_pattern=of("L", "SL"), **switch, **mamba, **(experts if "E" in pattern else {}),
    )  # fmt: skip
    return resolve_model(config)


@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=25, phases=[Phase.generate])
def test_any_shape_in_any_order(data):
    config = data.draw(shapes())
    model = AdambaModel(config)
    randomize(model, seed=data.draw(st.integers(0, 99)))
    steps = ["expand", "expand", "reorder", "train"] + ["graft"] * ("M" not in config.block_pattern)
    with tempfile.TemporaryDirectory() as place:
        chain = Chain(model.requires_grad_(False).eval(), Path(place))
        for step in data.draw(st.permutations(steps)):
            grow_at_random(chain, data.draw) if step == "expand" else follow(chain, [step], {})
            chain.check()
        widths, depth = chain.config.widths, chain.config.num_layers
        own = data.draw(st.lists(st.sampled_from(widths), min_size=depth, max_size=depth))
        chain.extract(tuple(own), data.draw(st.integers(1, depth)))
        chain.check()


def grow_at_random(chain: Chain, draw) -> None:
    config, rank, more = chain.config, draw(st.integers(1, 5)), draw(st.tuples(*[st.integers(0, 2)] * 3))
    hidden, sizes = config.hidden_size, {"num_kv_groups": config.num_kv_groups + more[0]}
    if not config.qk_norm and draw(st.booleans()):
        chain.expand(draw(st.sampled_from(larger_heads(config))), GROW_DIM, rank=rank)
    else:
        if more[1]:
            sizes["ffn_size"] = config.ffn_size + config.ffn_granule * more[1]
        if "M" in config.block_pattern and config.mamba_version == 2:
            sizes["mamba_num_groups"] = config.mamba_num_groups + more[2]
        chain.expand(draw(st.integers(hidden + 1, 2 * hidden)), sizes=Sizes(**sizes), rank=rank)
