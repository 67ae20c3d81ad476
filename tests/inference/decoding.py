"""Small random models, and text made by them step by step."""

from __future__ import annotations

import torch
from oracles.dense import randomize

from megatron_adamba.blueprint.resolve import resolve_model
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.sections import GatesConfig
from megatron_adamba.data.tokenizer import ByteTokenizer
from megatron_adamba.elastic.plan import ElasticPlan
from megatron_adamba.inference.decoder import Decoder
from megatron_adamba.inference.generate import Generation, GenerationRequest, NewToken
from megatron_adamba.inference.load import LoadedModel
from megatron_adamba.inference.policy import ComputePolicy
from megatron_adamba.inference.sampling import Sampling
from megatron_adamba.layers.gates import Gates
from megatron_adamba.model.adamba import AdambaModel

VOCAB, WIDTHS = 37, [8, 16, 32]
TOLERANCE = 5e-5
"""of logits up to 10: the scan over a sequence and its single steps add up in another order"""


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


def random_gates(model, spread: float = 1.5) -> Gates:
    """Outputs about zero, so that tokens leave everywhere and some widen."""
    gates = Gates(model.config)
    randomize(gates, seed=5)
    with torch.no_grad():
        for name, parameter in gates.named_parameters():
            if name.endswith("down.weight"):
                parameter.mul_(spread)
            elif name.endswith("confidence_gate.down.bias"):
                parameter.fill_(0.0)
            elif name.endswith("expansion_gate.down.bias"):
                parameter.fill_(-0.6)
    return gates.requires_grad_(False)


def random_prompt(batch: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(4))


def begun(model: AdambaModel, plan: ElasticPlan, prompt: torch.Tensor, capacity: int) -> tuple[Decoder, torch.Tensor]:
    """A decoder that has read prompts [batch, length], and the logits behind them, [batch, vocab]."""
    decoder = Decoder(model, prompt.shape[0], capacity)
    logits = []
    for slot, tokens in enumerate(prompt):
        decoder.begin(slot, ComputePolicy(plan))
        logits.append(decoder.prefill(slot, tokens).logits)
    return decoder, torch.cat(logits)


def step_by_step(model: AdambaModel, plan: ElasticPlan, prompt: torch.Tensor, steps: int = 9) -> None:
    """Each step's logits are those of a full pass over everything so far, and so is the token taken."""
    decoder, got = begun(model, plan, prompt, prompt.shape[1] + steps)
    slots, so_far, greedy = list(range(prompt.shape[0])), prompt, []
    for number in range(steps):
        want = model(so_far, plan=plan)[:, -1]
        assert got.shape == (prompt.shape[0], VOCAB) and got.dtype == torch.float32
        assert (got - want).abs().max() <= TOLERANCE
        token = want.argmax(-1)
        assert torch.equal(got.argmax(-1), token)
        greedy.append(token)
        so_far = torch.cat([so_far, token[:, None]], dim=1)
        if number + 1 < steps:
            got = decoder.step(slots, token).logits
    assert torch.equal(generated(model, prompt, plan, steps), torch.stack(greedy, dim=1))


def loaded_model(model: AdambaModel, gates: Gates | None = None, **changes) -> LoadedModel:
    """As if read from a checkpoint; its tokens are bytes, though it may know fewer. changes: of the gates' config."""
    return LoadedModel(model, gates, GatesConfig(**changes), 1, ByteTokenizer(), torch.device("cpu"))


def generated(
    model: AdambaModel, prompt: torch.Tensor, plan: ElasticPlan, steps: int, sampling: Sampling | None = None
) -> torch.Tensor:
    """[batch, steps] new tokens of prompts [batch, length] of one length."""
    generation = Generation(loaded_model(model), prompt.shape[0], prompt.shape[1] + steps)
    request = lambda row: GenerationRequest(tuple(row), ComputePolicy(plan), steps, sampling or Sampling())
    first = [generation.add(request(row))[1] for row in prompt.tolist()]
    return torch.tensor([[new.token for new in news] for news in by_request(first, generation)])


def by_request(first: list[NewToken], generation: Generation) -> list[list[NewToken]]:
    """Run to the end: the tokens of each request."""
    rows: dict[int, list[NewToken]] = {new.number: [new] for new in first}
    while generation.running:
        for new in generation.step():
            rows[new.number].append(new)
    return list(rows.values())
