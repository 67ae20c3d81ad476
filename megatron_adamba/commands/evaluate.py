"""evaluate: loss of a trained model at every width, as a table and a picture."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from megatron_adamba.commands.command import Command
from megatron_adamba.config.parser import CommandParser, number
from megatron_adamba.config.rules import count, file_to_write, in_range
from megatron_adamba.errors import ConfigError
from megatron_adamba.files import write_atomically


def add_options(parser: CommandParser) -> None:
    parser.add_argument("--model", required=True, help="folder of a canonical checkpoint, e.g. RUN/model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="prefix of the validation dataset")
    source.add_argument("--items", type=Path, help='with --adaptive: lines of {"prompt", "answer"}')
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of one window")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of one forward pass")
    parser.add_argument("--max-tokens", type=int, help="only the first so many tokens")
    parser.add_argument("--dtype", help="bf16 | fp32; by default bf16 where the machine has it")
    parser.add_argument("--no-verify", action="store_true", help="do not hold tensors against their checksums")
    parser.add_argument("--exits", action="store_true", help="full width up to each layer, too")
    written = parser.add_argument_group("what is written")
    written.add_argument("--plot", metavar="FILE", help="picture: bits per byte against active FLOPs per token")
    written.add_argument("--json", metavar="FILE", help="write the table as JSON too")
    group = parser.add_argument_group("the model's own choices")
    group.add_argument("--adaptive", action="store_true", help="score fixed widths, fixed exits and its own choices")
    group.add_argument("--exit-threshold", type=float, nargs="+", default=[0.95], help="each is a row")
    group.add_argument("--energy-price", type=number, nargs="+", help="each is a row; without one, by lookup")
    group.add_argument("--expand-cost", type=number, default=0.5, help="expected nats to widen above; inf: never")
    group.add_argument("--min-width", type=int, default=1, help="the estimator chooses none under it")
    group.add_argument("--full-width", action="store_true", help="exits alone, the estimator is not asked")
    group.add_argument("--fixed-exits", type=int, default=6, help="exits at full width to compare with")


def run(args: Namespace) -> int:
    _check(args)
    if args.adaptive:
        from megatron_adamba.commands.policies import evaluate_policies

        evaluate_policies(args)
        return 0
    if args.data is None:
        raise ConfigError("--items: is read with --adaptive alone; add it, or give --data")

    from rich.console import Console

    from megatron_adamba.commands.progress import progress_bar
    from megatron_adamba.data.blend import open_dataset
    from megatron_adamba.data.packed import evaluation_batches
    from megatron_adamba.elastic.plan import uniform_plan
    from megatron_adamba.evaluation.pictures import draw_pareto
    from megatron_adamba.evaluation.widths import evaluate_plans, exit_plans
    from megatron_adamba.inference.load import load_model
    from megatron_adamba.parallel.topology import single_process
    from megatron_adamba.training.report import print_rows

    loaded = load_model(args.model, args.dtype, verify=not args.no_verify)
    indexed = open_dataset(args.data, loaded.tokenizer, "--data")
    batches = evaluation_batches(indexed, args.seq_len, args.batch_size, loaded.tokenizer.eod_id, args.max_tokens)
    config = loaded.model.config
    plans = [uniform_plan(config, width) for width in config.widths]
    if args.exits:
        plans += exit_plans(config, 1, config.num_layers)

    def forward(tokens, labels, seq_idx, plan):
        return loaded.model(tokens, labels, seq_idx, plan, reduction="none")

    with progress_bar("evaluating", len(batches) * len(plans), "passes") as bar:
        rows = evaluate_plans(forward, config, batches, plans, loaded.device, single_process(), bar.advance)
    print_rows(Console(), rows)
    if args.json:
        report = {"model": args.model, "data": args.data, "dtype": loaded.dtype, "rows": [asdict(row) for row in rows]}
        write_atomically(Path(args.json), (json.dumps(report, indent=2) + "\n").encode())
    if args.plot:
        draw_pareto([row for row in rows if row.exit_layer is None], Path(args.plot))
    return 0


def _check(args: Namespace) -> None:
    """Raises ConfigError."""
    count("--seq-len", args.seq_len, 2**24)
    count("--batch-size", args.batch_size, 2**20)
    in_range("--fixed-exits", args.fixed_exits, 0, 10**6)
    if args.max_tokens is not None:
        count("--max-tokens", args.max_tokens, 2**62)
    file_to_write("--plot", args.plot, "pareto.png")
    file_to_write("--json", args.json, "eval.json")


COMMAND = Command(
    "loss of a model at every width, as a table and a picture",
    add_options,
    run,
    examples=(
        "adamba evaluate --model runs/quickstart/model --data runs/quickstart/data/validation",
        "adamba evaluate --model runs/quickstart/model --data runs/quickstart/data/validation --adaptive",
        "adamba evaluate --model runs/difficulty/model --items runs/difficulty/data/heldout-hard.jsonl --adaptive",
    ),
)
