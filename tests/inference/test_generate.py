"""Generation with caches against full forward passes, and how a token is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from inference.decoding import (
    TOLERANCE,
    WIDTHS,
    begun,
    generated,
    loaded_model,
    random_model,
    random_prompt,
    step_by_step,
)

from megatron_adamba.elastic.plan import ElasticPlan, uniform_plan
from megatron_adamba.errors import ConfigError
from megatron_adamba.inference.decoder import Decoder
from megatron_adamba.inference.generate import Generation, GenerationRequest
from megatron_adamba.inference.policy import ComputePolicy
from megatron_adamba.inference.sampling import Sampling, choose

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
    decoder, _ = begun(model, plan, random_prompt(), 8)
    assert [decoder.narrow[index].keys.numel() > 0 for index in (0, 2)] == [exit_layer > 0, exit_layer > 2]


@pytest.mark.parametrize("length", [1, 4, 13])
def test_prompts_of_any_length(length):
    """One token, the size of a chunk of the scan, and a length that chunks do not divide."""
    model = random_model(block_pattern="TMM", sliding_window=3, window_pattern="S")
    step_by_step(model, uniform_plan(model.config, 16), random_prompt(1, length), steps=5)


def test_the_cache_holds_the_groups_of_its_width_alone():
    model = random_model(block_pattern="TM", num_kv_groups=4)
    for width, groups in zip(WIDTHS, (1, 2, 4)):
        decoder, _ = begun(model, uniform_plan(model.config, width), random_prompt(3), 7)
        assert decoder.narrow[0].keys.shape == (groups, 3, 7, 8)


def test_a_window_is_a_ring():
    model = random_model(block_pattern="TT", sliding_window=3, window_pattern="SL")
    decoder, _ = begun(model, uniform_plan(model.config, 32), random_prompt(2, 20), 100)
    assert decoder.narrow[0].keys.shape[2] == 3 and decoder.narrow[1].keys.shape[2] == 64
    per_place = 2 * 2 * 4 * 8 * 4
    assert decoder.cache_bytes == 3 * per_place + 64 * per_place


@pytest.mark.parametrize("pieces", [[3, 4, 1], [1, 1, 6], [8], [7, 1]])
@pytest.mark.parametrize("version", [1, 2])
def test_a_prompt_may_arrive_in_pieces(pieces, version):
    model = random_model(block_pattern="TMT", mamba_version=version, sliding_window=3, window_pattern="SL")
    plan, prompt = uniform_plan(model.config, 32), random_prompt(2, 8)
    decoder = Decoder(model, 2, 8)
    for slot, row in enumerate(prompt):
        decoder.begin(slot, ComputePolicy(plan))
        for piece in row.split(pieces):
            logits = decoder.prefill(slot, piece).logits
        assert (logits - model(row[None], plan=plan)[:, -1]).abs().max() <= TOLERANCE


def test_rows_of_a_batch_do_not_meet():
    model = random_model(block_pattern="TM")
    plan, prompt = uniform_plan(model.config, 16), random_prompt(3)
    together = generated(model, prompt, plan, 6)
    alone = [generated(model, row[None], plan, 6) for row in prompt]
    assert torch.equal(together, torch.cat(alone))


def tokens_of(model, sampling: Sampling, steps: int = 12) -> list[int]:
    plan = uniform_plan(model.config, 32)
    return generated(model, random_prompt(1), plan, steps, sampling)[0].tolist()


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, r"--max-new-tokens 0: must be above 0"),
        ({"prompt": ()}, r"--prompt: is empty"),
        ({"sampling": Sampling(temperature=-1.0)}, r"--temperature -1.0: must lie between 0 and 100"),
        ({"sampling": Sampling(top_k=-1)}, r"--top-k -1: must lie between"),
        ({"sampling": Sampling(top_p=1.5)}, r"--top-p 1.5: must lie between 0 and 1"),
        ({"sampling": Sampling(temperature=float("nan"))}, r"--temperature nan"),
        ({"sampling": Sampling(repetition_penalty=0.0)}, r"--repetition-penalty 0.0: must lie between 0.01 and 100"),
        ({"sampling": Sampling(seed=-1)}, r"--seed -1: must lie between"),
        ({"max_new_tokens": 8}, r"--max-new-tokens 8: with a prompt of 2 tokens .* the 9 of this context; at most 7"),
    ],
)
def test_what_cannot_be_generated_is_refused(changes, message):
    model = random_model(block_pattern="T")
    generation = Generation(loaded_model(model), 1, 9)
    policy = ComputePolicy(uniform_plan(model.config, 32))
    with pytest.raises(ConfigError, match=message):
        generation.add(GenerationRequest(**{"prompt": (1, 2), "policy": policy, "max_new_tokens": 3} | changes))
    assert generation.free == [0] and not generation.running


def test_a_request_that_fails_gives_its_place_back():
    """A token id that the tokenizer does not know, and a model whose logits are not finite; the next one runs."""
    loaded = loaded_model(random_model(block_pattern="T"))
    policy = ComputePolicy(uniform_plan(loaded.model.config, 32))
    generation = Generation(loaded, 2, 20)
    request = GenerationRequest((1, 2), policy, 4, Sampling(temperature=1.0))
    with pytest.raises(ConfigError, match="token id 37 is not in the vocabulary of 37"):
        generation.add(replace(request, prompt=(1, 37)))
    weight = loaded.model.head.weight.clone()
    loaded.model.head.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError):
        generation.add(request)
    assert generation.free == [0, 1] and not generation.running and not generation.kept
    loaded.model.head.weight.copy_(weight)
    sequence, _ = generation.add(request)
    assert sequence.slot == 0 and len(generation.step()) == 1


def test_a_turn_that_fails_is_not_gone_on_from():
    """What is refused leaves the caches as they are; what breaks off half-way has spoiled them."""
    loaded = loaded_model(random_model(block_pattern="T"))
    request = GenerationRequest((1, 2), ComputePolicy(uniform_plan(loaded.model.config, 32)), 1)
    generation = Generation(loaded, 1, 20)
    sequence, _ = generation.add(request)
    with pytest.raises(ConfigError, match="token id 37"):
        generation.go_on(sequence.number, replace(request, prompt=(37,)))
    generation.go_on(sequence.number, request)
    loaded.model.head.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError):
        generation.go_on(sequence.number, replace(request, sampling=Sampling(temperature=1.0)))
    assert generation.free == [0] and not generation.running and not generation.kept


def test_padding_of_the_vocabulary_is_never_chosen():
    """The model knows more ids than the tokenizer."""
    loaded = loaded_model(random_model(block_pattern="T", vocab_size=300))
    loaded.model.head.weight[257:] *= 100
    generation = Generation(loaded, 1, 50)
    request = GenerationRequest((1,), ComputePolicy(uniform_plan(loaded.model.config, 32)), 30, stop_at_eod=False)
    made = [generation.add(request)[1].token]
    while generation.running:
        made += [new.token for new in generation.step()]
    assert len(made) == 30 and max(made) < 257


def test_a_width_outside_the_nest_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"width 15: not in this model's nest \[8, 16, 32\]; try 16"):
        uniform_plan(random_model(block_pattern="T").config, 15)
