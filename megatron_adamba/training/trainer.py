"""The loop: micro-batches, guarded steps, metrics, evaluation, saving."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from megatron_adamba.blueprint.training_flops import training_costs
from megatron_adamba.checkpoint.background import BackgroundSaver, saving_group
from megatron_adamba.checkpoint.keeping import checkpoint_name, complete_before
from megatron_adamba.checkpoint.training import together
from megatron_adamba.data.loader import MicroBatch, MicroBatchLoader, model_inputs
from megatron_adamba.data.packed import UNSCORED
from megatron_adamba.elastic.plan import ElasticPlan, uniform_plan
from megatron_adamba.engine.job import JobBoard
from megatron_adamba.engine.session import MicroStep, StepReport
from megatron_adamba.errors import AdambaError, NonFiniteError, StorageError
from megatron_adamba.evaluation.widths import EvaluationRow, evaluate_plans, exit_plans
from megatron_adamba.layers.lesson import Lesson, distillation_loss
from megatron_adamba.training.checkpointing import first_whole, resume, start_saving, write_final_model
from megatron_adamba.training.dashboards import Dashboard, TensorBoard, WeightsAndBiases
from megatron_adamba.training.freeze import frozen_names
from megatron_adamba.training.learning_watch import LearningWatch
from megatron_adamba.training.metrics import MetricsWriter
from megatron_adamba.training.nonfinite import first_bad_tensor, way_on
from megatron_adamba.training.peak import matmul_rate, peak_memory
from megatron_adamba.training.progress import ProgressView
from megatron_adamba.training.pruning import Pruning
from megatron_adamba.training.run import Run
from megatron_adamba.training.run_tokenizer import saving_with_tokenizer
from megatron_adamba.training.schedule import learning_rate_factor
from megatron_adamba.training.signals import StopRequest
from megatron_adamba.training.start import checkpoint_root, missing_latest, started_over

MOST_EXITS = 8
"""exit layers that an evaluation looks at"""


class Trainer:
    """Runs a `Run` from its checkpoint or the start to its last step, on every rank alike."""

    def __init__(
        self,
        run: Run,
        console: Console,
        leave: Callable[[AdambaError], None],
        description: Sequence[str] = (),
        listener: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """leave: ends the process, from whichever thread; description: the run's choices, a line each, for dashboards;
        listener: called on rank 0 with each record of metrics.jsonl."""
        self.description, self.listener = description, listener
        self.run, self.console = run, console
        self.config, self.session = run.plan.config, run.session
        self.rank_info = run.session.rank_info
        self.device = self.rank_info.device
        train = self.config.train
        self.num_micro_batches = train.global_batch_size // train.micro_batch_size
        topology = run.session.topology
        self.dp, self.dp_rank = topology.size("dp"), topology.place("dp")
        self.accumulation = self.num_micro_batches // self.dp
        self.counters = {"step": 0, "consumed_samples": 0, "optimizer_steps": 0, "skipped": 0, "skipped_in_a_row": 0}
        self.counters |= {"gate_steps": 0, "order_start": 0}
        self.sound_counters = dict(self.counters)
        """as they stood when weights last changed, or were loaded: behind a streak of skipped steps they still hold"""
        self.log = logging.getLogger("megatron_adamba")
        self.ranks_per_replica = topology.size("model")
        self.distillation = distillation_loss(self.config.distill)
        self.costs = training_costs(self.config.model, train.seq_len, frozen_names(self.config.model, train))
        self.flops = 0.0
        self.labels: dict[str, None] = {}
        """of the step's plans, in their order"""
        self.peak = 1.0
        self.started, self.first_step = 0.0, 0
        self.resumed_from: Path | None = None
        self.last_batch: MicroBatch | None = None
        self.loads: dict[int, Tensor] = {}
        self.write_failure: Exception | None = None
        self.saver = BackgroundSaver(saving_group(), saving_with_tokenizer(run.plan.tokenizer))
        self.saved: tuple[int, Path] | None = None
        """step and folder of the last checkpoint"""
        self.pruning = Pruning(self.config.checkpoint.keep_last, lambda: run.run_id, self._say)
        self.stop = StopRequest(self._save, JobBoard(), self._say, leave)
        self.session.ask_before_update(self.stop.may_update)
        self.watch: LearningWatch

    @property
    def first_rank(self) -> bool:
        return self.rank_info.rank == 0

    def train(self) -> list[EvaluationRow]:
        """To the last step; returns the final evaluation.

        Raises StoppedBySignal after saving, NonFiniteError when too many steps in a row were skipped, CheckpointError
        and StorageError from checkpoints.
        """
        self._maybe_resume()
        steps = self.config.train.steps
        self.started, self.first_step = time.perf_counter(), self.counters["step"]
        warmup = self.config.optimizer.warmup_steps
        self.watch = LearningWatch(self.config.model.vocab_size, self.first_step, warmup, steps)
        self.peak = matmul_rate(torch.bfloat16 if self.run.plan.bf16 else torch.float32, self.device)
        writer = together(self._open_metrics)
        view = ProgressView(self.console, steps, self.counters["step"], self.config.logging.progress)
        try:
            with self.stop, self._stopped_behind_lost_ranks():
                with self._loader() as batches:
                    while self.counters["step"] < steps:
                        self._one_step(batches, writer, view)
                        self._after_step(writer)
                if streak := self.counters["skipped_in_a_row"]:
                    if self.sound_counters["step"] == self.first_step:
                        self._stop_for_nonfinite()  # nothing was learned that could be kept
                    self._say(
                        f"WARNING: the last {streak} steps were not finite and left out: the model is that of step "
                        f"{self.sound_counters['step']}"
                    )
                saved = self._save()
                rows = self.evaluate(writer)
                if (
                    rows
                    and all(math.isfinite(row.nats_per_token) for row in rows)
                    and self.watch.sound
                    and self.first_rank
                ):
                    self.pruning.start()
                write_final_model(self.run, saved)
        finally:
            view.close()
            self.pruning.finish()
            if writer is not None:
                writer.close()
        return rows

    @contextmanager
    def _stopped_behind_lost_ranks(self) -> Iterator[None]:
        """Ranks that a signal stopped beside a long step may be gone before this one hears of it."""
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            if isinstance(error, AdambaError) or not self.stop.heard:
                raise
            raise self.stop.stopped(self.stop.finish()) from None

    def _open_metrics(self) -> MetricsWriter | None:
        if not self.first_rank:
            return None
        return MetricsWriter(self.config, self.run.run_dir, self.counters["step"], self._make_dashboards, self.listener)

    def _make_dashboards(self) -> list[Dashboard]:
        logging_, run_dir = self.config.logging, self.run.run_dir
        made: list[Dashboard] = []
        if logging_.tensorboard:
            made.append(TensorBoard(self.config, run_dir, self.counters["step"], self.description))
        if logging_.wandb_project:
            made.append(WeightsAndBiases(self.config, run_dir, self.run.run_id, self.description))
        return made

    def _maybe_resume(self) -> None:
        if self.config.checkpoint.resume == "auto" and (note := missing_latest(self.config)):
            self._say(note)
        if not self.run.resume_from:
            if note := started_over(self.config):
                self._say(f"{note}; the run starts over")
            return
        resumed = resume(self.run, self.run.resume_from)
        self.resumed_from = resumed.folder
        self.counters |= resumed.counters
        self.sound_counters = dict(self.counters)
        for line in resumed.lines:
            self._say(line)
        self._say(f"resumed from {resumed.folder} at step {self.counters['step']}")

    def _loader(self) -> MicroBatchLoader:
        train = self.config.train
        base = self.counters["consumed_samples"] - self.counters["order_start"]

        def first_sample(number: int) -> int:
            step, index = divmod(number, self.accumulation)
            return base + step * train.global_batch_size + (index * self.dp + self.dp_rank) * train.micro_batch_size

        count = (train.steps - self.counters["step"]) * self.accumulation
        pin = self.device.type == "cuda"
        return MicroBatchLoader(self.run.dataset, train.micro_batch_size, first_sample, 0, count, pin_memory=pin)

    def _one_step(self, batches: MicroBatchLoader, writer: MetricsWriter | None, view: ProgressView) -> None:
        start = time.perf_counter()
        step, train = self.counters["step"], self.config.train
        factor = learning_rate_factor(self.config.optimizer, step, train.steps)
        self.session.set_learning_rates(factor)
        self.flops, self.labels = 0.0, {}
        plans: list[ElasticPlan] = []
        spans: list[Tensor] = []
        with self.stop.interruptible():
            report = self.session.train_step(self._micro_steps(batches, step, plans, spans))
        if report.result.refused:
            raise self.stop.stopped(self.stop.finish())
        self.loads = report.loads
        errors = self._train_gates(plans, spans, report, factor)
        passes = report.losses.view(self.accumulation, self.run.sampler.passes)
        mean = self.session.mean_over_ranks(passes.mean(0))
        self.counters["step"] += 1
        self.counters["consumed_samples"] += train.global_batch_size
        self._count(report.result.skipped)
        if not self.counters["skipped_in_a_row"]:
            self.sound_counters = dict(self.counters)
        seconds = time.perf_counter() - start
        record = self._record(mean, "+".join(self.labels), factor, report.result, seconds) | errors
        logged = self.counters["step"] % self.config.logging.interval == 0 or self.counters["step"] == train.steps
        if logged and self.loads:
            record["expert_load"] = self._expert_load()
        if warning := self.watch.look(self.counters["step"], record["loss"]):
            self._say(warning)
        if self.first_rank:
            view.update(record, logged)
            if logged and writer is not None:
                self._write(writer, record)
                self.log.info("step %d loss %.6f grad_norm %s", record["step"], record["loss"], record["grad_norm"])

    def _train_gates(
        self, plans: list[ElasticPlan], spans: list[Tensor], report: StepReport, factor: float
    ) -> dict[str, float]:
        """Their step, once they have begun, on the ranks that have them; the mean errors, on all ranks."""
        if not spans or report.result.skipped:
            return {}
        gates = self.run.gates
        errors = torch.zeros(3, device=self.device)
        if gates is not None:
            errors = self.session.mean_over_ranks(gates.learn(plans, report.taps, spans, factor))
        topology = self.session.topology
        if topology.size("pp") > 1:
            dist.broadcast(errors, group=topology.group("pp"), group_src=self.run.plan.stages.loss_rank)
        self.counters["gate_steps"] += 1
        return dict(zip(("gate_error", "expansion_error", "predictor_error"), errors.tolist()))

    def _micro_steps(
        self, batches: MicroBatchLoader, step: int, plans: list[ElasticPlan], spans: list[Tensor]
    ) -> Iterator[MicroStep]:
        """Every pass of this replica's micro-batches; plans and documents are put on record."""
        setup = self.run.gate_setup
        of_step = [next(batches) for _ in range(self.accumulation)]
        for index, (batch, share) in enumerate(zip(of_step, self._shares(of_step))):
            self.last_batch = batch
            number = index * self.dp + self.dp_rank
            taps = None
            begun = setup is not None and setup.begun(step)
            # stages agree on the size of what travels once and for all, so in a pipeline states travel from the
            # first step on
            if setup is not None and (begun or (setup.trains and self.session.topology.size("pp") > 1)):
                found = setup.spans(batch)
                taps = setup.request(step, found, self.device)
                if begun:
                    spans.append(found)
            lesson = None if self.distillation is None else Lesson(self.distillation)
            for k in range(self.run.sampler.passes):
                plan = self.run.sampler.micro_batch_plan(step, number, self.num_micro_batches, k)
                self.labels[plan.label] = None
                teaches, learns = (lesson, None) if k == 0 else (None, lesson)
                self._count_flops(plan, learns is not None)
                plans.append(plan)
                inputs = model_inputs(batch, self.device)
                yield MicroStep(**inputs, plan=plan, taps=taps, share=share, teaches=teaches, learns=learns)

    def _shares(self, batches: list[MicroBatch]) -> Tensor:
        """[micro-batches]: scored tokens of each, over the mean of all micro-batches of the step on all replicas; 1
        exactly where all have as many. No host sync."""
        counts = torch.tensor([int((batch["labels"] != UNSCORED).sum()) for batch in batches], dtype=torch.float64)
        counts = counts.to(self.device)
        mean = self.session.mean_over_ranks(counts.mean())
        return (counts / mean.clamp(min=1e-9)).float()

    def _expert_load(self) -> dict[str, list[float]]:
        """By block: each expert's share of the choices in this step, times the number of experts; 1 is balanced."""
        loads = self.session.mean_over_ranks(torch.stack(list(self.loads.values())).double())
        shares = loads / loads.sum(1, keepdim=True).clamp(min=1e-9) * loads.shape[1]
        return {str(block): [round(share, 4) for share in row] for block, row in zip(self.loads, shares.tolist())}

    def _count_flops(self, plan: ElasticPlan, learns: bool) -> None:
        train = self.config.train
        per_token = self.costs.of(plan.widths, plan.exit_layer) + (self.costs.lesson if learns else 0)
        self.flops += per_token * train.micro_batch_size * train.seq_len / self.ranks_per_replica

    def _count(self, skipped: bool) -> None:
        if not skipped:
            self.counters["optimizer_steps"] += 1
            self.counters["skipped_in_a_row"] = 0
            return
        self.counters["skipped"] += 1
        self.counters["skipped_in_a_row"] += 1
        self._say(f"step {self.counters['step']}: loss or gradient is not finite, the update is left out")

    def _record(self, mean: Tensor, label: str, factor: float, result, seconds: float) -> dict[str, Any]:
        train = self.config.train
        tokens = train.global_batch_size * train.seq_len
        values = mean.tolist()
        record = {
            "step": self.counters["step"],
            "loss": sum(values) / len(values),
            "grad_norm": result.grad_norm,
            "lr_factor": factor,
            "width": label,
            "tokens": self.counters["consumed_samples"] * train.seq_len,
            "tokens_per_second": tokens / seconds,
            "mfu": self.flops / seconds / self.peak,
            "seconds": seconds,
            "seconds_left": (train.steps - self.counters["step"]) * self._mean_seconds(),
            "peak_memory_bytes": peak_memory(self.device),
            "skipped": self.counters["skipped"],
        }
        if len(values) > 1:
            record["loss_full"] = values[0]
        return record

    def _mean_seconds(self) -> float:
        """Time of a step so far, saving and evaluation included; single steps differ by their widths."""
        return (time.perf_counter() - self.started) / (self.counters["step"] - self.first_step)

    def _write(self, writer: MetricsWriter, record: dict[str, Any]) -> None:
        """A full disk is raised on all ranks at the end of the step, where they meet."""
        try:
            writer.write(record)
        except OSError as error:
            self.write_failure = error

    def _after_step(self, writer: MetricsWriter | None) -> None:
        train, step = self.config.train, self.counters["step"]
        streak = self.counters["skipped_in_a_row"]
        if streak >= train.nonfinite_patience:
            self._stop_for_nonfinite()
        interval = self.config.checkpoint.interval
        if train.eval_interval and step % train.eval_interval == 0 and step < train.steps:
            self.evaluate(writer)
        marks = [self.stop.asked(), self.write_failure is not None, self.saver.failed]
        stopped, failed, unsaved = self.session.any_rank(marks)
        if unsaved:
            self.saver.finish()
        if failed:
            raise self.write_failure or StorageError("rank 0 could not write its metrics; free some space")
        if stopped:
            raise self.stop.stopped(self.stop.finish())
        # inside a streak of skipped steps nothing is saved, or the checkpoints before it would have to go
        if self.saver.idle:
            self._prune_once_sound()
        if interval and step % interval == 0 and step < train.steps and not streak:
            self._start_saving()
            if not self.config.checkpoint.asynchronous:
                self.saver.finish()

    def _start_saving(self) -> tuple[int, Path]:
        counters = self.sound_counters
        self.saver.finish()
        self._prune_once_sound()
        start_saving(self.run, self.saver, counters)
        self.saved = counters["step"], checkpoint_root(self.config) / checkpoint_name(counters["step"])
        self.pruning.saved(*self.saved)
        return self.saved

    def _prune_once_sound(self) -> None:
        """When a step after the newest checkpoint, which is complete, went well."""
        if self.first_rank and self.pruning.due(self.sound_counters["step"]) and self.watch.sound:
            self.pruning.start()

    def _save(self) -> Path:
        """The checkpoint of the last step that changed weights, finished."""
        saved = self.saved
        if saved is None or saved[0] != self.sound_counters["step"]:
            saved = self._start_saving()
        self.saver.finish()
        return saved[1]

    def _stop_for_nonfinite(self) -> None:
        plan = self.run.sampler.plan(self.counters["step"] - 1, 0)

        def run_batch() -> None:
            assert self.last_batch is not None
            with torch.no_grad():
                self.session.position_losses(**model_inputs(self.last_batch, self.device), plan=plan)

        names = [spec.name for spec in self.run.plan.specs]
        name = first_bad_tensor(self.session.module, names, run_batch)
        self.saver.finish()
        # the step right before the streak is the one that led into it
        before = self.sound_counters["step"]
        loaded = self.resumed_from or self.config.checkpoint.init_from
        if name.startswith("weight ") and before == self.first_step and loaded is not None:
            raise NonFiniteError(f"first bad tensor: {name}, as {loaded} holds it; start from another checkpoint")
        root = checkpoint_root(self.config)
        kept = first_whole(complete_before(root, before))[0]
        raise NonFiniteError(
            f"loss or gradient not finite in {self.counters['skipped_in_a_row']} steps in a row, up to step "
            f"{self.counters['step']}; first bad tensor: {name}; going on unchanged would end here again: try "
            f"{way_on(kept, self.config.optimizer, self.config.logging.run_dir)}"
        )

    def evaluate(self, writer: MetricsWriter | None) -> list[EvaluationRow]:
        """Every width, and exits where they are trained, on the run's validation tokens; empty without such data."""
        if self.run.validation is None:
            return []
        model = self.config.model
        plans = [uniform_plan(model, width) for width in model.widths]
        sampler = self.run.sampler
        if sampler.exit_fraction:
            plans += exit_plans(model, sampler.min_exit_layer, MOST_EXITS)
        self.session.engine.eval()
        forward = self.session.position_losses
        with self.stop.interruptible():
            rows = evaluate_plans(forward, model, self.run.validation, plans, self.device, self.run.session.topology)
        self.session.engine.train()
        if writer is not None:
            for row in rows:
                self._write(
                    writer,
                    {
                        "step": self.counters["step"],
                        "eval_width" if row.exit_layer is None else "eval_exit": row.exit_layer or row.width,
                        "eval_nats_per_token": row.nats_per_token,
                        "eval_bits_per_byte": row.bits_per_byte,
                    },
                )
        return rows

    def _say(self, text: str) -> None:
        if self.first_rank:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        self.log.info(text)
