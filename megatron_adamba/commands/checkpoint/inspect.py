"""checkpoint inspect: what a checkpoint holds."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_adamba.commands.checkpoint.described import described, layout_of, reworded, where
from megatron_adamba.commands.command import Command
from megatron_adamba.config.parser import CommandParser
from megatron_adamba.files import write_atomically

if TYPE_CHECKING:
    from rich.tree import Tree

    from megatron_adamba.checkpoint.offline import OpenCheckpoint


def add_options(parser: CommandParser) -> None:
    parser.add_argument("path", metavar="PATH", help="canonical folder, step-NNNNNNNN, or RUN/checkpoints")
    parser.add_argument("--json", metavar="FILE", help="write it as JSON too")


def run(args: Namespace) -> int:
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


def as_json(checkpoint: OpenCheckpoint) -> dict[str, Any]:
    """{path, kind, counters, layout, tensors: [{name, shape, dtype, bytes, chunks}], totals: {kind of tensor: ...}}."""
    tensors: list[dict[str, Any]] = []
    totals: dict[str, dict[str, int]] = {}
    for key, info in checkpoint.infos.items():
        row: dict[str, Any] = {"name": key, "shape": list(info.shape), "dtype": str(info.dtype).removeprefix("torch.")}
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


COMMAND = Command(
    "names, shapes, sizes of what a checkpoint holds",
    add_options,
    run,
    examples=("adamba checkpoint inspect RUN/checkpoints/step-00000200",),
    reworded=reworded,
)
