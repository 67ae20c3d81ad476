"""A model and its tokenizer from a canonical checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from typing_extensions import TypedDict

from megatron_adamba.blueprint.gates import gate_manifest
from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.checkpoint.canonical import load_into
from megatron_adamba.checkpoint.offline import described_model, open_checkpoint
from megatron_adamba.config.resolved import ResolvedModel
from megatron_adamba.config.root import read_run_config
from megatron_adamba.config.rules import one_of
from megatron_adamba.config.sections import GatesConfig, default_predictor
from megatron_adamba.data.tokenizer import Tokenizer, folder_tokenizer
from megatron_adamba.elastic.confidence import GateReading
from megatron_adamba.elastic.sampler import earliest_exit
from megatron_adamba.errors import CheckpointError, ConfigError, TokenizerError
from megatron_adamba.layers.gates import Gates
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.ops.host_memory import keep_freed_pages
from megatron_adamba.ops.precision import fast_bf16
from megatron_adamba.schema import Size, check_value


class _Elastic(TypedDict, total=False):
    """Of the run's elastic section what gates are read by."""

    width_sampling: str | None
    min_exit_layer: Size | None


@dataclass
class LoadedModel:
    """Ready for evaluation: in eval mode, no gradients."""

    model: AdambaModel
    gates: Gates | None
    """in float32; None where the checkpoint has none"""
    gate_config: GatesConfig
    """as the run was set that trained the gates"""
    min_exit_layer: int
    """blocks before the earliest exit that it trained"""
    tokenizer: Tokenizer
    device: torch.device

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a text, themselves not shown."""
        listed = self.model.config.end_tokens
        return frozenset([self.tokenizer.eod_id] if listed is None else listed)

    @property
    def dtype(self) -> str:
        """bf16 | fp32"""
        return "bf16" if next(self.model.parameters()).dtype == torch.bfloat16 else "fp32"

    def require_gates(self) -> Gates:
        """Raises ConfigError where the checkpoint has none."""
        if self.gates is None:
            raise ConfigError(
                "mode adaptive: this model has no gates; train them (adamba train --train.phase 2), or take think"
            )
        return self.gates

    @property
    def reading(self) -> GateReading:
        """What the gates' outputs mean."""
        return GateReading.of(self.gate_config)


def load_model(
    folder: str | Path, dtype: str | None = None, device: torch.device | None = None, verify: bool = True
) -> LoadedModel:
    """Read config.json, the weights and the tokenizer. Raises CheckpointError, TokenizerError, ConfigError.

    dtype: bf16 | fp32; None takes bf16 where the device computes in it; verify: hold tensors against their checksums,
    where the folder has them.
    """
    if dtype is not None:
        one_of("dtype", dtype, ("bf16", "fp32"))
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; a run leaves one at RUN/model")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_pages()
    dtype = dtype or ("bf16" if fast_bf16(device) else "fp32")
    config = _config_that_fits(folder)
    tokenizer = _tokenizer(folder, config)
    model = AdambaModel(config, device="meta").to_empty(device="cpu")
    load_into(model, folder, elsewhere={spec.name for spec in gate_manifest(config)}, verify=verify)
    model.to(device=device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    model.requires_grad_(False).eval()
    gates = _gates(folder, config, device, verify)
    return LoadedModel(model, gates, *_gate_config(folder, config), tokenizer, device)


def _config_that_fits(folder: Path) -> ResolvedModel:
    """The model's, once the shapes of all tensors are known: what a damaged one asks for may not fit into any memory.
    Raises CheckpointError."""
    opened = open_checkpoint(folder)
    config, specs = described_model(opened)
    for spec in specs:
        if spec.name not in opened.weights:
            raise CheckpointError(f"{folder}: has no tensor {spec.name}; its config.json describes another model")
        if (shape := opened.weights[spec.name].shape) != spec.shape:
            raise CheckpointError(f"{folder}: {spec.name} has shape {shape}, the model's is {spec.shape}")
    return config


def _gates(folder: Path, config: ResolvedModel, device: torch.device, verify: bool) -> Gates | None:
    if not config.gate_size:
        return None
    gates = Gates(config, device="meta").to_empty(device="cpu")
    load_into(gates, folder, elsewhere={spec.name for spec in manifest(config)}, verify=verify)
    return gates.to(device).requires_grad_(False).eval()


def _gate_config(folder: Path, config: ResolvedModel) -> tuple[GatesConfig, int]:
    """The gates section of the run, and its earliest exit. Raises CheckpointError."""
    run = read_run_config(folder)
    values, known = run.get("gates", {}), {entry.name for entry in fields(GatesConfig)}
    kept = {name: value for name, value in values.items() if name in known}
    where = str(folder / "config.json"), CheckpointError, "restore the file"
    gates = check_value(kept, GatesConfig, *where, "the gates section")
    elastic = check_value(run.get("elastic", {}), _Elastic, *where, "the elastic section")
    try:
        gates.check()
    except ConfigError as error:
        raise CheckpointError(f"{where[0]}: the gates section is damaged ({error}); restore the file") from None
    if gates.predictor is None:
        gates = replace(gates, predictor=default_predictor(elastic.get("width_sampling")))
    first = elastic.get("min_exit_layer") or earliest_exit(config.num_layers)
    return gates, min(first, config.num_layers)


def _tokenizer(folder: Path, config: ResolvedModel) -> Tokenizer:
    tokenizer = folder_tokenizer(folder)
    wanted = read_run_config(folder).get("tokenizer_hash")
    if wanted is not None and tokenizer.hash != wanted:
        raise TokenizerError(
            f"{folder}: its tokenizer is not the one it was trained with ({wanted[:12]}); restore the file"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, its model {config.vocab_size}; restore it"
        )
    return tokenizer
