"""What adamba evaluate --adaptive does: every policy on the same tokens, as a table, a picture and JSON."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_adamba.commands.progress import progress_bar
from megatron_adamba.data.blend import open_dataset
from megatron_adamba.evaluation.pictures import draw_policies
from megatron_adamba.files import write_atomically
from megatron_adamba.inference.adaptive_evaluation import (
    PolicyRow,
    adaptive_modes,
    document_items,
    evaluate_modes,
    fixed_modes,
    over_widths,
)
from megatron_adamba.inference.items import read_items
from megatron_adamba.inference.load import load_model


def evaluate_policies(args: Namespace) -> None:
    """Raises ConfigError, DataError, CheckpointError."""
    loaded = load_model(args.model, args.dtype, verify=not args.no_verify)
    prices = args.energy_price if args.energy_price is not None else [None]
    rules = {"expand_cost": args.expand_cost, "min_width": args.min_width}
    modes = adaptive_modes(args.exit_threshold, prices, rules, not args.full_width)
    # refuses what cannot be, before anything is measured
    asks = [mode.policy(loaded, [loaded.tokenizer.eod_id]) and mode.asks_estimator(loaded) for _, _, mode in modes]
    if args.items is not None:
        items, num_bytes = read_items(args.items, loaded.tokenizer), None
    else:
        read = loaded.gate_config.prompt_tokens if any(asks) else 1
        indexed = open_dataset(args.data, loaded.tokenizer, "--data")
        items, num_bytes = document_items(indexed, loaded.tokenizer, args.seq_len, read, args.max_tokens)
    modes = [*fixed_modes(loaded, args.fixed_exits), *modes]
    with progress_bar("evaluating", len(items) * len(modes), "pieces") as bar:
        rows = evaluate_modes(loaded, items, modes, num_bytes, args.batch_size, bar.advance)
    scored = sum(len(item.answer) for item in items)
    console = Console()
    print_policies(console, rows, f"{scored:,} scored tokens of {len(items):,} pieces")
    if gaps := over_widths(rows):
        unit = "nats per token" if num_bytes is None else "bits per byte"
        low, high = min(gaps, key=gaps.__getitem__), max(gaps, key=gaps.__getitem__)
        console.print(
            f"against the curve of the fixed widths, in {unit}: {gaps[low]:+.4f} ({low}) to {gaps[high]:+.4f} ({high})"
        )
    if args.json:
        found = [asdict(row) for row in rows]
        report = {"model": args.model, "data": str(args.data or args.items), "rows": found, "over_widths": gaps}
        write_atomically(Path(args.json), (json.dumps(report, indent=2) + "\n").encode())
    if args.plot:
        draw_policies(rows, Path(args.plot))


def print_policies(console: Console, rows: Sequence[PolicyRow], title: str) -> None:
    """Two tables, as one would be wider than a terminal."""
    table = _table(title, "nats / token", "bits / byte", "FLOPs / token", "saved")
    for row in rows:
        bits = "-" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
        table.add_row(row.name, f"{row.nats_per_token:.4f}", bits, f"{row.flops_per_token:.3e}", f"{row.saved:.1%}")
    console.print(table)
    table = _table("what is right, and what ran, on average", "tokens right", "items right", "blocks", "width")
    for row in rows:
        right = (f"{row.token_accuracy:.1%}", f"{row.exact_match:.1%}")
        table.add_row(row.name, *right, f"{row.mean_exit:.2f}", f"{row.mean_width:.0f}")
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    table.add_column("policy", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table
