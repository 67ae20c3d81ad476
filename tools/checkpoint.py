"""Convert, show, check and compare checkpoints, in one process and without a job; one tensor is in memory at a time.

python tools/checkpoint.py convert RUN/checkpoints MODEL             # the latest one's weights as canonical
python tools/checkpoint.py convert RUN/model START --tp 2 --dp 4     # and back, to train on: --resume START
python tools/checkpoint.py inspect RUN/checkpoints/step-00000200
python tools/checkpoint.py verify RUN/model
python tools/checkpoint.py diff RUN/checkpoints RUN/model

A checkpoint is a canonical folder (RUN/model), a training checkpoint (RUN/checkpoints/step-00000200), or
RUN/checkpoints, which means the latest in it. Exit codes: 0 good or identical, 1 different, 2 wrong flags, 5 damaged,
6 disk full.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_adamba.config.rules import positive
from megatron_adamba.config.script import as_settings, run_script
from megatron_adamba.errors import ConfigError, TokenizerError
from megatron_adamba.files import write_atomically

if TYPE_CHECKING:
    from rich.tree import Tree

    from megatron_adamba.checkpoint.offline import OpenCheckpoint

CONVERT = """Convert a training checkpoint to a canonical one, or a canonical one to a training checkpoint.

To canonical: whole weights under their own names, in safetensors shards, with the config and the run's tokenizer.
Optimizer state stays behind.

To training: fp32 weights, no optimizer state, counters at 0; `pretrain_adamba.py --resume DST` starts from it and
reports the optimizer state as reset. --tp and --dp name the layout whose ranks' files are written; a run of any layout
reads them. Rank dp_rank * tp + tp_rank writes __RANK_0.distcp: its tensor-parallel shard of every tensor, of that the
dp_rank-th of dp equal runs of elements (as ZeRO 3 cuts parameters); what tensor parallelism leaves whole goes to
tp_rank 0 alone.
"""
VERIFY = """Check a checkpoint; prints OK, or the first damage and exits with 5.

Training: sizes and checksums of files.json; every tensor covered once by its chunks, which lie inside their files and
can be read; the weights are those of the config's model. Canonical: index, headers and file sizes agree; the weights
are those of the config's model, and finite.
"""
DIFF = """Compare two checkpoints of any kind, bit for bit; exits with 1 where they differ.

Names the first tensor that differs, weights first, in the model's order. Where one of the two is canonical only weights
are compared.
"""


def parse(words: list[str]) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True, metavar="convert | inspect | verify | diff")

    convert = commands.add_parser("convert", help="training <-> canonical", description=CONVERT, formatter_class=layout)
    convert.add_argument("source", metavar="SRC", help="training or canonical; its kind decides the direction")
    convert.add_argument("target", metavar="DST", help="folder to write; must not be there")
    convert.add_argument("--tp", type=int, help="tensor-parallel ranks to write for (to training only; 1)")
    convert.add_argument("--dp", type=int, help="data-parallel ranks to write for (to training only; 1)")
    convert.add_argument("--force", action="store_true", help="replace DST where it is a checkpoint")

    inspect = commands.add_parser("inspect", help="names, shapes, sizes", description="List what a checkpoint holds.")
    inspect.add_argument("path", metavar="PATH")
    inspect.add_argument("--json", metavar="FILE", help="write it as JSON too")

    verify = commands.add_parser("verify", help="is it whole?", description=VERIFY, formatter_class=layout)
    verify.add_argument("path", metavar="PATH")

    diff = commands.add_parser("diff", help="are two the same?", description=DIFF, formatter_class=layout)
    diff.add_argument("first", metavar="A")
    diff.add_argument("second", metavar="B")
    diff.add_argument("--weights-only", action="store_true", help="leave optimizer state out")
    diff.add_argument("--all", action="store_true", help="every tensor that differs, not the first alone")
    diff.add_argument("--tolerance", type=float, metavar="X", help="values up to X apart count as equal")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    args = parse(words)
    return {"convert": convert, "inspect": inspect, "verify": verify, "diff": diff}[args.command](args)


def convert(args: argparse.Namespace) -> int:
    from megatron_adamba.checkpoint.offline import TRAINING, open_checkpoint, to_canonical, to_training

    for flag in ("tp", "dp"):
        if getattr(args, flag) is not None:
            positive(f"--{flag}", getattr(args, flag))
    target = Path(os.path.abspath(args.target))
    check_target(target, args.target, args.force)
    source = open_checkpoint(Path(args.source))
    folder = source.folder.resolve()
    if target.resolve() in (folder, *folder.parents):
        raise ConfigError(f"{args.target}: holds the checkpoint to convert; give another folder")
    if source.kind == TRAINING:
        if args.tp is not None or args.dp is not None:
            raise ConfigError(f"--tp, --dp: {args.source} becomes canonical, whole tensors without a layout; leave out")
        files, note = tokenizer_files(source)
        to_canonical(source, target, files)
        print(f"{args.target}: canonical, {described(source.weights.values())}{note}")
        return 0
    tp, dp = args.tp or 1, args.dp or 1
    to_training(source, target, tp, dp)
    print(
        f"{args.target}: training checkpoint at step 0, {described(source.weights.values())}, for tp {tp} x dp {dp}; "
        f"train on with pretrain_adamba.py --resume {args.target}"
    )
    return 0


def reworded(text: str) -> str:
    """What a run is told to resume from is here simply named."""
    return as_settings(text).replace("give --resume ", "give ")


def check_target(target: Path, name: str, force: bool) -> None:
    """Raises ConfigError where the target is there and may not be replaced."""
    from megatron_adamba.checkpoint.offline import kind_of

    if not os.path.lexists(target):
        return
    if not force:
        raise ConfigError(f"{name}: is there already; give another folder, or --force to replace it")
    if target.is_symlink() or not target.is_dir() or (kind_of(target) is None and any(target.iterdir())):
        raise ConfigError(f"{name}: is no checkpoint, and --force replaces nothing else; give another folder")


def tokenizer_files(source: OpenCheckpoint) -> tuple[dict[str, bytes] | None, str]:
    """Files of the run's tokenizer where it is still what it was, or none and a note; None: the checkpoint has them.

    A checkpoint may come from anywhere: a path in it is not reason enough to copy a file.
    """
    from megatron_adamba.checkpoint.carried import carried_files
    from megatron_adamba.data.tokenizer import load_tokenizer

    data = source.config.get("data")
    choice = [data.get(name) for name in ("tokenizer", "eod_token", "split_pattern")] if isinstance(data, dict) else []
    if carried_files(source.folder):
        return None, ""
    if not choice or not all(value is None or isinstance(value, str) for value in choice) or not choice[0]:
        return {}, ""
    try:
        tokenizer = load_tokenizer(*choice)
        if tokenizer.hash == source.config.get("tokenizer_hash"):
            return tokenizer.carried(), ""
        why = "is not the run's"
    except TokenizerError as error:
        why = "is not a file here" if "no such file" in str(error) else "cannot be read"
    return {}, f"; its tokenizer {choice[0]} {why}: copy the right one in"


def inspect(args: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_adamba.checkpoint.offline import open_checkpoint

    checkpoint = open_checkpoint(Path(args.path))
    # never folded nor cut: a line is there to be searched for
    Console(width=10_000).print(tree_of(checkpoint))
    if args.json:
        write_atomically(Path(args.json), (json.dumps(as_json(checkpoint), indent=1) + "\n").encode())
    return 0


@dataclass
class Module:
    """A node of the tree: tensors by the last part of their names, and modules below."""

    tensors: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, Module] = field(default_factory=dict)

    def everything(self) -> list[Any]:
        return [*self.tensors.values(), *(info for module in self.modules.values() for info in module.everything())]


def modules_of(checkpoint: OpenCheckpoint) -> Module:
    root = Module()
    for key, info in checkpoint.infos.items():
        kind, _, name = key.partition("/")
        *path, last = name.split(".")
        node = root
        for part in (kind, *path):
            node = node.modules.setdefault(part, Module())
        node.tensors[last] = info
    return root


def tree_of(checkpoint: OpenCheckpoint) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    root = modules_of(checkpoint)
    tree = Tree(Text(f"{checkpoint.folder}: {checkpoint.kind}{where(checkpoint)}, {described(root.everything())}"))
    # a canonical checkpoint holds weights and nothing beside them
    branches = root.modules if checkpoint.tensors is not None else root.modules.get("weight", root).modules
    for name, module in branches.items():
        add_module(tree, name, module)
    return tree


def add_module(tree: Tree, name: str, module: Module) -> None:
    from rich.filesize import decimal
    from rich.text import Text

    while not module.tensors and len(module.modules) == 1:
        ((part, module),) = module.modules.items()
        name = f"{name}.{part}"
    branch = tree.add(Text(f"{name}  ({described(module.everything())})"))
    for last, info in module.tensors.items():
        dtype = str(info.dtype).removeprefix("torch.")
        branch.add(Text(f"{last}  {list(info.shape)}  {dtype}  {decimal(info.num_bytes)}"))
    for part, below in module.modules.items():
        add_module(branch, part, below)


def described(infos: Iterable[Any]) -> str:
    """`34 tensors, 5,754,340 elements, 23.0 MB`."""
    from rich.filesize import decimal

    infos = list(infos)
    count, size = sum(info.numel for info in infos), sum(info.num_bytes for info in infos)
    return f"{counted(len(infos), 'tensor')}, {counted(count, 'element')}, {decimal(size)}"


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def where(checkpoint: OpenCheckpoint) -> str:
    """Step and layout of a training checkpoint, as part of a line."""
    layout = layout_of(checkpoint)
    if layout is None:
        return ""
    parts = " x ".join(f"{name} {layout[name]}" for name in ("tp", "dp") if layout[name] is not None)
    step, ranks = checkpoint.state["counters"].get("step"), counted(layout["ranks"], "rank")
    return f" at step {step}, written by {ranks} ({parts})"


def layout_of(checkpoint: OpenCheckpoint) -> dict[str, Any] | None:
    """{"ranks", "tp", "dp"} of a training checkpoint; None for tp and dp where its config does not tell."""
    if checkpoint.tensors is None:
        return None
    ranks = len(list(checkpoint.folder.glob("__*_0.distcp")))
    said = checkpoint.state.get("layout", checkpoint.config.get("parallel"))
    tp = said.get("tp") if isinstance(said, dict) else None
    whole = isinstance(tp, int) and tp > 0 and ranks % tp == 0
    return {"ranks": ranks, "tp": tp if whole else None, "dp": ranks // tp if whole else None}


def as_json(checkpoint: OpenCheckpoint) -> dict[str, Any]:
    """{path, kind, counters, layout, tensors: [{name, shape, dtype, bytes, chunks}], totals: {kind of tensor: ...}}."""
    tensors, totals = [], {}
    for key, info in checkpoint.infos.items():
        row = {"name": key, "shape": list(info.shape), "dtype": str(info.dtype).removeprefix("torch.")}
        row["bytes"] = info.num_bytes
        if checkpoint.tensors is not None:
            row["chunks"] = len(checkpoint.tensors.entries[key].chunks)
        tensors.append(row)
        total = totals.setdefault(key.partition("/")[0], {"tensors": 0, "elements": 0, "bytes": 0})
        for name, amount in (("tensors", 1), ("elements", info.numel), ("bytes", info.num_bytes)):
            total[name] += amount
    report: dict[str, Any] = {"path": str(checkpoint.folder), "kind": checkpoint.kind}
    if checkpoint.tensors is not None:
        report |= {"counters": checkpoint.state["counters"], "layout": layout_of(checkpoint)}
    return report | {"totals": totals, "tensors": tensors}


def verify(args: argparse.Namespace) -> int:
    from megatron_adamba.checkpoint.canonical import read_checksums
    from megatron_adamba.checkpoint.offline import CANONICAL
    from megatron_adamba.checkpoint.verify import verify

    checkpoint = verify(Path(args.path))
    bare = checkpoint.kind == CANONICAL and not read_checksums(checkpoint.folder)
    note = "; it has no checksums: values are known to be finite, not to be unchanged" if bare else ""
    held = described(checkpoint.infos.values())
    print(f"OK: {checkpoint.folder}: {checkpoint.kind}{where(checkpoint)}, {held}{note}")
    return 0


def diff(args: argparse.Namespace) -> int:
    from megatron_adamba.checkpoint.diff import differences
    from megatron_adamba.checkpoint.offline import CANONICAL, TRAINING, open_checkpoint
    from megatron_adamba.checkpoint.training import verify_files

    if args.tolerance is not None and not 0 <= args.tolerance < math.inf:
        raise ConfigError(f"--tolerance {args.tolerance}: must be 0 or more, for example --tolerance 1e-6")
    first, second = open_checkpoint(Path(args.first)), open_checkpoint(Path(args.second))
    for checkpoint in (first, second):
        if checkpoint.kind == TRAINING:
            verify_files(checkpoint.folder)
    canonical = [checkpoint.folder for checkpoint in (first, second) if checkpoint.kind == CANONICAL]
    if len(canonical) == 1 and not args.weights_only:
        print(f"comparing weights only: {canonical[0]} is canonical and holds nothing else")
    found = 0
    weights_only = args.weights_only or bool(canonical)
    for difference in differences(first, second, weights_only, args.tolerance):
        found += 1
        print(f"{difference.name}: {difference.how}")
        if not args.all:
            return 1
    if found:
        print(f"{counted(found, 'tensor')} differ{'s' * (found == 1)}")
        return 1
    within = "" if args.tolerance is None else f" within {args.tolerance:g}"
    print(f"identical{within}: {described(first.weights.values() if weights_only else first.infos.values())}")
    return 0


if __name__ == "__main__":
    run_script(main, reworded)
