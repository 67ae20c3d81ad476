"""What gates learn from: states, losses and documents of a pass, against the model run again and sums by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from distributed.curve import SEQ_LEN, build_model, micro_batch, run_config
from distributed.gate_parts import SPANS, gate_setup

from megatron_adamba.data.documents import prompt_spans
from megatron_adamba.elastic.confidence import GateReading, deviance
from megatron_adamba.elastic.plan import ElasticPlan, full_plan
from megatron_adamba.model.taps import Taps
from megatron_adamba.parallel.topology import single_process
from megatron_adamba.training.gates import LET_GO, GateTrainer

DEVICE = torch.device("cpu")


def tapped(arguments, plan=None, step=3, target="relative", noise=0.0):
    """A pass that leaves taps: (config, model, its batch, setup, plan, taps, loss); noise: added to all weights."""
    config = run_config(**arguments)
    model = build_model(config, [])
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    setup = gate_setup(config, SEQ_LEN, target=target)
    batch, plan = micro_batch(step, 0), plan or full_plan(config.model)
    taps = Taps(setup.request(step, SPANS, DEVICE))
    loss = model(**batch, plan=plan, taps=taps)
    return config, model, batch, setup, plan, taps, loss


@pytest.mark.parametrize(
    "arguments", [{"pattern": "TMTM"}, {"pattern": "MTT", "tie_embeddings": True, "logit_softcap": 5.0}]
)
def test_losses_of_leaving_are_those_of_plans_that_leave(arguments):
    arguments = arguments | {"sampling": "sandwich", "gate_size": 8}
    plan = ElasticPlan((32, 64, 8, 32)[: len(arguments["pattern"])], len(arguments["pattern"]))
    _, model, batch, setup, plan, taps, loss = tapped(arguments, plan)
    assert loss.item() == model(**batch, plan=plan).item()
    whole = model(**batch, plan=plan, reduction="none")
    assert torch.allclose(taps.token_losses, whole, atol=1e-6) and (whole == 0).any()
    assert setup.layers == tuple(range(1, model.config.num_layers))
    for place, layer in enumerate(setup.layers):
        left = model(**batch, plan=replace(plan, exit_layer=layer), reduction="none")
        expected = left[:, taps.request.positions]
        assert torch.allclose(taps.exit_losses[:, place], expected, atol=1e-5) and expected.abs().max() > 1
        assert not taps.layer(layer).requires_grad


def divergence_when_leaving(model, batch, plan, layer):
    """[batch, seq], by torch's kl_div of what the model predicts where the plan leaves there."""
    parts = {key: value for key, value in batch.items() if key != "labels"}
    exits = (model(**parts, plan=replace(plan, exit_layer=exit_layer)) for exit_layer in (layer, plan.exit_layer))
    left, whole = (torch.log_softmax(logits.detach().double(), -1) for logits in exits)
    return torch.nn.functional.kl_div(left, whole, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize(
    "arguments", [{"pattern": "TMTM"}, {"pattern": "MTT", "tie_embeddings": True, "logit_softcap": 5.0}]
)
def test_divergences_of_leaving_are_those_of_plans_that_leave(arguments):
    arguments = arguments | {"sampling": "sandwich", "gate_size": 8}
    plan = ElasticPlan((32, 64, 8, 32)[: len(arguments["pattern"])], len(arguments["pattern"]))
    _, model, batch, setup, plan, taps, loss = tapped(arguments, plan, target="divergence", noise=0.2)
    assert loss.item() == model(**batch, plan=plan).item() and not taps.exit_losses.numel()
    for place, layer in enumerate(setup.layers):
        want = divergence_when_leaving(model, batch, plan, layer)[:, taps.request.positions]
        assert torch.allclose(taps.divergences[:, place].double(), want, rtol=1e-4, atol=1e-6)
        assert want.max() > 1e-3 and not taps.divergences.requires_grad


def test_mean_embeddings():
    _, model, batch, _, _, taps, _ = tapped({"pattern": "TM", "sampling": "sandwich", "gate_size": 8})
    embedded = model.embedding(batch["tokens"]).detach()
    for row, documents in enumerate(SPANS.tolist()):
        for place, (first, read, _) in enumerate(documents):
            expected = embedded[row, first : first + read].mean(0) if read else torch.zeros(64)
            assert torch.allclose(taps.mean_embeddings[row, place], expected, atol=1e-6)


def test_positions_are_of_the_step_alone():
    setup = gate_setup(run_config(sampling="sandwich", gate_size=8), SEQ_LEN)
    first, again, other = (setup.request(step, SPANS, DEVICE).positions for step in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(set(first.tolist())) == 5 and first.min() >= 0 and first.max() < SEQ_LEN


def half_deviance(predicted: float, wanted: float) -> float:
    if wanted > 0:
        return predicted - wanted + wanted * math.log(wanted / (predicted + 1e-8))
    return predicted + abs(wanted) * math.log((predicted + 1e-8) / 1e-8)


LOSSES = {"squared_error": lambda predicted, wanted: (predicted - wanted) ** 2, "deviance": half_deviance}


@pytest.mark.parametrize("target", ["relative", "signed", "divergence"])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_errors_are_those_of_the_formulas(loss, target):
    """Confidence with its discount, expansion and regret, in float64 by loops."""
    arguments = {"pattern": "TMTM", "sampling": "sandwich", "gate_size": 8}
    _, model, batch, setup, plan, full, _ = tapped(arguments, target=target)
    setup = replace(setup, gates=replace(setup.gates, loss=loss))
    narrow_plan = ElasticPlan((32, 64, 8, 32), 4)
    plans = [plan, narrow_plan]
    narrow = Taps(full.request)
    model(**batch, plan=narrow_plan, taps=narrow)
    trainer = GateTrainer(setup, single_process(), DEVICE)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.gates.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    gates = trainer.gates.double()
    apart = [{layer: divergence_when_leaving(model, batch, taken, layer) for layer in setup.layers} for taken in plans]
    expected = np.zeros(3)
    positions = full.request.positions.tolist()
    scored = batch["labels"] != -100
    let_go = gains = 0
    for number, taps in enumerate((full, narrow)):
        total = weights = lost = count = 0.0
        for row in range(2):
            for place, position in enumerate(positions):
                if not scored[row, position]:
                    continue
                gone = False
                final = taps.token_losses[row, position].item()
                for index, layer in enumerate(setup.layers):
                    state = taps.layer(layer)[row, place].double()
                    cost = torch.nn.functional.softplus(gates.leaving(layer, state)).item()
                    if target == "divergence":
                        wanted = apart[number][layer][row, position].item()
                    else:
                        wanted = taps.exit_losses[row, index, place].item() - final
                    gains += wanted < 0
                    wanted = max(0.0, wanted) if target == "relative" else wanted
                    weight = LET_GO if gone else 1.0
                    let_go += gone
                    total, weights = total + weight * LOSSES[loss](cost, wanted), weights + weight
                    gone |= max(0.0, 1 - cost) > 0.95
                    if taps is narrow and layer >= 3:
                        grows = torch.nn.functional.softplus(gates.widening(layer, state)).item()
                        regret = max(0.0, final - full.token_losses[row, position].item())
                        lost, count = lost + (grows - regret) ** 2, count + 1
        expected[0] += total / weights / 2
        expected[1] += (lost / count if count else 0) / 2
    regrets, documents = 0.0, 0
    for row, spans in enumerate(SPANS.tolist()):
        for place, (first, read, end) in enumerate(spans):
            rest = [p for p in range(first + read, end) if scored[row, p]]
            if not rest:
                continue
            mean = sum((narrow.token_losses - full.token_losses)[row, p].item() for p in rest) / len(rest)
            scores = torch.sigmoid(gates.predictor(full.mean_embeddings[row, place].double()))
            shares = [(1 - width / 64) ** 2 for width in narrow_plan.widths]
            guess = setup.gates.regret_scale * sum(s.item() * share for s, share in zip(scores, shares))
            regrets, documents = regrets + (guess - mean) ** 2, documents + 1
    expected[2] = regrets / documents / 2
    assert let_go > 0 and (gains > 0 or target == "divergence") and documents == 3
    trainer.gates.float()
    found = trainer.learn(plans, [full, narrow], [SPANS])
    assert np.allclose(found.numpy(), expected, rtol=1e-4), (found, expected)


@pytest.mark.parametrize("last", [0.0, -0.3])
def test_deviance_has_the_mean_as_its_best_prediction(last):
    """Of costs of which most are 0 and some a gain."""
    costs = torch.tensor([0.0, 0.0, 0.0, 0.02, 1.3, last], dtype=torch.float64)
    guesses = torch.linspace(0.01, 1, 991, dtype=torch.float64)
    best = guesses[deviance(guesses[:, None], costs[None]).mean(1).argmin()]
    assert abs(best - costs.mean()) <= 1e-3


def test_deviance_at_its_ends():
    """0 and no more at the best prediction; gradients of an output are finite where the prediction vanishes."""
    wanted = torch.tensor([0.7, 0.0, -0.4], dtype=torch.float64)
    best = wanted.clamp(min=0)
    assert deviance(best, wanted).abs().max() < 1e-7 and (deviance(best + 0.01, wanted) > 1e-5).all()
    output = torch.tensor([-200.0, -200.0, -200.0, 3.0], requires_grad=True)
    deviance(torch.nn.functional.softplus(output), torch.tensor([0.0, 0.5, -0.5, 0.0])).sum().backward()
    assert output.grad.isfinite().all() and output.grad[0] == 0 and output.grad[3] > 0.9


def test_the_original_formulas():
    """Target sigmoid(2 - loss) for confidence, sigmoid(loss - 1) for every layer's score; by loops."""
    arguments = {"pattern": "TMTM", "sampling": "sandwich", "gate_size": 8}
    config, _, batch, _, plan, full, _ = tapped(arguments)
    setup = gate_setup(config, SEQ_LEN, predictor="original", target="absolute")
    trainer = GateTrainer(setup, single_process(), DEVICE)
    with torch.no_grad():
        trainer.gates.predictor.down.weight.normal_(generator=torch.Generator().manual_seed(1))
    scored, positions = batch["labels"] != -100, full.request.positions.tolist()
    total = weights = scores = documents = 0.0
    for row in range(2):
        for place, position in enumerate(positions):
            for index, layer in enumerate(setup.layers):
                if scored[row, position]:
                    guess = torch.sigmoid(-trainer.gates.leaving(layer, full.layer(layer)[row, place])).item()
                    # an untrained gate is at 0.12, so nobody passes 0.95
                    total += (guess - torch.sigmoid(2 - full.exit_losses[row, index, place]).item()) ** 2
                    weights += 1
        for place, (first, read, end) in enumerate(SPANS[row].tolist()):
            rest = [p for p in range(first + read, end) if scored[row, p]]
            if rest:
                mean = sum(full.token_losses[row, p].item() for p in rest) / len(rest)
                guess = trainer.gates.scores(full.mean_embeddings[row, place])
                scores += (guess - torch.sigmoid(torch.tensor(mean - 1))).square().mean().item()
                documents += 1
    found = trainer.learn([plan], [full], [SPANS])
    assert np.allclose(found.detach().numpy(), [total / weights, 0, scores / documents], rtol=1e-4)


@pytest.mark.parametrize("target", ["relative", "signed", "absolute"])
def test_readings(target):
    reading, outputs = GateReading(target, 1.0), torch.linspace(-9, 9, 50)
    assert ((reading.confidence(outputs) >= 0) & (reading.confidence(outputs) <= 1)).all()
    exits, final = torch.tensor([0.0, 3.0, 1.0]), torch.tensor([0.0, 1.0, 2.0])
    wanted = {"relative": [0.0, 2.0, 0.0], "signed": [0.0, 2.0, -1.0], "absolute": torch.sigmoid(2 - exits).tolist()}[
        target
    ]
    assert reading.wanted(exits, final).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("target", ["relative", "signed", "divergence", "absolute"])
def test_gates_that_have_learned_nothing_let_no_token_leave(target):
    setup = gate_setup(run_config(sampling="sandwich", gate_size=8, pattern="TMTM"), SEQ_LEN, target=target)
    trainer = GateTrainer(setup, single_process(), DEVICE)
    states = torch.randn(100, 64) * 3
    assert all(trainer.reading.confidence(trainer.gates.leaving(layer, states)).max() < 0.2 for layer in (1, 2, 3))
    assert torch.nn.functional.softplus(trainer.gates.widening(3, states)).max() < 0.5


def test_prompt_spans():
    eod, end = 0, 9
    tokens = np.array([[5, 0, 1, 2, 9, 3, 9, 0, 4, 4, 4, 4], [0, 1, 2, 3, 4, 5, 6, 0, 9, 1, 0, 9]])
    seq_idx = np.array([[0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2]])
    spans = prompt_spans(tokens, seq_idx, eod, end, 3, 64, 1)
    # the first piece does not begin here; the first mark counts; without one half is read; nothing is left of the last
    assert spans.tolist() == [[[1, 4, 7], [7, 2, 12], [0, 0, 0]], [[0, 3, 7], [7, 2, 10], [0, 0, 0]]]
    assert prompt_spans(tokens, seq_idx, eod, end, 1, 2, 4).tolist() == [[[1, 2, 7]], [[0, 2, 7]]]
    assert prompt_spans(tokens, seq_idx, eod, None, 3, 64, 3).tolist()[0] == [[1, 3, 7], [7, 2, 12], [0, 0, 0]]
