"""The whole model: its parameters, its function at every width, packing, recomputation, exits and initial weights."""

from __future__ import annotations

import pytest
import torch
from oracles.dense import DenseModel, check_gradients, near, randomize

from megatron_adamba.blueprint.manifest import GROUPS, ParamSpec, manifest
from megatron_adamba.blueprint.resolve import attention_windows, resolve_model
from megatron_adamba.config.model import ModelConfig, NestRow
from megatron_adamba.elastic.plan import ElasticPlan, MixedExits, uniform_plan
from megatron_adamba.errors import ConfigError
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.model.init import DT_MAX, DT_MIN, initial_tensor

VOCAB = 31
NEST = [NestRow(8, 5, 1, 16), NestRow(20, 27, 2, 32), NestRow(32, 29, 4, 96)]
"""norm sizes of a model that has grown, kv_groups and rows of no rule"""


def model_config(pattern: str = "TMT", **changes) -> ModelConfig:
    shape = {
        "hidden_size": 32,
        "block_pattern": pattern,
        "vocab_size": VOCAB,
        "head_dim": 6,
        "num_heads": 8,
        "num_kv_groups": 4,
        "ffn_size": 96,
        "ffn_granule": 16,
        "linear_bias": True,
        "nest": NEST,
        "static_norm_size": 23,
        "mamba_d_state": 8,
        "mamba_head_dim": 8,
        "mamba_chunk_size": 4,
        "mamba_use_mlp": True,
    }
    return resolve_model(ModelConfig(**{**shape, **changes}))


def random_model(config: ModelConfig, seed: int = 0, **options) -> AdambaModel:
    model = AdambaModel(config, **options)
    randomize(model, seed)
    return model


def random_batch(seed: int = 0, rows: int = 2, seq: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, seq + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    return tokens[:, :-1].contiguous(), labels


MANIFESTS = {
    "hybrid": {},
    "tied": {"tie_embeddings": True},
    "no norm weights": {"norm_weight": False},
    "no biases": {"linear_bias": False},
    "swiglu": {"activation": "swiglu"},
    "mamba 1": {"mamba_version": 1},
    "mamba without MLP": {"mamba_use_mlp": False},
    "mamba 1 without MLP": {"mamba_version": 1, "mamba_use_mlp": False, "pattern": "M"},
    "mamba heads of its own number": {"mamba_num_heads": 6, "mamba_num_groups": 3},
    "attention alone": {"pattern": "TT", "activation": "swiglu", "tie_embeddings": True},
    "narrower heads than the residual": {"num_heads": 2, "num_kv_groups": 1, "nest": None, "widths": [8, 32]},
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_manifest_is_the_model(name):
    config = model_config(**MANIFESTS[name])
    model = AdambaModel(config, device="meta")
    listed = [(spec.name, spec.shape) for spec in manifest(config)]
    held = [(key, tuple(parameter.shape)) for key, parameter in model.named_parameters()]
    assert sorted(listed) == sorted(held)
    assert all(parameter.is_meta for parameter in model.parameters()) and not list(model.buffers())
    for spec in manifest(config):
        assert spec.group in GROUPS and spec.kind in ("matrix", "table", "vector")
        assert (spec.unit is None) == (spec.unit_axis is None)
        assert spec.unit_axis is None or spec.unit_axis < len(spec.shape)


FUNCTIONS = {
    "attention": {"pattern": "TTT"},
    "nanochat-like": {
        "pattern": "TT",
        "norm_weight": False,
        "embedding_norm": True,
        "rope_sign": -1,
        "logit_softcap": 3.0,
        "linear_bias": False,
    },
    "tied swiglu": {"pattern": "TT", "activation": "swiglu", "tie_embeddings": True, "logit_softcap": 4.0},
    "windows": {"pattern": "TTT", "sliding_window": 3, "window_pattern": "SL", "qk_norm": False},
    "hybrid": {"pattern": "TM"},
    "hybrid of mamba 1": {"pattern": "MT", "mamba_version": 1, "activation": "swiglu"},
    "hybrid without MLP": {"pattern": "MTM", "mamba_use_mlp": False, "mamba_num_groups": 2},
}


def exits_of(plan: ElasticPlan, length: int) -> list[int] | None:
    if plan.mixed is None:
        return None
    gone = plan.mixed.positions(length, torch.device("cpu")).tolist()
    assert any(gone) and not all(gone)
    return [plan.mixed.layer if early else plan.exit_layer for early in gone]


def compare(model: AdambaModel, plan: ElasticPlan, seq_idx: torch.Tensor | None = None) -> None:
    tokens, labels = random_batch()
    exits = exits_of(plan, tokens.shape[1])
    dense = DenseModel(model, plan.widths, attention_windows(model.config))
    logits = dense.logits(tokens, seq_idx, plan.exit_layer, exits)
    assert (model(tokens, seq_idx=seq_idx, plan=plan) - logits).abs().max() <= 1e-5
    want = dense.loss(tokens, labels, seq_idx, plan.exit_layer, exits)
    assert abs(model(tokens, labels, seq_idx, plan).item() - want.item()) <= 1e-5
    each = model(tokens, labels, seq_idx, plan, reduction="none")
    assert each.shape == labels.shape and not each[labels == -100].any() and not each.requires_grad
    assert abs(each.sum().item() / (labels != -100).sum().item() - want.item()) <= 1e-5
    # gradients that are sums of terms which nearly cancel (a gain's, a key bias's) lose the bound to fp32's rounding
    model.double()
    dense = DenseModel(model, plan.widths, attention_windows(model.config))
    model(tokens, labels, seq_idx, plan).backward()
    dense.loss(tokens, labels, seq_idx, plan.exit_layer, exits).backward()
    check_gradients(model.config, dense.row_of, model, dense.leaves())


@pytest.mark.parametrize("width", [row.width for row in NEST])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_at_width_w_the_model_is_a_model_built_that_way(name, width):
    model = random_model(model_config(**FUNCTIONS[name]))
    compare(model, uniform_plan(model.config, width))


@pytest.mark.parametrize("widths", [(8, 20, 32, 20), (32, 8, 8, 20), (20, 32, 8, 8)])
def test_each_layer_has_a_width_of_its_own(widths):
    model = random_model(model_config("TMTT"))
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 2, 2]], dtype=torch.int32)
    compare(model, ElasticPlan(widths, 4), seq_idx)


@pytest.mark.parametrize("exit_layer", [0, 1, 2])
def test_leaving_early_reads_the_residual_there(exit_layer):
    model = random_model(model_config("TMT"))
    compare(model, ElasticPlan((8, 20, 32), exit_layer))
    for name, parameter in model.blocks.named_parameters():
        if int(name.split(".")[0]) >= exit_layer:
            assert parameter.grad is not None and not parameter.grad.any(), name
    model.zero_grad()
    tokens, labels = random_batch()
    model(tokens, labels, plan=ElasticPlan((8, 20, 32), exit_layer), all_take_part=False).backward()
    skipped = [parameter for block in model.blocks[exit_layer:] for parameter in block.parameters()]
    assert skipped and all(parameter.grad is None for parameter in skipped)


@pytest.mark.parametrize("layers", [(1, 4), (2, 3), (0, 2)])
@pytest.mark.parametrize("pattern", ["TMTM", "MTTM"])
def test_tokens_that_leave_early_are_read_where_they_left(pattern, layers):
    """By the others, in all blocks above."""
    model = random_model(model_config(pattern))
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 2]], dtype=torch.int32)
    early, last = layers
    compare(model, ElasticPlan((8, 20, 32, 20), last, MixedExits(early, 0.5, key=7)), seq_idx)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("pattern", ["TT", "MM", "TMT"])
def test_packed_documents_do_not_see_each_other(pattern, version, window):
    """The losses of a packed row are those of its documents alone, and so is the gradient of their sum."""
    local = {} if window is None else {"sliding_window": window, "window_pattern": "S"}
    model = random_model(model_config(pattern, mamba_version=version, **local))
    plan = ElasticPlan(tuple([20, 32, 8][: len(pattern)]), len(pattern))
    lengths = [3, 1, 7, 2]
    tokens, labels = random_batch(rows=1, seq=sum(lengths))
    numbers = torch.tensor([[0, 2, 3, 7]], dtype=torch.int32)  # only where they change may matter
    seq_idx = numbers.repeat_interleave(torch.tensor(lengths), dim=1)
    packed = model(tokens, labels, seq_idx, plan, reduction="none")
    pieces = zip(tokens.split(lengths, 1), labels.split(lengths, 1))
    alone = torch.cat([model(t, y, None, plan, reduction="none") for t, y in pieces], dim=1)
    assert (packed - alone).abs().max() <= 1e-5
    assert (model(tokens, labels, None, plan, reduction="none") - alone).abs().max() > 1e-2  # the numbers matter

    model(tokens, labels, seq_idx, plan).backward()
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    scored = (labels != -100).sum()
    for t, y in zip(tokens.split(lengths, 1), labels.split(lengths, 1)):
        (model(t, y, None, plan) * (y != -100).sum() / scored).backward()
    for name, parameter in model.named_parameters():
        near(together[name], parameter.grad, what=name)


@pytest.mark.parametrize("version", [1, 2])
def test_recomputing_activations_changes_nothing(version):
    config = model_config("TMTM", mamba_version=version, activation="swiglu")
    plain, recomputed = random_model(config), random_model(config, activation_checkpointing=True)
    tokens, labels = random_batch()
    seq_idx = torch.tensor([[0] * 4 + [1] * 5] * 2, dtype=torch.int32)
    mixed = ElasticPlan((8, 32, 20, 20), 4, MixedExits(2, 0.5, key=3))
    for plan in (ElasticPlan((8, 32, 20, 20), 4), ElasticPlan((32, 32, 8, 8), 3), mixed):
        losses = [model(tokens, labels, seq_idx, plan) for model in (plain, recomputed)]
        torch.autograd.backward(losses)
        assert torch.equal(*losses)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, recomputed.get_parameter(name).grad), name
    assert torch.equal(plain(tokens), recomputed(tokens))


def test_no_plan_is_full_width_to_the_last_layer():
    model = random_model(model_config())
    tokens, labels = random_batch()
    assert torch.equal(model(tokens, labels), model(tokens, labels, plan=ElasticPlan((32, 32, 32), 3)))


def test_a_batch_of_zero_tokens_has_zero_loss_and_zero_gradients():
    model = random_model(model_config("TMT", mamba_num_groups=2))
    for rows, seq in ((0, 5), (0, 0)):
        empty = torch.zeros(rows, seq, dtype=torch.int64)
        assert model(empty).shape == (rows, seq, VOCAB)
        loss = model(empty, empty, plan=uniform_plan(model.config, 8))
        loss.backward()
        assert loss.item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_batch_without_scored_positions_has_zero_loss_and_zero_gradients():
    model = random_model(model_config())
    tokens, labels = random_batch()
    loss = model(tokens, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_initial_weights_are_a_pure_function_of_seed_and_name():
    config = model_config("TMT")
    first, second = AdambaModel(config).initialize(7), AdambaModel(config).initialize(7)
    other = AdambaModel(config).initialize(8)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
        assert parameter.isfinite().all()
    drawn = {spec.name for spec in manifest(config) if spec.init in ("linear", "conv", "embedding", "head", "dt_bias")}
    for name in drawn:
        assert not torch.equal(first.get_parameter(name), other.get_parameter(name)), name


def test_initial_weights_do_not_depend_on_the_rest_of_the_model():
    """Fewer blocks, other widths, tied ends, another order: what keeps its name and shape keeps its values."""
    long = AdambaModel(model_config("TMTM")).initialize(3)
    short = AdambaModel(model_config("TM", nest=None, widths=[16, 32], linear_bias=False)).initialize(3)
    for name, parameter in short.named_parameters():
        if parameter.shape == long.get_parameter(name).shape:
            assert torch.equal(parameter, long.get_parameter(name)), name
    before = torch.get_rng_state()
    for spec in reversed(manifest(long.config)):
        assert torch.equal(initial_tensor(spec, 3), long.get_parameter(spec.name)), spec.name
    assert torch.equal(before, torch.get_rng_state())  # and leave the global generator alone


def test_two_tensors_of_one_shape_differ():
    model = AdambaModel(model_config("TT")).initialize(0)
    first, second = (model.blocks[index].attention.qkv for index in (0, 1))
    assert not torch.equal(first.q_weight, second.q_weight)
    assert not torch.equal(first.k_weight, first.v_weight)


@pytest.mark.parametrize("version", [1, 2])
def test_initial_values_are_what_their_rules_say(version):
    config = model_config("TM", mamba_version=version, hidden_size=64, ffn_size=192, nest=None, widths=[64])
    model = AdambaModel(config).initialize(0)
    tokens, labels = random_batch()
    for spec in manifest(config):
        values = model.get_parameter(spec.name).detach()
        if spec.init in ("output", "zeros"):
            assert not values.any()
        elif spec.init == "ones":
            assert (values == 1).all()
        elif spec.init == "linear":
            assert abs(values.std() * spec.shape[1] ** 0.5 - 1) < 0.15, spec.name
        elif spec.init == "dt_bias":
            step = torch.nn.functional.softplus(values)
            assert step.min() >= DT_MIN * 0.999 and step.max() <= DT_MAX * 1.001
        elif spec.init == "a_log_uniform":
            assert values.exp().min() >= 1 and values.exp().max() <= 16
        elif spec.init == "a_log_arange":
            assert torch.equal(values.exp().round(), torch.arange(1.0, 9.0).expand(128, 8))
    # zero output projections: every block is the identity, so leaving early changes nothing
    losses = [model(tokens, labels, plan=ElasticPlan((64, 64), depth)).item() for depth in (0, 1, 2)]
    assert losses[0] == losses[1] == losses[2]
    assert abs(losses[0] - torch.tensor(float(VOCAB)).log().item()) < 0.05


def test_an_unknown_initialisation_is_refused():
    with pytest.raises(ConfigError, match=r"x\.weight: unknown initialisation 'fancy'"):
        initial_tensor(ParamSpec("x.weight", (2,), "norm", "vector", "fancy"), 0)


def test_bfloat16_weights_stay_close_to_float32():
    model = random_model(model_config())
    tokens, labels = random_batch()
    want = model(tokens, labels).item()
    model.bfloat16()
    loss = model(tokens, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss.item() - want) < 0.1
    assert model(tokens).dtype == torch.float32
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())
