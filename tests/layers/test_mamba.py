"""The mixers against transformers' own, and against themselves: packed, step by step, continued."""

import math

import pytest
import torch

from megatron_adamba.layers.mamba import Mamba1Mixer, Mamba2Mixer


def fill(mixer, seed=0):
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            values = torch.randn(p.shape, generator=gen)
            if name in ("dt_bias", "dt_proj.bias"):
                values = values - 2
            elif name == "A_log":
                values = values.abs()
            elif p.dim() == 2 and name != "conv1d.weight":
                values = values / math.sqrt(p.shape[1])
            p.copy_(values)
    return mixer


def mamba2(**changes):
    sizes = {"hidden_size": 32, "d_state": 8, "head_dim": 8, "num_groups": 2, "chunk_size": 16} | changes
    return fill(Mamba2Mixer(**sizes))


def mamba1(**changes):
    return fill(Mamba1Mixer(**({"hidden_size": 32, "d_state": 8} | changes)))


BOTH = pytest.mark.parametrize("make", [mamba1, mamba2])


def near(got, want, tolerance=1e-5):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def compare_with_transformers(ours, theirs):
    """Copies our weights over, then compares the output and every gradient."""
    state = ours.state_dict()
    state["conv1d.weight"] = state["conv1d.weight"].unsqueeze(1)
    theirs.load_state_dict(state)
    x = torch.randn(2, 45, ours.hidden_size, generator=torch.Generator().manual_seed(1))
    xs = [x.clone().requires_grad_() for _ in range(2)]
    got, want = ours(xs[0]), theirs(xs[1])
    near(got, want)
    seed = torch.randn_like(want)
    torch.autograd.backward([got, want], [seed, seed])
    near(xs[0].grad, xs[1].grad)
    for name, p in theirs.named_parameters():
        near(ours.get_parameter(name).grad, p.grad.view_as(ours.get_parameter(name)), 2e-5 if name == "A_log" else 1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_transformers_mamba2(groups):
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as Theirs

    config = Mamba2Config(
        hidden_size=32, state_size=8, head_dim=8, num_heads=8, n_groups=groups, chunk_size=16, num_hidden_layers=1,
        layer_norm_epsilon=1e-5,
    )  # fmt: skip
    compare_with_transformers(mamba2(num_groups=groups), Theirs(config, 0))


@pytest.mark.oracle
def test_mamba1_is_transformers_mamba():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer as Theirs

    config = MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=1)
    compare_with_transformers(mamba1(), Theirs(config, 0))


@BOTH
def test_packed_documents_equal_one_at_a_time(make):
    mixer = make()
    lengths = [1, 2, 13, 16, 21]
    docs = [torch.randn(1, n, 32) for n in lengths]
    idx = torch.repeat_interleave(torch.arange(5, dtype=torch.int32), torch.tensor(lengths)).unsqueeze(0)
    packed = mixer(torch.cat(docs, dim=1), seq_idx=idx)
    near(packed, torch.cat([mixer(doc) for doc in docs], dim=1))


@BOTH
@pytest.mark.parametrize("pieces", [[1] * 9, [5, 1, 1, 2], [2, 7], [1, 8]])
def test_cache_goes_on_where_it_stopped(make, pieces):
    mixer = make()
    x = torch.randn(2, 9, 32)
    cache = mixer.new_state(2)
    held = (cache.conv_state, cache.ssm_state)
    with torch.no_grad():
        outputs = [mixer(piece, cache=cache) for piece in x.split(pieces, dim=1)]
        near(torch.cat(outputs, dim=1), mixer(x))
    assert held[0] is cache.conv_state and held[1] is cache.ssm_state  # in place


@BOTH
def test_no_tokens_give_zero_gradients(make):
    mixer = make()
    mixer(torch.zeros(0, 4, 32)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in mixer.parameters())


@BOTH
def test_bfloat16_parameters(make):
    mixer, x = make().bfloat16(), torch.randn(2, 20, 32).bfloat16()
    want = mixer(x)
    assert want.dtype == torch.bfloat16
    near(want.float(), mixer.float()(x.float()), 0.05)
    mixer.bfloat16()
    cache = mixer.new_state(2)
    with torch.no_grad():
        steps = [mixer(t, cache=cache) for t in x.split(1, dim=1)]
    near(torch.cat(steps, dim=1).float(), want.float(), 0.05)
    assert cache.ssm_state.dtype == cache.conv_state.dtype == torch.float32


def test_parameter_names_and_shapes():
    with torch.device("meta"):
        two = Mamba2Mixer(32, d_state=8, head_dim=8, num_groups=2)
        one = Mamba1Mixer(32, d_state=8)
    assert {name: tuple(p.shape) for name, p in two.named_parameters()} == {
        "in_proj.weight": (2 * 64 + 2 * 2 * 8 + 8, 32),
        "conv1d.weight": (64 + 2 * 2 * 8, 4),
        "conv1d.bias": (64 + 2 * 2 * 8,),
        "dt_bias": (8,),
        "A_log": (8,),
        "D": (8,),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
    }
    assert {name: tuple(p.shape) for name, p in one.named_parameters()} == {
        "in_proj.weight": (128, 32),
        "conv1d.weight": (64, 4),
        "conv1d.bias": (64,),
        "x_proj.weight": (2 + 16, 64),
        "dt_proj.weight": (64, 2),
        "dt_proj.bias": (64,),
        "A_log": (64, 8),
        "D": (64,),
        "out_proj.weight": (32, 64),
    }


def test_building_draws_no_random_numbers():
    before = torch.get_rng_state()
    Mamba2Mixer(32, d_state=8, head_dim=8)
    Mamba1Mixer(32)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("sizes", [{"head_dim": 7}, {"head_dim": 8, "num_groups": 3}])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="must divide"):
        Mamba2Mixer(32, d_state=8, **sizes)
