"""A model and its tokenizer from a canonical checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from megatron_adamba.blueprint.gates import gate_manifest
from megatron_adamba.blueprint.manifest import manifest
from megatron_adamba.checkpoint.canonical import load_into
from megatron_adamba.config.model import ModelConfig
from megatron_adamba.config.root import find_tokenizer, read_model_config, read_run_config
from megatron_adamba.config.rules import one_of
from megatron_adamba.config.sections import GatesConfig, default_predictor
from megatron_adamba.data.tokenizer import Tokenizer, load_tokenizer
from megatron_adamba.elastic.confidence import GateReading
from megatron_adamba.elastic.sampler import earliest_exit
from megatron_adamba.errors import CheckpointError, ConfigError, TokenizerError
from megatron_adamba.layers.gates import Gates
from megatron_adamba.model.adamba import AdambaModel
from megatron_adamba.ops.host_memory import keep_freed_pages
from megatron_adamba.schema import Count, JsonObject, check_value


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
    def reading(self) -> GateReading:
        """What the gates' outputs mean."""
        return GateReading.of(self.gate_config)


def load_model(folder: str | Path, dtype: str = "bf16", device: torch.device | None = None) -> LoadedModel:
    """Read config.json, the weights and the tokenizer. Raises CheckpointError, TokenizerError, ConfigError.

    dtype: bf16 | fp32.
    """
    one_of("--dtype", dtype, ("bf16", "fp32"))
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"--model {folder}: no such folder; a run leaves one at RUN/model")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_pages()
    try:
        config = read_model_config(folder)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    tokenizer = _tokenizer(folder)
    model = AdambaModel(config, device="meta").to_empty(device="cpu")
    load_into(model, folder, elsewhere={spec.name for spec in gate_manifest(config)})
    model.to(device=device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    model.requires_grad_(False).eval()
    gates = _gates(folder, config, device)
    return LoadedModel(model, gates, *_gate_config(folder, config), tokenizer, device)


def _gates(folder: Path, config: ModelConfig, device: torch.device) -> Gates | None:
    if not config.gate_size:
        return None
    gates = Gates(config, device="meta").to_empty(device="cpu")
    load_into(gates, folder, elsewhere={spec.name for spec in manifest(config)})
    return gates.to(device).requires_grad_(False).eval()


def _gate_config(folder: Path, config: ModelConfig) -> tuple[GatesConfig, int]:
    """The gates section of the run, and its earliest exit. Raises CheckpointError."""
    run, path = read_run_config(folder), folder / "config.json"
    told = lambda value, kind, name: check_value(value, kind, f"{path}: {name}", CheckpointError, "restore the file")
    values = told(run.get("gates", {}), JsonObject, "gates")
    known = {entry.name for entry in fields(GatesConfig)}
    gates = told({name: value for name, value in values.items() if name in known}, GatesConfig, "gates")
    try:
        gates.check()
    except ConfigError as error:
        raise CheckpointError(f"{path}: the gates section is damaged ({error})") from None
    elastic = told(run.get("elastic", {}), JsonObject, "elastic")
    if gates.predictor is None:
        sampling = told(elastic.get("width_sampling"), str | None, "elastic.width_sampling")
        gates = replace(gates, predictor=default_predictor(sampling))
    first = told(elastic.get("min_exit_layer"), Count | None, "elastic.min_exit_layer")
    return gates, min(first or earliest_exit(config.num_layers), config.num_layers)


def _tokenizer(folder: Path) -> Tokenizer:
    path, advice = folder / "config.json", "restore the file"
    found = check_value(find_tokenizer(folder), str | None, f"{path}: data.tokenizer", CheckpointError, advice)
    if found is None:
        raise TokenizerError(f"{folder}: holds no tokenizer, and its config.json names none; copy tokenizer.json there")
    tokenizer = load_tokenizer(found)
    hashed = read_run_config(folder).get("tokenizer_hash")
    wanted = check_value(hashed, str | None, f"{path}: tokenizer_hash", CheckpointError, advice)
    if wanted is not None and tokenizer.hash != wanted:
        raise TokenizerError(
            f"{folder}: its tokenizer is not the one it was trained with ({wanted[:12]}); restore the file"
        )
    return tokenizer
