"""Generation with caches against full forward passes, and how a token is chosen."""

from __future__ import annotations

import pytest
import torch
from oracles.dense import randomize

from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.elastic.plan import ElasticPlan, uniform_plan
from megatron_adamba.errors import ConfigError
from megatron_adamba.inference.generate import Sampling, choose, generate, make_caches
from megatron_adamba.model.adamba import AdambaModel

VOCAB, WIDTHS = 37, [8, 16, 32]
TOLERANCE = 5e-5
"""of logits up to 10: the scan over a sequence and its single steps add up in another order"""
MODELS = {
    "attention": {"block_pattern": "TT"},
    "attention, grouped, tied": {
        "block_pattern": "TT",
        "tie_embeddings": True,
        "num_kv_groups": 2,
        "logit_softcap": 5.0,
    },
    "windows": {"block_pattern": "TTT", "sliding_window": 3, "window_pattern": "SLS", "num_kv_groups": 2},
    "mamba 1": {"block_pattern": "MM", "mamba_version": 1},
    "mamba 2": {"block_pattern": "MM", "mamba_num_groups": 2},
    "hybrid": {"block_pattern": "TMT", "activation": "swiglu", "linear_bias": True, "num_kv_groups": 2},
    "hybrid of mamba 1, tied": {"block_pattern": "MTM", "mamba_version": 1, "tie_embeddings": True},
    "hybrid with windows, negative rope": {
        "block_pattern": "MTMT",
        "mamba_use_mlp": False,
        "sliding_window": 2,
        "window_pattern": "S",
        "rope_sign": -1,
        "qk_norm": False,
    },
}


def random_model(**changes) -> AdambaModel:
    shape = {
        "hidden_size": 32,
        "vocab_size": VOCAB,
        "head_dim": 8,
        "num_heads": 4,
        "ffn_granule": 16,
        "widths": WIDTHS,
        "mamba_d_state": 8,
        "mamba_head_dim": 8,
        "mamba_chunk_size": 4,
        "mamba_use_mlp": True,
        **changes,
    }
    model = AdambaModel(resolve_model(ModelConfig(**shape)))
    randomize(model, seed=11)
    return model.requires_grad_(False).eval()


def random_prompt(batch: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(4))


def step_by_step(model: AdambaModel, plan: ElasticPlan, prompt: torch.Tensor, steps: int = 9) -> None:
    """Each step's logits are those of a full pass over everything so far, and so is the token taken."""
    caches = make_caches(model, plan, prompt.shape[0], prompt.shape[1] + steps)
    fed, so_far, greedy = prompt, prompt, []
    for _ in range(steps):
        got = model.forward_cached(fed, plan, caches)
        want = model(so_far, plan=plan)[:, -1]
        assert got.shape == (prompt.shape[0], VOCAB) and got.dtype == torch.float32
        assert (got - want).abs().max() <= TOLERANCE
        fed = want.argmax(-1, keepdim=True)
        assert torch.equal(got.argmax(-1, keepdim=True), fed)
        greedy.append(fed)
        so_far = torch.cat([so_far, fed], dim=1)
    made = torch.stack(list(generate(model, prompt, plan, steps, Sampling())), dim=1)
    assert torch.equal(made, torch.cat(greedy, dim=1))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", MODELS)
def test_caches_change_nothing(name, width):
    model = random_model(**MODELS[name])
    step_by_step(model, uniform_plan(model.config, width), random_prompt())


@pytest.mark.parametrize("widths", [(8, 32, 16, 8), (32, 8, 8, 16)])
@pytest.mark.parametrize("version", [1, 2])
def test_caches_with_a_width_for_each_layer(widths, version):
    model = random_model(block_pattern="TMTM", mamba_version=version, num_kv_groups=4)
    step_by_step(model, ElasticPlan(widths, 4), random_prompt(3, 2))


@pytest.mark.parametrize("exit_layer", [0, 1, 3])
def test_caches_with_an_early_exit(exit_layer):
    model = random_model(block_pattern="TMT")
    plan = ElasticPlan((16, 16, 16), exit_layer)
    step_by_step(model, plan, random_prompt())
    assert [cache is None for cache in make_caches(model, plan, 1, 4)] == [i >= exit_layer for i in range(3)]


@pytest.mark.parametrize("length", [1, 4, 13])
def test_prompts_of_any_length(length):
    """One token, the size of a chunk of the scan, and a length that chunks do not divide."""
    model = random_model(block_pattern="TMM", sliding_window=3, window_pattern="S")
    step_by_step(model, uniform_plan(model.config, 16), random_prompt(1, length), steps=5)


def test_the_cache_holds_the_groups_of_its_width_alone():
    model = random_model(block_pattern="TM", num_kv_groups=4)
    for width, groups in zip(WIDTHS, (1, 2, 4)):
        keys = make_caches(model, uniform_plan(model.config, width), 3, 7)[0].keys
        assert keys.shape == (3, 7, groups, 8)


def test_a_prompt_may_arrive_in_pieces():
    model = random_model(block_pattern="TMT")
    plan, prompt = uniform_plan(model.config, 32), random_prompt(2, 8)
    caches = make_caches(model, plan, 2, 8)
    for piece in prompt.split([3, 4, 1], dim=1):
        logits = model.forward_cached(piece, plan, caches)
    assert (logits - model(prompt, plan=plan)[:, -1]).abs().max() <= TOLERANCE


def test_rows_of_a_batch_do_not_meet():
    model = random_model(block_pattern="TM")
    plan, prompt = uniform_plan(model.config, 16), random_prompt(3)
    together = torch.stack(list(generate(model, prompt, plan, 6, Sampling())), dim=1)
    alone = [torch.stack(list(generate(model, row[None], plan, 6, Sampling())), dim=1) for row in prompt]
    assert torch.equal(together, torch.cat(alone))


def tokens_of(model, sampling: Sampling, steps: int = 12) -> list[int]:
    plan = uniform_plan(model.config, 32)
    return [int(token) for token in generate(model, random_prompt(1), plan, steps, sampling)]


def test_a_seed_gives_one_text_and_another_seed_another():
    model = random_model(block_pattern="TM")
    first = tokens_of(model, Sampling(temperature=1.5, seed=1))
    torch.manual_seed(123)  # somebody else's generator is none of its business
    assert first == tokens_of(model, Sampling(temperature=1.5, seed=1))
    assert first != tokens_of(model, Sampling(temperature=1.5, seed=2))


def test_narrow_sampling_is_greedy():
    model = random_model(block_pattern="TM")
    greedy = tokens_of(model, Sampling())
    assert greedy == tokens_of(model, Sampling(temperature=3.0, top_k=1))
    assert greedy == tokens_of(model, Sampling(temperature=3.0, top_p=0.0))
    assert greedy == tokens_of(model, Sampling(temperature=1e-4))


def draws(logits: torch.Tensor, sampling: Sampling, count: int = 4000) -> torch.Tensor:
    """Share of each token among many draws."""
    generator = torch.Generator().manual_seed(0)
    picked = choose(logits.expand(count, -1), sampling, generator)
    return torch.bincount(picked, minlength=logits.shape[-1]) / count


LOGITS = torch.tensor([[0.5, 0.1, 0.25, 0.15]]).log()


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(temperature=1.0), [0.5, 0.1, 0.25, 0.15]),
        (Sampling(temperature=0.5), [0.25 / 0.345, 0.01 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345]),
        (Sampling(temperature=1.0, top_k=2), [2 / 3, 0, 1 / 3, 0]),
        (Sampling(temperature=1.0, top_k=99), [0.5, 0.1, 0.25, 0.15]),
        (Sampling(temperature=1.0, top_p=0.5), [1, 0, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.6), [2 / 3, 0, 1 / 3, 0]),
        (Sampling(temperature=1.0, top_p=0.8), [0.5 / 0.9, 0, 0.25 / 0.9, 0.15 / 0.9]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.8), [2 / 3, 0, 1 / 3, 0]),
    ],
)
def test_tokens_come_up_as_often_as_they_should(sampling, shares):
    """top_k first, then the smallest set that reaches top_p of what is left."""
    got = draws(LOGITS, sampling)
    for share, want in zip(got.tolist(), shares):
        assert share == 0 if want == 0 else abs(share - want) < 0.04


def test_it_stops_when_every_row_has_stopped():
    model = random_model(block_pattern="TT")
    plan, prompt = uniform_plan(model.config, 32), random_prompt(2)
    full = torch.stack(list(generate(model, prompt, plan, 12, Sampling())), dim=1)
    stop = int(full[0, 3])
    made = torch.stack(list(generate(model, prompt, plan, 12, Sampling(), stop_token=stop)), dim=1)
    hits = [(row == stop).nonzero().flatten().tolist() for row in full]
    length = max(hit[0] for hit in hits) + 1 if all(hits) else 12
    assert torch.equal(made, full[:, :length])
    alone = list(generate(model, prompt[:1], plan, 12, Sampling(), stop_token=stop))
    assert int(alone[-1]) == stop and len(alone) == hits[0][0] + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, r"--max-new-tokens 0: must be above 0"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.int64)}, r"--prompt: is empty"),
        ({"sampling": Sampling(temperature=-1.0)}, r"--temperature -1.0: must lie between 0 and 100"),
        ({"sampling": Sampling(top_k=-1)}, r"--top-k -1: must lie between"),
        ({"sampling": Sampling(top_p=1.5)}, r"--top-p 1.5: must lie between 0 and 1"),
        ({"sampling": Sampling(temperature=float("nan"))}, r"--temperature nan"),
    ],
)
def test_what_cannot_be_generated_is_refused(changes, message):
    model = random_model(block_pattern="T")
    arguments = {
        "prompt": random_prompt(1),
        "plan": uniform_plan(model.config, 32),
        "max_new_tokens": 3,
        "sampling": Sampling(),
        **changes,
    }
    with pytest.raises(ConfigError, match=message):
        next(generate(model, **arguments))


def test_a_width_outside_the_nest_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"width 15: not in this model's nest \[8, 16, 32\]; try 16"):
        uniform_plan(random_model(block_pattern="T").config, 15)
