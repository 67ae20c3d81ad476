"""What flags of Megatron-LM, nanochat, torchtitan, DeepSpeed's examples and transformers' Trainer are called here."""

from __future__ import annotations

from collections.abc import Mapping

_MEASURES = "in samples, where nanochat counts tokens: divide by --train.seq_len"
_OURS: Mapping[str, tuple[str, ...]] = {
    "--model.hidden_size": ("hidden-size", "n-embd", "model-dim", "d-model"),
    "--model.num_layers": ("num-layers", "n-layer", "n-layers"),
    "--model.num_heads": ("num-attention-heads", "n-head", "n-heads"),
    "--model.num_kv_groups": ("num-query-groups", "group-query-attention", "n-kv-head", "n-kv-heads"),
    "--model.head_dim": ("kv-channels",),
    "--model.ffn_size": ("ffn-hidden-size", "intermediate-size"),
    "--model.vocab_size": ("vocab-size", "padded-vocab-size"),
    "--model.rope_theta": ("rotary-base", "rope-theta"),
    "--model.norm_eps": ("norm-epsilon", "layernorm-epsilon"),
    "--model.qk_norm": ("qk-layernorm", "qk-norm"),
    "--model.num_experts": ("num-experts",),
    "--model.experts_per_token": ("moe-router-topk", "top-k"),
    "--model.router_balance_weight": ("moe-aux-loss-coeff",),
    "--model.router_z_weight": ("moe-z-loss-coeff",),
    "--model.block_pattern": ("hybrid-override-pattern", "hybrid-layer-pattern"),
    "--model.mamba_d_state": ("mamba-state-dim",),
    "--model.mamba_head_dim": ("mamba-head-dim",),
    "--model.mamba_num_groups": ("mamba-num-groups",),
    "--model.window_pattern": ("window-pattern",),
    "--data.train": ("data-path", "train-data-path", "train-data", "dataset", "training.dataset-path", "input-bin"),
    "--data.validation": ("valid-data-path", "validation-data", "val-data"),
    "--data.tokenizer": ("tokenizer-model", "tokenizer-type", "tokenizer", "model.tokenizer-path", "hf-assets-path"),
    "--train.steps": (
        "steps", "train-iters", "num-iterations", "max-steps", "training.steps", "iterations", "max-iters",
    ),
    "--train.seq_len": ("seq-length", "max-seq-len", "seq-len", "training.seq-len", "sequence-length", "block-size"),
    "--train.micro_batch_size": (
        "micro-batch-size", "device-batch-size", "training.local-batch-size", "per-device-train-batch-size",
        "train-micro-batch-size-per-gpu", "batch-size",
    ),
    "--train.global_batch_size": ("global-batch-size", "training.global-batch-size", "train-batch-size"),
    "--train.seed": ("seed", "training.seed", "debug.seed"),
    "--train.gradient_clipping": ("clip-grad", "grad-clip", "max-norm", "training.max-norm", "max-grad-norm"),
    "--train.activation_checkpointing": (
        "recompute-activations", "recompute-granularity", "gradient-checkpointing", "activation-checkpoint.mode",
    ),
    "--train.eval_interval": ("eval-interval", "eval-every", "eval-steps", "validation.freq"),
    "--train.eval_tokens": ("eval-iters", "eval-tokens", "validation.steps"),
    "--optimizer.name": ("optim",),
    "--optimizer.lr": ("lr", "learning-rate", "optimizer.learning-rate"),
    "--optimizer.muon_lr": ("matrix-lr",),
    "--optimizer.embedding_lr": ("embedding-lr",),
    "--optimizer.head_lr": ("unembedding-lr",),
    "--optimizer.min_lr_ratio": ("min-lr", "final-lr-frac", "lr-scheduler.min-lr-factor"),
    "--optimizer.weight_decay": ("weight-decay",),
    "--optimizer.beta1": ("adam-beta1",),
    "--optimizer.beta2": ("adam-beta2",),
    "--optimizer.eps": ("adam-eps",),
    "--optimizer.schedule": ("lr-decay-style", "lr-scheduler-type", "lr-scheduler.decay-type"),
    "--optimizer.warmup_steps": (
        "lr-warmup-iters", "warmup-steps", "lr-warmup-fraction", "lr-scheduler.warmup-steps", "warmup-ratio",
    ),
    "--optimizer.decay_fraction": (
        "lr-decay-iters", "lr-wsd-decay-iters", "warmdown-ratio", "lr-scheduler.decay-ratio",
    ),
    "--parallel.tp": ("tp", "tensor-model-parallel-size", "tp-size", "parallelism.tensor-parallel-degree"),
    "--parallel.pp": ("pp", "pipeline-model-parallel-size", "pp-size", "parallelism.pipeline-parallel-degree"),
    "--parallel.ep": ("ep", "expert-model-parallel-size", "ep-size", "parallelism.expert-parallel-degree"),
    "--parallel.sp": ("sp", "sequence-parallel"),
    "--logging.run_dir": ("save", "output-dir", "job.dump-folder", "run", "tensorboard-dir", "out-dir", "save-dir"),
    "--logging.interval": ("log-interval", "logging-steps", "metrics.log-freq"),
    "--logging.wandb_project": ("wandb-project",),
    "--checkpoint.interval": ("save-interval", "save-every", "save-steps", "checkpoint.interval-type"),
    "--checkpoint.resume": ("load", "resume-from-step", "resume-from-checkpoint", "checkpoint.load-step"),
    "--checkpoint.init_from": ("finetune", "pretrained-checkpoint", "checkpoint.initial-load-path"),
    "--deepspeed_config": ("zero-stage", "use-distributed-optimizer", "bf16", "fp16", "cpu-offload"),
}  # fmt: skip
_WHY: Mapping[str, str] = {
    "bf16": "bf16 is the default where the machine has it; a ds_config such as zero1_fp32 turns it off",
    "fp16": "fp16 is not offered; bf16 is the default where the machine has it",
    "total-batch-size": f"write --train.global_batch_size, {_MEASURES}",
    "epochs": "a run has steps; write --train.steps N (start-up says how much of the data that is)",
    "num-train-epochs": "a run has steps; write --train.steps N (start-up says how much of the data that is)",
    "load": "write --checkpoint.resume auto to go on, --checkpoint.init_from FOLDER for weights alone",
    "world-size": "the number of ranks comes from the launcher, and data parallelism takes those that are left",
    "dp": "data parallelism takes the ranks that are left; start more, or lower --parallel.tp and --parallel.pp",
    "context-parallel-size": "context parallelism is not offered; --parallel.sp true shares a sequence over TP ranks",
    "swiglu": "write --model.activation swiglu",
    "untie-embeddings-and-output-weights": "that is the default; --model.tie_embeddings true ties them",
    "normalization": "RMSNorm is the only norm",
    "use-flash-attn": "the fastest kernel that the machine has is taken; start-up names it",
    "compile": "the model is not compiled; start-up names the kernels that are taken",
}


def peer_hint(flag: str) -> str | None:
    """What to write for a flag (`--lr`) of another program, in a sentence; None for a flag that nobody has."""
    name = flag.removeprefix("--").replace("_", "-")
    if name in _WHY:
        return _WHY[name]
    ours = next((ours for ours, theirs in _OURS.items() if name in theirs), None)
    return None if ours is None else f"is called {ours} here"


def known_peers() -> list[str]:
    """All flags that have a hint, in their own spelling."""
    return sorted(f"--{name}" for name in {*_WHY, *(name for names in _OURS.values() for name in names)})
