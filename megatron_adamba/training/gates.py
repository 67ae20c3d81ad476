"""Training of the gates and the difficulty estimator, beside the engine, on what its passes leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_adamba.blueprint.gates import expansion_layers, gate_manifest, whole_width
from megatron_adamba.checkpoint.canonical import WEIGHT_PREFIX, load_into, read_index
from megatron_adamba.checkpoint.rectangles import Fragment, Placement
from megatron_adamba.checkpoint.training import held_dtypes, load_fragments
from megatron_adamba.elastic.confidence import GateReading, deviance
from megatron_adamba.elastic.plan import ElasticPlan
from megatron_adamba.layers.gates import Gates
from megatron_adamba.model.init import initial_tensor
from megatron_adamba.model.taps import Taps
from megatron_adamba.parallel.topology import Topology
from megatron_adamba.training.gate_setup import GateSetup

LET_GO = 0.1
"""weight of states that an earlier gate would already have let go"""
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class _Pass:
    """One pass to the last block, with the full one of its micro-batch where it is narrower."""

    plan: ElasticPlan
    taps: Taps
    full: Taps | None
    spans: Tensor
    """[batch, documents, 3]"""


class GateTrainer:
    """Holds the gates of a run and their optimizer; the same on every rank that has the model's head."""

    def __init__(self, setup: GateSetup, topology: Topology, device: torch.device) -> None:
        self.setup, self.topology, self.device = setup, topology, device
        self.gates = Gates(setup.model, device)
        parameters = dict(self.gates.named_parameters())
        with torch.no_grad():
            for spec in gate_manifest(setup.model):
                parameters[spec.name].copy_(initial_tensor(spec, setup.seed))
        self.optimizer = torch.optim.AdamW(self.gates.parameters(), lr=setup.gates.lr, weight_decay=0.0)
        self.reading = GateReading.of(setup.gates)

    def load(self, folder: str, verify: bool = True) -> None:
        """The gates of a canonical checkpoint, where it has some. Raises CheckpointError."""
        names = {spec.name for spec in gate_manifest(self.setup.model)}
        held = set(read_index(Path(folder)))
        if names & held:
            load_into(self.gates, Path(folder), elsewhere=held - names, verify=verify)

    @property
    def writes(self) -> bool:
        """Whether this rank is the one of all that hold the gates that puts them into checkpoints."""
        return self.topology.place("dp") == 0 and self.topology.place("tp") == 0

    def fragments(self) -> dict[str, Fragment]:
        """`weight/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME` of every parameter, whole."""
        fragments = {}
        for name, parameter in self.gates.named_parameters():
            state = self.optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state |= {key: torch.zeros_like(parameter) for key in _MOMENTS}
            shape = tuple(parameter.shape)
            kept = {WEIGHT_PREFIX: parameter.detach(), **{f"{key}/": state[key] for key in _MOMENTS}}
            for key, tensor in kept.items():
                fragments[f"{key}{name}"] = Fragment(tensor.view(-1), 0, Placement(shape, shape))
        return fragments

    def restore(self, folder: Path, steps: int) -> bool:
        """From a training checkpoint that has the gates; steps: that were made with them. Optimizer state is taken
        whole, or begins anew where the checkpoint lacks any of it, as one that was made from a model does: returns
        whether it was taken. Raises CheckpointError."""
        fragments, held = self.fragments(), held_dtypes(folder)
        whole = fragments.keys() <= held.keys()
        wanted = fragments if whole else {k: part for k, part in fragments.items() if k.startswith(WEIGHT_PREFIX)}
        # in a pipeline, only the ranks with the head come here
        load_fragments(folder, wanted, alone=True)
        for state in self.optimizer.state.values():
            state["step"].fill_(float(steps if whole else 0))
        return whole

    def learn(
        self, plans: Sequence[ElasticPlan], taps: Sequence[Taps], spans: Sequence[Tensor], lr_factor: float = 1.0
    ) -> Tensor:
        """One step on the passes of this replica, in order; spans: of each micro-batch; lr_factor: share of the peak
        learning rate. Returns this replica's mean errors, [3]: of confidence gates, expansion gates and estimator.

        Every rank with the head calls it in the same steps.
        """
        passes = self.setup.passes
        self.optimizer.zero_grad(set_to_none=False)
        count = len(plans)
        totals = torch.zeros(3, device=self.device)
        for number, (plan, tap) in enumerate(zip(plans, taps, strict=True)):
            if not plan.whole_depth:
                continue
            full = taps[number - number % passes] if number % passes else None
            losses = self._losses(_Pass(plan, tap, full, spans[number // passes].to(self.device)))
            (losses.sum() / count).backward()
            totals += losses.detach() / count
        self._average_gradients()
        if self.setup.gates.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(self.gates.parameters(), self.setup.gates.gradient_clipping)
        for group in self.optimizer.param_groups:
            group["lr"] = self.setup.gates.lr * lr_factor
        self.optimizer.step()
        return totals

    def _average_gradients(self) -> None:
        replicas = self.topology.size("dp")
        grads = []
        for parameter in self.gates.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
        if replicas == 1:
            return
        together = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(together, group=self.topology.group("dp"))
        for grad, part in zip(grads, together.div_(replicas).split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))

    def _losses(self, one: _Pass) -> Tensor:
        """[3]: errors of confidence gates by `gates.loss`, squared ones of expansion gates and estimator; means."""
        positions = one.taps.request.positions
        scored = one.taps.scored[:, positions]
        final = one.taps.token_losses[:, positions]
        zero = torch.zeros((), device=self.device)
        confidence = self._confidence(one.taps, final, scored)
        widens = one.full is not None and len(expansion_layers(self.setup.model)) > 0
        expansion = self._expansion(one, final, scored) if widens else zero
        predictor = zero if not one.spans.shape[1] else self._predictor(one)
        return torch.stack([confidence, expansion, predictor])

    def _confidence(self, taps: Taps, final: Tensor, scored: Tensor) -> Tensor:
        """Over layers and scored positions; what an earlier gate lets go counts LET_GO."""
        layers = [layer for layer in self.setup.layers if layer >= self.setup.min_exit_layer]
        outputs = torch.stack([self.gates.leaving(layer, taps.layer(layer)) for layer in layers])
        chosen = [self.setup.layers.index(layer) for layer in layers]
        if self.reading.target == "divergence":
            wanted = taps.divergences[:, chosen].transpose(0, 1)
        else:
            wanted = self.reading.wanted(taps.exit_losses[:, chosen].transpose(0, 1), final)
        predicted = self.reading.prediction(outputs)
        errors = deviance(predicted, wanted) if self.setup.gates.loss == "deviance" else (predicted - wanted).square()
        passes = self.reading.confidence(outputs.detach()) > self.setup.gates.exit_threshold
        gone = passes.cumsum(0) - passes.long() > 0
        weights = torch.where(gone, LET_GO, 1.0) * scored
        return (errors * weights).sum() / weights.sum().clamp(min=1)

    def _expansion(self, one: _Pass, final: Tensor, scored: Tensor) -> Tensor:
        """Nats that the pass loses to full width, at the scored positions of layers that may widen."""
        assert one.full is not None
        lost = (final - one.full.token_losses[:, one.full.request.positions]).clamp(min=0)
        layers = [layer for layer in self.setup.layers if layer in expansion_layers(self.setup.model)]
        outputs = torch.stack([self.gates.widening(layer, one.taps.layer(layer)) for layer in layers])
        errors = (torch.nn.functional.softplus(outputs) - lost).square() * scored
        return errors.sum() / (scored.sum() * len(layers)).clamp(min=1)

    def _predictor(self, one: _Pass) -> Tensor:
        """Over documents: predicted regret of the plan on what follows the prompt, or sigmoid(loss - 1) for every layer
        alike."""
        original = self.setup.predictor == "original"
        if one.full is None and not original:
            return torch.zeros((), device=self.device)
        start, read, end = one.spans.unsqueeze(-1).unbind(2)
        place = torch.arange(one.taps.scored.shape[1], device=self.device)
        rest = ((place >= start + read) & (place < end) & one.taps.scored[:, None]).float()
        tokens = rest.sum(-1)
        kept = tokens > 0
        losses = one.taps.token_losses
        if one.full is not None and not original:
            losses = losses - one.full.token_losses
        mean = (rest @ losses.float().unsqueeze(-1)).squeeze(-1) / tokens.clamp(min=1)
        scores = self.gates.scores(one.taps.mean_embeddings)
        if original:
            errors = (scores - torch.sigmoid(mean - 1)[..., None]).square().mean(-1)
        else:
            errors = (predicted_regret(scores, one.plan, self.setup) - mean).square()
        return (errors * kept).sum() / kept.sum().clamp(min=1)


def predicted_regret(scores: Tensor, plan: ElasticPlan, setup: GateSetup) -> Tensor:
    """regret_scale * sum over layers of score * (1 - width / whole width)^2, [...]; scores: [..., num_layers]."""
    widths = torch.tensor(plan.widths, dtype=scores.dtype, device=scores.device)
    missing = (1 - widths / whole_width(setup.model)).clamp(min=0)
    return setup.gates.regret_scale * (scores * missing.square()).sum(-1)
