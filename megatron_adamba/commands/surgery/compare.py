"""compare: how far the logits and losses of two models are apart on real tokens."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_adamba.commands.command import Command
from megatron_adamba.commands.surgery.extract import add_plan_flags, plan_flags
from megatron_adamba.config.parser import CommandParser
from megatron_adamba.config.rules import count, file_to_write
from megatron_adamba.files import write_atomically


def add_options(parser: CommandParser) -> None:
    parser.add_argument("first", metavar="A", type=Path, help="folder of a canonical checkpoint")
    parser.add_argument("second", metavar="B", type=Path, help="folder of another one with the same vocabulary")
    parser.add_argument("--data", metavar="PREFIX", nargs="+", required=True, help="prefixes of tokenized datasets")
    add_plan_flags(parser)
    parser.add_argument("--tokens", type=int, help="only the first so many tokens")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of one window")
    parser.add_argument("--batch-size", type=int, default=1, help="windows of one forward pass")
    parser.add_argument("--json", metavar="FILE", help="write the numbers as JSON too")


def run(args: Namespace) -> int:
    width, widths, exit_layer = plan_flags(args)
    for flag in ("tokens", "seq_len", "batch_size"):
        if getattr(args, flag) is not None:
            count(f"--{flag.replace('_', '-')}", getattr(args, flag), 2**40 if flag == "tokens" else 2**24)
    file_to_write("--json", args.json, "report.json")

    from megatron_adamba.commands.progress import progress_bar
    from megatron_adamba.inference.load import load_model
    from megatron_adamba.surgery.compare import comparable_plans, compare_models

    folders = (args.first, args.second)
    plans = comparable_plans(folders, width, widths, exit_layer)
    first, second = (load_model(folder, "fp32") for folder in folders)
    parts = _parts(args, first.tokenizer)
    with progress_bar("comparing", sum(map(len, parts)), "batches") as bar:
        result = compare_models((first.model, second.model), plans, _counted(parts, bar.advance), first.device)
    for line in _lines(folders, plans, result):
        print(line)
    if args.json:
        write_atomically(Path(args.json), (json.dumps(_report(args, plans, result), indent=2) + "\n").encode())
    return 0


def _lines(folders, plans, result) -> Iterator[str]:
    worst, mean = result.max_logit_difference, result.mean_logit_difference
    yield f"logits  differ by {worst:.3e} at most, {mean:.3e} on average, over {result.tokens:,} tokens"
    for folder, plan, loss in zip(folders, plans, (result.first_loss, result.second_loss)):
        yield f"loss    {loss:.6f} nats per token: {folder} at width {plan.label}"
    yield f"loss    {result.loss_difference:+.3e} from the first to the second"


def _report(args: Namespace, plans, result) -> dict[str, Any]:
    models = {"first": str(args.first), "second": str(args.second), "data": args.data}
    written = [{"widths": list(plan.widths), "exit_layer": plan.exit_layer} for plan in plans]
    chosen = {"first_plan": written[0], "second_plan": written[1]}
    return {**models, **chosen, **asdict(result), "loss_difference": result.loss_difference}


def _parts(args: Namespace, tokenizer) -> list[Any]:
    """The batches of each dataset; all are opened before the first is read."""
    from megatron_adamba.data.blend import open_dataset
    from megatron_adamba.data.packed import evaluation_batches

    opened = [open_dataset(prefix, tokenizer, "--data") for prefix in args.data]
    left = args.tokens
    parts = []
    for indexed in opened:
        if left is not None and left <= 0:
            break
        part = evaluation_batches(indexed, args.seq_len, args.batch_size, tokenizer.eod_id, left)
        parts.append(part)
        left = None if left is None else left - part.num_tokens
    return parts


def _counted(parts: list[Any], advance: Callable[[], None]) -> Iterator[Any]:
    for part in parts:
        for batch in part:
            yield batch
            # whoever asks for the next one is done with this one
            advance()


COMMAND = Command(
    "how far logits and losses of two models are apart on real tokens, in fp32",
    add_options,
    run,
    examples=("adamba surgery compare runs/hybrid runs/hybrid-720 --width 720 --data data/validation",),
)
