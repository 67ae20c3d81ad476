"""Optimizer state that a run takes up again: of a parameter whole or new, with a step count of its own."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from training.runs import ROOT, arguments, train

from megatron_adamba.config.sections import OptimizerConfig
from megatron_adamba.engine.optimizer import ElasticOptimizer
from megatron_adamba.parallel.topology import Topology

LR = 1e-3
STEADY = {"optimizer__schedule": "constant", "optimizer__warmup_steps": 0, "optimizer__lr": LR}
STEADY |= {"elastic__width_sampling": "full", "elastic__plans_per_step": 1, "checkpoint__interval": 0}
STEADY |= {"optimizer__eps": 1e-12, "train__gradient_clipping": 0}


def weights(run):
    return load_file(run / "model" / "model-00001-of-00001.safetensors")


def moved(before, after, name):
    """Size of the change of each element that has a gradient, in learning rates."""
    change = (after[name] - before[name]).abs().flatten() / LR
    return change[change > 0]


LAYOUTS = [
    (1, "zero0_fp32.json"),
    (2, "zero1_fp32.json"),
    pytest.param(2, "zero2_fp32.json", marks=pytest.mark.slow),
    (2, "zero3_fp32.json"),
]
UNFROZEN = "blocks.0.attention.out.o_weight"
"""it begins at zero, and while it is frozen, what stands before it has no gradient"""
TRAINED = "blocks.0.mlp.up.up_weight"


@pytest.mark.parametrize(("ranks", "ds_config"), LAYOUTS)
def test_weights_unfrozen_late_count_their_own_steps(tmp_path, data, ranks, ds_config):
    """Adam's first step moves every element by the learning rate, whatever the step of the run."""
    run, zero = tmp_path / "run", ["--deepspeed_config", str(ROOT / "ds_configs" / ds_config)]
    train(ranks, [*arguments(data, run, **STEADY, train__steps=30, train__freeze="[attention]"), *zero])
    before = weights(run)
    done = train(ranks, [*arguments(data, run, **STEADY, train__steps=31), *zero, "--resume", "auto"])
    assert "optimizer state reset: " in done.stdout and "steps count from 0, not 30" in done.stdout
    after = weights(run)
    name = UNFROZEN
    assert moved(before, after, name).median().item() == pytest.approx(1, abs=2e-3)
    # what had trained all along moves less than a first step, and at once by its own state
    other = TRAINED
    assert moved(before, after, other).median() < 0.9
    starts = json.loads((run / "checkpoints" / "step-00000031" / "state.json").read_text())["optimizer_starts"]
    assert starts[name] == 30 and other not in starts
    # and a step later, behind another resume, the count goes on: m / (1 - beta^2), not m / (1 - beta^32)
    train(ranks, [*arguments(data, run, **STEADY, train__steps=32), *zero, "--resume", "auto"])
    assert 0.5 < moved(after, weights(run), name).median() <= 1.01


@pytest.mark.parametrize(
    ("ranks", "ds_config"), [(1, "zero0_fp32.json"), pytest.param(2, "zero1_fp32.json", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("first", "second"), [("muon", "adamw"), ("adamw", "muon")])
def test_another_optimizer_begins_with_its_own_state(tmp_path, data, ranks, ds_config, first, second):
    """Half of another's state made updates thousands of times the learning rate."""
    run, zero = tmp_path / "run", ["--deepspeed_config", str(ROOT / "ds_configs" / ds_config)]
    options = STEADY | {"optimizer__muon_lr": LR}
    train(ranks, [*arguments(data, run, **options, train__steps=20, optimizer__name=first), *zero])
    before = weights(run)
    words = arguments(data, run, **options, train__steps=21, optimizer__name=second)
    done = train(ranks, [*words, *zero, "--resume", "auto"])
    assert "optimizer state reset: " in done.stdout
    after = weights(run)
    name = TRAINED
    change = moved(before, after, name)
    if second == "adamw":
        assert change.median().item() == pytest.approx(1, abs=2e-3) and change.max() < 1.01
    else:
        # an orthogonal matrix of 32 columns: elements of about 32^-0.5
        assert 0.05 < change.square().mean().sqrt() < 0.3
    # the vectors kept what they had
    starts = json.loads((run / "checkpoints" / "step-00000021" / "state.json").read_text())["optimizer_starts"]
    assert name in starts and not any(key.endswith("norm.weight") for key in starts)


def test_parts_of_a_flat_tensor_step_as_parameters_of_their_own():
    """Against torch's AdamW with a parameter each, one of them 7 steps younger; weights decay, too."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda size: torch.randn(size, generator=generator)
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1)
    sizes, ages = (5, 8, 3), (7, 0, 7)
    flat = torch.nn.Parameter(draw(sum(sizes)))
    group = {"params": [flat], "use_muon": False, "specs": [], "lr": 1e-2, "weight_decay": 0.1}
    ours = ElasticOptimizer([group], config, torch.float32, Topology.__new__(Topology))
    parts, theirs = [], []
    low = 0
    for size, age in zip(sizes, ages):
        parts.append((slice(low, low + size), age))
        theirs.append(torch.nn.Parameter(flat.detach()[low : low + size].clone()))
        low += size
    peer = torch.optim.AdamW(theirs, lr=1e-2, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0.1)
    moments = [(draw(size), draw(size).square()) if age else (torch.zeros(size),) * 2 for size, age in zip(sizes, ages)]
    ours.state[flat] = {
        "exp_avg": torch.cat([first for first, _ in moments]),
        "exp_avg_sq": torch.cat([second for _, second in moments]),
        "step": torch.zeros(()),
    }
    for parameter, (first, second), age in zip(theirs, moments, ages):
        peer.state[parameter] = {
            "exp_avg": first.clone(),
            "exp_avg_sq": second.clone(),
            "step": torch.tensor(float(age)),
        }
    ours.set_steps(flat, parts)
    for _ in range(4):
        flat.grad = draw(flat.numel())
        for parameter, (part, _) in zip(theirs, parts):
            parameter.grad = flat.grad[part].clone()
        ours.step()
        peer.step()
        assert torch.allclose(flat.detach(), torch.cat([p.detach() for p in theirs]), atol=1e-6)
