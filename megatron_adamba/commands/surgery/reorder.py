"""reorder: important channels and units first."""

from __future__ import annotations

from argparse import Namespace

from megatron_adamba.commands.surgery.jobs import job_command
from megatron_adamba.config.parser import CommandParser

KINDS = ("hidden", "ffn", "heads", "experts")


def add_options(parser: CommandParser) -> None:
    parser.add_argument("--data", metavar="PREFIX", help="dataset of calibration text")
    parser.add_argument("--tokens", type=int, default=65536, help="of it, from all over")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of one window")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of one forward pass")
    text = "a random order instead, which needs no text: for comparison"
    parser.add_argument("--random", type=int, metavar="SEED", help=text)
    parser.add_argument("--orders", default=",".join(KINDS), help="kinds to try, in this order")


def _plan(args: Namespace):
    from megatron_adamba.commands.progress import progress_bar
    from megatron_adamba.config.rules import check_seed, count, one_of
    from megatron_adamba.data.blend import open_dataset
    from megatron_adamba.data.packed import evaluation_batches
    from megatron_adamba.data.tokenizer import folder_tokenizer
    from megatron_adamba.errors import ConfigError
    from megatron_adamba.surgery.calibration import Calibration
    from megatron_adamba.surgery.reorder import reorder, shuffle

    if args.random is not None:
        check_seed("--random", args.random)
    if args.random is not None and args.data is None:
        return shuffle(args.source, args.random)
    if args.data is None or args.random is not None:
        raise ConfigError("reorder: takes --data PREFIX, text to measure importance on, or --random SEED; give one")
    for flag in ("tokens", "seq_len", "batch_size"):
        count(f"--{flag.replace('_', '-')}", getattr(args, flag), 2**40 if flag == "tokens" else 2**24)
    kinds = args.orders.split(",")
    for kind in kinds:
        one_of("--orders", kind, KINDS)
    tokenizer = folder_tokenizer(args.source)
    indexed = open_dataset(args.data, tokenizer, "--data")
    batches = evaluation_batches(indexed, args.seq_len, args.batch_size, tokenizer.eod_id)
    with progress_bar("measuring", None, "batches") as bar:
        calibration = Calibration(batches, args.tokens, bar.advance)
        recorded = {"data": args.data, "tokens": calibration.num_tokens, "seq_len": args.seq_len}
        expect = lambda passes: bar.expect(passes * len(calibration))
        job, trials = reorder(args.source, calibration, recorded, kinds, expect)
    print("mean loss over the narrow widths, on each half of the text:")
    for trial in trials:
        losses = "".join(f"  {before:.4f} -> {after:.4f}" for before, after in zip(trial.before, trial.after))
        print(f"{trial.kind:8} by {trial.measure:12}{losses}  {'helps' if trial.helps else 'left out'}")
    return job


COMMAND = job_command(
    "the same model with its important channels and units first, for narrow widths to keep",
    _plan,
    add_options,
    examples=("adamba surgery reorder runs/hybrid runs/ordered --data data/validation",),
)
