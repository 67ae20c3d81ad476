"""Everything of a run that is not the model's shape, one dataclass a section, its rules beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from megatron_adamba.config.rules import at_least, below_one, check_seed, in_range, one_of, positive, usual
from megatron_adamba.errors import ConfigError

SAMPLINGS = ("full", "uniform", "per_layer", "sandwich")


@dataclass
class ElasticStage:
    """A part of the run that samples the nest in its own way. What is null is the section's own."""

    until: float | None = None
    """where it ends: a share of the run, up to 1, or a step, above 1; null: with the run"""
    width_sampling: str | None = None
    """full | uniform | per_layer; sandwich in all stages or in none"""
    width_weights: list[float] | None = None
    """as the section's"""
    exit_fraction: float | None = None
    """as the section's"""


@dataclass
class ElasticConfig:
    """How training samples the nest."""

    width_sampling: str = "full"
    """full | uniform (one width for all layers) | per_layer | sandwich (full width and narrower plans each time)"""
    plans_per_step: int = 1
    """different plans in one optimizer step; must divide the accumulation steps"""
    sandwich_passes: int = 2
    """passes of one micro-batch under sandwich, the full-width one included"""
    width_weights: list[float] | None = None
    """how often each width is drawn, in the order of model.widths, in any unit; null: all alike"""
    uniform_share: float = 0.0
    """of the plans under per_layer and sandwich, those with one width for all layers, as modes have them"""
    schedule: list[ElasticStage] | None = None
    """parts of the run with a sampling of their own, one after the other; null: all of the run is alike"""
    exit_fraction: float | None = None
    """share of the plans that leave at a sampled layer, under sandwich of all passes but the first; null means 0.3 in
    phases 2 and 3, and 0 otherwise"""
    mixed_exit_fraction: float = 0.0
    """of the plans that leave early, those in which random tokens leave earlier still, as in adaptive generation"""
    min_exit_layer: int | None = None
    """blocks that run before the earliest exit; null means a quarter of them"""

    def check(self) -> None:
        one_of("--elastic.width_sampling", self.width_sampling, SAMPLINGS)
        _check_weights("--elastic.width_weights", self.width_weights)
        in_range("--elastic.uniform_share", self.uniform_share, 0, 1, usual(self, "uniform_share"))
        positive("--elastic.plans_per_step", self.plans_per_step, usual(self, "plans_per_step"))
        in_range("--elastic.sandwich_passes", self.sandwich_passes, 2, 64, usual(self, "sandwich_passes"))
        if self.exit_fraction is not None:
            in_range("--elastic.exit_fraction", self.exit_fraction, 0, 1, usual(self, "exit_fraction"))
        in_range("--elastic.mixed_exit_fraction", self.mixed_exit_fraction, 0, 1, usual(self, "mixed_exit_fraction"))
        if self.min_exit_layer is not None:
            positive("--elastic.min_exit_layer", self.min_exit_layer, usual(self, "min_exit_layer"))
        for number, stage in enumerate(self.schedule or [], 1):
            self._check_stage(f"--elastic.schedule, stage {number}", stage, number == len(self.schedule or []))

    def _check_stage(self, name: str, stage: ElasticStage, last: bool) -> None:
        own, base = stage.width_sampling or self.width_sampling, self.width_sampling
        one_of(f"{name}: width_sampling", own, SAMPLINGS)
        if own != base and "sandwich" in (own, base):
            raise ConfigError(
                f"{name}: samples {own}, --elastic.width_sampling is {base}: the number of passes of a micro-batch is "
                f"the same in the whole run; take sandwich for all stages, or per_layer"
            )
        _check_weights(f"{name}: width_weights", stage.width_weights)
        if stage.exit_fraction is not None:
            in_range(f"{name}: exit_fraction", stage.exit_fraction, 0, 1, 0.3)
        if stage.until is None and not last:
            raise ConfigError(f"{name}: until is missing; give a share of the run, for example 0.3, or a step")
        if stage.until is not None and not 0 < stage.until < math.inf:
            raise ConfigError(f"{name}: until {stage.until}: must be above 0; a share of the run, or a step")

    def parts(self, steps: int | None) -> list[tuple[float, ElasticConfig]]:
        """(the step with which it ends, its settings) of each stage. steps: of the whole run. Raises ConfigError where
        a stage ends before it begins."""
        found: list[tuple[float, ElasticConfig]] = []
        for number, stage in enumerate(self.schedule or [ElasticStage()], 1):
            end = math.inf
            if stage.until is not None:
                assert steps is not None or stage.until > 1, "shares of a run need its length"
                end = stage.until if stage.until > 1 or steps is None else round(stage.until * steps)
            if found and end <= found[-1][0]:
                raise ConfigError(
                    f"--elastic.schedule, stage {number}: until {stage.until}: ends at step {end:g} of {steps}, and "
                    f"the stage before it at step {found[-1][0]:g}; give a later one"
                )
            own = {key: value for key, value in vars(stage).items() if key != "until" and value is not None}
            found.append((end, replace(self, schedule=None, **own)))
        # the last one goes on where a run is made longer
        return [*found[:-1], (math.inf, found[-1][1])]

    @property
    def passes(self) -> int:
        """Forward passes of one micro-batch."""
        return self.sandwich_passes if self.width_sampling == "sandwich" else 1

    @property
    def samples_widths(self) -> bool:
        """Whether any part of the run trains other widths than the full one."""
        return any(part.width_sampling != "full" for _, part in self.parts(1 << 30))


def _check_weights(name: str, weights: list[float] | None) -> None:
    if weights is None:
        return
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
        raise ConfigError(f"{name} {weights}: must be 0 or more each, and above 0 together; for example [1,1,1,2]")


COST_TARGETS = ("relative", "signed", "divergence")
"""of the confidence gates: those in nats"""


def default_predictor(width_sampling: str | None) -> str:
    """What `--gates.predictor` comes to where nothing is said."""
    return "relative" if width_sampling == "sandwich" else "none"


@dataclass
class GatesConfig:
    """Gates that tell when a token may leave and when it needs more width, and the estimator of a prompt's difficulty.
    They learn beside the model, from what its passes leave behind, and never move it."""

    train: bool | None = None
    """null: in phases 2 and 3"""
    size: int = 64
    """hidden units of each, where the model has none yet"""
    target: str = "relative"
    """relative: max(0, loss if it leaves - loss at the end) in nats | signed: the difference as it is, so that tokens
    that nobody can foresee, now better off by leaving and now worse, may leave | divergence: KL(predictions at the end
    || if it leaves), the mean of `signed` over what the model itself expects next, without the noise of the one token
    that came | absolute: sigmoid(2 - loss if it leaves)"""
    tau: float = 1.0
    """nats at which confidence is 0; leaving at a confidence c costs (1 - c) tau on average; under `divergence` by what
    the model expects, in truth as far as its own final predictions are calibrated"""
    loss: str = "squared_error"
    """of the confidence gates: squared_error | deviance (of targets in nats: an error counts in proportion to the cost,
    for thresholds near 1)"""
    exit_threshold: float = 0.95
    """what training takes for leaving: states that an earlier gate would already have let go count a tenth"""
    predictor: str | None = None
    """relative: the regret of narrow passes (needs width_sampling sandwich) | original: sigmoid(loss - 1) | none; null:
    relative under sandwich, else none"""
    regret_scale: float = 0.25
    """nats that a layer of score 1 loses at no width; all layers together lose up to their number times it. Two to
    three times what the narrowest width loses, over the number of layers, has served well: under it scores stop at 1,
    far over it they sink to 0 and stay there"""
    prompt_tokens: int = 64
    """first tokens of a document that the estimator reads: at most half of it, and no more than its prompt"""
    rest_tokens: int = 8
    """documents with fewer tokens behind that do not train it"""
    positions: int = 16
    """of each sequence, at which states are kept"""
    documents: int = 8
    """of each sequence, on which the estimator learns"""
    warmup_steps: int = 200
    """steps before gates and estimator begin"""
    lr: float = 2e-3
    """AdamW's learning rate for them, at the schedule's peak"""
    gradient_clipping: float = 1.0
    """their own"""

    def check(self) -> None:
        one_of("--gates.target", self.target, (*COST_TARGETS, "absolute"))
        one_of("--gates.loss", self.loss, ("squared_error", "deviance"))
        if self.loss == "deviance" and self.target not in COST_TARGETS:
            raise ConfigError(
                f"--gates.loss deviance: is of costs in nats, and --gates.target {self.target} is a share; "
                f"try --gates.loss squared_error"
            )
        if self.predictor is not None:
            one_of("--gates.predictor", self.predictor, ("relative", "original", "none"))
        for name in ("size", "tau", "regret_scale", "prompt_tokens", "rest_tokens", "positions", "documents", "lr"):
            positive(f"--gates.{name}", getattr(self, name), usual(self, name))
        in_range("--gates.exit_threshold", self.exit_threshold, 0, 1, usual(self, "exit_threshold"))
        for name in ("warmup_steps", "gradient_clipping"):
            at_least(f"--gates.{name}", getattr(self, name), 0, usual(self, name))


@dataclass
class DataConfig:
    """What is read."""

    train: list[str | float] = field(default_factory=list)
    """dataset prefixes (PREFIX.bin, PREFIX.idx), or weight, prefix, weight, prefix, ..."""
    validation: list[str | float] = field(default_factory=list)
    """dataset prefix for evaluation; one"""
    tokenizer: str | None = None
    """bytes | FILE.model (sentencepiece) | tokenizer.json | FILE.tiktoken | tiktoken:NAME | a folder of one of these"""
    eod_token: str | None = None
    """end-of-document token by name; null takes the usual one"""
    split_pattern: str | None = None
    """of a FILE.tiktoken: encoding that it was made with, or regular expression; null takes what its name says"""
    prompt_end: str | None = None
    """text of the token that ends a document's prompt, at its first place in each; null: documents have no prompt"""
    allow_new_order: bool = False
    """a resumed run whose seed, sequence length or documents changed reads the new order from its first sample"""


@dataclass
class TrainConfig:
    """The loop."""

    steps: int = 1000
    """optimizer steps of the whole run"""
    seq_len: int = 512
    """tokens of one sample"""
    micro_batch_size: int = 4
    """samples of one forward pass on one rank"""
    global_batch_size: int = 8
    """samples of one optimizer step over all ranks"""
    seed: int = 1234
    """initial weights, data order and plans are pure functions of it"""
    gradient_clipping: float = 1.0
    """global gradient norm above which gradients are scaled down; 0 turns it off"""
    activation_checkpointing: bool = False
    """keep only each block's input and run the block again in backward"""
    freeze: list[str] = field(default_factory=list)
    """parameter groups that do not train: embedding, head, norm, gain, attention, mlp, router, expert, mamba"""
    phase: int | None = None
    """1: Mamba layers alone train, at full width, as after grafting them in; 2: everything, and plans leave early now
    and then (elastic.exit_fraction), so that exits are trained too; 3: the same after the model was made wider, old
    weights more slowly (optimizer.old_lr_scale); null: everything not frozen trains"""
    nonfinite_patience: int = 5
    """steps in a row with a non-finite loss or gradient, each skipped, after which the run stops"""
    eval_interval: int = 0
    """steps between evaluations at every width; 0 evaluates only at the end"""
    eval_tokens: int = 65536
    """validation tokens of one evaluation in training, the first ones"""

    def check(self) -> None:
        for name in ("steps", "seq_len", "micro_batch_size", "global_batch_size", "nonfinite_patience", "eval_tokens"):
            positive(f"--train.{name}", getattr(self, name), usual(self, name))
        if self.phase is not None:
            one_of("--train.phase", self.phase, (1, 2, 3))
        for name in ("gradient_clipping", "eval_interval"):
            at_least(f"--train.{name}", getattr(self, name), 0, usual(self, name))
        check_seed("--train.seed", self.seed)


@dataclass
class OptimizerConfig:
    """Update rule and schedule."""

    name: str = "adamw"
    """adamw | muon (hidden matrices by Muon, the rest by AdamW)"""
    lr: float = 1e-3
    """AdamW's peak learning rate for matrices"""
    embedding_lr: float | None = None
    """for the embedding; null means lr"""
    head_lr: float | None = None
    """for the untied head; null means lr"""
    vector_lr: float | None = None
    """for norms, gains, biases and Mamba's vectors; null means lr"""
    muon_lr: float = 0.02
    """Muon's peak learning rate"""
    muon_momentum: float = 0.95
    """Nesterov momentum of Muon"""
    beta1: float = 0.9
    """AdamW"""
    beta2: float = 0.95
    """AdamW"""
    eps: float = 1e-8
    """AdamW"""
    weight_decay: float = 0.0
    """decoupled, on matrices only; never on norms, gains, biases, A_log, D, dt_bias"""
    schedule: str = "cosine"
    """cosine | wsd (warm-up, stable, linear decay) | constant"""
    warmup_steps: int = 10
    """steps of linear warm-up"""
    decay_fraction: float = 0.2
    """share of the steps that wsd spends in its decay"""
    min_lr_ratio: float = 0.1
    """where the schedule ends, as a share of the peak"""
    old_lr_scale: float = 0.1
    """phase 3: factor on every update of the weights that were there before the model was made wider"""

    def check(self) -> None:
        one_of("--optimizer.name", self.name, ("adamw", "muon"))
        one_of("--optimizer.schedule", self.schedule, ("cosine", "wsd", "constant"))
        for name in ("lr", "muon_lr", "eps"):
            positive(f"--optimizer.{name}", getattr(self, name), usual(self, name))
        for name in ("embedding_lr", "head_lr", "vector_lr"):
            if getattr(self, name) is not None:
                # null is lr
                at_least(f"--optimizer.{name}", getattr(self, name), 0, usual(self, "lr"))
        for name in ("beta1", "beta2", "muon_momentum"):
            below_one(f"--optimizer.{name}", getattr(self, name))
        for name in ("decay_fraction", "min_lr_ratio", "old_lr_scale"):
            in_range(f"--optimizer.{name}", getattr(self, name), 0, 1, usual(self, name))
        for name in ("warmup_steps", "weight_decay"):
            at_least(f"--optimizer.{name}", getattr(self, name), 0, usual(self, name))


@dataclass
class ParallelConfig:
    """Degrees of parallelism; data parallelism takes the ranks that are left."""

    tp: int = 1
    """tensor parallelism"""
    pp: int = 1
    """pipeline parallelism: stages of blocks, one behind the other"""
    pipeline_schedule: str = "1f1b"
    """1f1b | dualpipev (two chunks of blocks to a rank, from both ends: shorter waits, more activations)"""
    stage_split: str = "cost"
    """cost (FLOPs of blocks and head) | layers (as many blocks everywhere); | in the block pattern overrides both"""
    stage_bounds: list[int] | None = None
    """where each chunk begins and the last one ends, in blocks; derived from the three above"""
    ep: int = 1
    """expert parallelism"""
    sp: bool = False
    """sequence parallelism: the tp ranks share out the sequence between the tensor-parallel parts of a layer"""

    def check(self) -> None:
        for name in ("tp", "pp", "ep"):
            positive(f"--parallel.{name}", getattr(self, name), usual(self, name))
        one_of("--parallel.pipeline_schedule", self.pipeline_schedule, ("1f1b", "dualpipev"))
        one_of("--parallel.stage_split", self.stage_split, ("cost", "layers"))


@dataclass
class CheckpointConfig:
    """Saving and going on."""

    interval: int = 0
    """steps between training checkpoints; 0 saves only on a signal"""
    keep_last: int = 2
    """training checkpoints that stay on disk; one more until a step after the newest went well"""
    asynchronous: bool = False
    """training goes on as soon as weights and optimizer state are copied to host memory; needs that memory"""
    init_from: str | None = None
    """canonical checkpoint (RUN/model, or what surgery wrote): a fresh start takes its weights, model and tokenizer"""
    verify: bool = True
    """hold what init_from gives against its checksums; costs one more pass over its bytes"""
    resume: str = "never"
    """auto (the latest of the run's folder, or a fresh start) | never | a checkpoint folder"""

    def check(self) -> None:
        at_least("--checkpoint.interval", self.interval, 0, usual(self, "interval"))
        positive("--checkpoint.keep_last", self.keep_last, usual(self, "keep_last"))
        if not self.resume:
            raise ConfigError("--resume '': is empty; give auto, never or the folder of a checkpoint")


@dataclass
class LoggingConfig:
    """What a run leaves behind."""

    run_dir: str = "runs/default"
    """folder of metrics, logs and checkpoints"""
    interval: int = 10
    """steps between lines of metrics"""
    tensorboard: bool = True
    """write event files"""
    wandb_project: str | None = None
    """Weights & Biases project; needs wandb installed"""
    progress: bool = True
    """live progress on rank 0"""

    def check(self) -> None:
        if not self.run_dir:
            raise ConfigError(f"--logging.run_dir '': is empty; for example --logging.run_dir {usual(self, 'run_dir')}")
        positive("--logging.interval", self.interval, usual(self, "interval"))
