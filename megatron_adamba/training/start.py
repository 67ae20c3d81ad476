"""What a run starts from: its own latest checkpoint, a canonical checkpoint, or random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_adamba.blueprint.gates import stored_manifest
from megatron_adamba.checkpoint.canonical import load_into
from megatron_adamba.checkpoint.history import read_history
from megatron_adamba.checkpoint.keeping import (
    LATEST,
    SET_ASIDE,
    bring_back,
    complete_folders,
    later_than,
    run_id_of,
    step_folders,
    step_of,
)
from megatron_adamba.checkpoint.offline import CANONICAL, find_checkpoint, open_checkpoint
from megatron_adamba.checkpoint.training import latest_checkpoint, together
from megatron_adamba.config.root import AdambaConfig, read_run_config
from megatron_adamba.data.tokenizer import Tokenizer
from megatron_adamba.errors import CheckpointError, ConfigError, TokenizerError
from megatron_adamba.model.adamba import AdambaModel

FLAG = "--checkpoint.init_from"


def checkpoint_root(config: AdambaConfig) -> Path:
    """Where a run keeps its training checkpoints."""
    return Path(config.logging.run_dir) / "checkpoints"


def find_resume(config: AdambaConfig) -> list[Path]:
    """Checkpoints that `--checkpoint.resume` asks for: the first of them that is whole counts. Empty: a fresh start.

    `auto` takes what `latest` names, or the newest, then older ones, then newer ones. Raises CheckpointError where
    there is nothing to go on from, ConfigError where a run would write over what another one left.
    """
    wanted, root = config.checkpoint.resume, checkpoint_root(config)
    bring_back(root)
    if wanted == "auto":
        latest = latest_checkpoint(root)
        if latest is None:
            _refuse_finished(config)
            return []
        rest = [path for path in reversed(complete_folders(root)) if path != latest]
        step = step_of(latest)
        # a folder that people named has no place among the steps
        later = [] if step is None else later_than(root, step)
        return [latest, *sorted(rest, key=lambda path: path in later)]
    held = step_folders(root)
    if wanted == "never":
        if held:
            raise ConfigError(f"{_held(config)}; go on with --resume auto, or give another folder, {_another(config)}")
        latest_checkpoint(root)
        _refuse_finished(config)
        return []
    folder = Path(wanted)
    if not folder.is_dir():
        raise CheckpointError(f"--resume {wanted}: no such folder; try --resume auto")
    if held and not in_own_root(config, folder):
        raise ConfigError(
            f"{_held(config)}, and --resume {wanted} is not one of them; give a run that goes on from elsewhere a "
            f"folder of its own, {_another(config)}, or go on here with --resume auto"
        )
    return [folder]


def missing_latest(config: AdambaConfig) -> str | None:
    """What people have to know where `latest` names a checkpoint that is not there."""
    path = checkpoint_root(config) / LATEST
    try:
        name = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    if step_of(Path(name)) is None or (path.parent / name).is_dir():
        return None
    return f"WARNING: {path} names {name}, which is not there"


def started_over(config: AdambaConfig) -> str | None:
    """What people have to know where a run begins at step 0 in a folder with traces of an earlier one."""
    folder, root = Path(config.logging.run_dir), checkpoint_root(config)
    found = []
    if (folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").stat().st_size:
        found.append("metrics.jsonl (its lines go to metrics-set-aside.jsonl)")
    if run_id_of(folder / "model") is not None:
        found.append("model (it will be set aside)")
    aside = complete_folders(root / SET_ASIDE)
    if aside:
        found.append(f"{aside[-1]} (go on from it with --resume {aside[-1]} --logging.run_dir {folder}-2)")
    if not found:
        return None
    return f"WARNING: {folder} has no checkpoint to go on from, and traces of an earlier run: {', '.join(found)}"


def in_own_root(config: AdambaConfig, folder: Path) -> bool:
    """Whether a checkpoint lies in the run's own folder."""
    return folder.resolve().parent == checkpoint_root(config).resolve()


def _refuse_finished(config: AdambaConfig) -> None:
    """A folder with a run's model and metrics and no checkpoint has lost them: that is no fresh start."""
    folder = Path(config.logging.run_dir)
    if run_id_of(folder / "model") is not None and (folder / "metrics.jsonl").is_file():
        raise ConfigError(
            f"--logging.run_dir {folder}: holds the model and the metrics of a run that has ended, and none of its "
            f"checkpoints; start another one from its model with --checkpoint.init_from {folder / 'model'}, "
            f"{_another(config)}"
        )


def _held(config: AdambaConfig) -> str:
    return f"--logging.run_dir {config.logging.run_dir}: holds checkpoints of an earlier run"


def _another(config: AdambaConfig) -> str:
    return f"for example --logging.run_dir {config.logging.run_dir}-2"


def check_start(folder: str, tokenizer: Tokenizer) -> None:
    """What can be checked before there is a model. Raises ConfigError, CheckpointError, TokenizerError."""
    kind, _ = find_checkpoint(Path(folder))
    if kind != CANONICAL:
        raise CheckpointError(
            f"{FLAG} {folder}: is a training checkpoint; go on from it with --checkpoint.resume {folder}, or make it "
            f"canonical first: adamba checkpoint convert {folder} DST"
        )
    wanted = read_run_config(folder).get("tokenizer_hash")
    if wanted not in (None, tokenizer.hash):
        raise TokenizerError(f"{FLAG} {folder}: was trained with another tokenizer; leave --data.tokenizer out")


def load_start(model: AdambaModel, folder: str, verify: bool = True) -> list[dict[str, Any]]:
    """Fill every parameter with this rank's share of the checkpoint's tensors; all ranks fail where one does.

    verify: hold tensors against their checksums. Returns the checkpoint's history.

    Raises CheckpointError where files are damaged, ConfigError where the checkpoint holds another model.
    """
    return together(lambda: _load(model, Path(folder), verify))


def _load(model: AdambaModel, folder: Path, verify: bool) -> list[dict[str, Any]]:
    opened, config = open_checkpoint(folder), model.config
    if not opened.config.get("model", {}).get("gate_size"):
        # gates that the checkpoint does not have begin with this run
        config = replace(config, gate_size=0)
    held, specs = opened.weights, {spec.name: spec for spec in stored_manifest(config)}
    for name in sorted(specs.keys() | held.keys()):
        theirs = held[name].shape if name in held else "none"
        ours = specs[name].shape if name in specs else "none"
        if theirs != ours:
            raise ConfigError(
                f"{FLAG} {folder}: its {name} has shape {theirs}, that of the model asked for {ours}; leave the "
                f"--model settings out that differ from {folder / 'config.json'}"
            )
    here = {spec.name for spec in model.specs}
    share = lambda name, whole: model.share(specs[name], whole)
    load_into(model, folder, share, elsewhere=specs.keys() - here, verify=verify)
    return read_history(folder)
