"""Whether a model that learned the difficulty tasks thinks where it has to: adaptive beside full compute and beside
every fixed width and exit.

python examples/difficulty/evaluate.py --model runs/difficulty/model --data runs/difficulty/data

Unless they are given, threshold and energy price are chosen on the tuning items: the cheapest that come within MARGIN
of full compute's accuracy there and give each tier more width and depth than the one before. What is reported are the
held-out items.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_adamba.config.script import run_script
from megatron_adamba.files import write_atomically

TIERS = ("easy", "medium", "hard")
THRESHOLDS = (0.98, 0.985, 0.99, 0.993, 0.995, 0.997, 0.998)
ENERGY_PRICES = (0.0005, 0.002, 0.004)
"""nats for all of the model's compute for a token"""
QUALITY_THRESHOLD = 0.95
"""at which the gates' extra loss is measured, at full width"""
MIN_WIDTH = 128
"""of the estimator's choice"""
MARGIN = 0.004
"""of accuracy"""


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with {heldout,tuning}-TIER.jsonl")
    parser.add_argument("--items", type=int, help="only so many of each tier")
    parser.add_argument("--energy-price", type=float, help="nats; chosen on the tuning items without")
    parser.add_argument("--exit-threshold", type=float, help="chosen on the tuning items without")
    parser.add_argument("--no-grid", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args(words)


def summary(results, num_layers: int) -> dict[str, float]:
    """Exits and widths: of the answer's tokens, averaged over items."""
    exits = [layer for result in results for layer in result.answer_exits]
    mean = lambda values: sum(values) / len(values)
    return {
        "accuracy": mean([result.right for result in results]),
        "left_early": mean([layer < num_layers for layer in exits]),
        "mean_exit": mean([mean(result.answer_exits) for result in results]),
        "mean_width": mean([mean(result.answer_widths) for result in results]),
        "saved": saved(results),
    }


def saved(results) -> float:
    """Share of full compute that all tokens of all items did without, prompts included."""
    return 1 - sum(result.flops for result in results) / sum(result.full_flops for result in results)


def choose(loaded, tiers: dict[str, list], args: argparse.Namespace):
    """The mode that saves most of those within MARGIN of full compute that think more for each harder tier; without
    one, of those within MARGIN; without one, the most accurate."""
    from megatron_adamba.inference.items import evaluate_mode
    from megatron_adamba.inference.modes import Mode

    thresholds = THRESHOLDS if args.exit_threshold is None else (args.exit_threshold,)
    prices = ENERGY_PRICES if args.energy_price is None else (args.energy_price,)
    rules = lambda threshold: {"exit_threshold": threshold, "min_width": MIN_WIDTH}
    modes = [Mode("adaptive", None, rules(threshold), price) for price in prices for threshold in thresholds]
    if len(modes) == 1:
        return modes[0]
    items = [item for tier in tiers.values() for item in tier]
    enough = sum(result.right for result in evaluate_mode(loaded, items, Mode("full"))) - MARGIN * len(items)
    tried = []
    for mode in modes:
        results = evaluate_mode(loaded, items, mode)
        right = sum(result.right for result in results)
        rows = list(by_tier(results, tiers, loaded.model.config.num_layers).values())
        rises = all(one[key] < harder[key] for one, harder in pairwise(rows) for key in ("mean_exit", "mean_width"))
        tried.append((right >= enough, right < enough or rises, saved(results) if right >= enough else right, mode))
    return max(tried, key=lambda row: row[:3])[3]


def by_tier(results, tiers: dict[str, list], depth: int) -> dict[str, dict[str, float]]:
    """results: of all items of all tiers, in order."""
    start, rows = 0, {}
    for tier, items in tiers.items():
        rows[tier] = summary(results[start : start + len(items)], depth)
        start += len(items)
    return rows


def main(words: list[str]) -> int:
    args = parse(words)

    from rich.console import Console

    from megatron_adamba.inference.items import evaluate_grid, evaluate_mode, read_items
    from megatron_adamba.inference.load import load_model
    from megatron_adamba.inference.modes import Mode

    loaded = load_model(args.model, "fp32")
    read = lambda side, tier: read_items(args.data / f"{side}-{tier}.jsonl", loaded.tokenizer)[: args.items]
    tiers = {tier: read("heldout", tier) for tier in TIERS}
    every = [item for items in tiers.values() for item in items]
    console = Console()
    chosen = choose(loaded, {tier: read("tuning", tier) for tier in TIERS}, args)
    threshold = chosen.adaptive["exit_threshold"]
    console.print(
        f"adaptive: --exit-threshold {threshold} --energy-price {chosen.energy_price} --min-width {MIN_WIDTH}"
    )
    found = {name: evaluate_mode(loaded, every, mode) for name, mode in (("full", Mode("full")), ("adaptive", chosen))}
    report = {
        "exit_threshold": threshold,
        "energy_price": chosen.energy_price,
        "min_width": MIN_WIDTH,
        "modes": _modes(console, found, tiers, loaded.model.config.num_layers),
        "gates": _gates(console, loaded, every, found["full"]),
    }
    if not args.no_grid:
        report["grid"] = _grid(console, evaluate_grid(loaded, every), found["adaptive"])
    if args.json:
        write_atomically(args.json, (json.dumps(report, indent=2) + "\n").encode())
    return 0


def _modes(console, found, tiers, depth: int) -> dict[str, dict]:
    """Tier by tier and together, by mode."""
    from rich.table import Table

    table = Table(title="held-out items")
    for name in ("mode", "tier", "accuracy", "left early", "mean exit", "mean width", "compute saved"):
        table.add_column(name, justify="right")
    modes = {}
    for name, results in found.items():
        modes[name] = by_tier(results, tiers, depth) | {"all": summary(results, depth)}
        for tier, row in modes[name].items():
            table.add_row(name, tier, f"{row['accuracy']:.1%}", f"{row['left_early']:.1%}", f"{row['mean_exit']:.2f}",
                          f"{row['mean_width']:.1f}", f"{row['saved']:.1%}")  # fmt: skip
    console.print(table)
    return modes


def _gates(console, loaded, items, full) -> dict[str, float]:
    """How well they foresee, at full width."""
    from megatron_adamba.inference.gate_quality import extra_loss, gate_quality
    from megatron_adamba.inference.items import evaluate_mode
    from megatron_adamba.inference.modes import Mode

    exits = Mode("adaptive", None, {"exit_threshold": QUALITY_THRESHOLD}, None, predict=False)
    quality = asdict(gate_quality(loaded, items, QUALITY_THRESHOLD))
    with_exits = extra_loss(evaluate_mode(loaded, items, exits), full, loaded.model.config.num_layers)
    console.print(
        f"gates: squared error {quality['squared_error']:.4f}, variance of the target {quality['variance']:.4f}; "
        f"at confidence {QUALITY_THRESHOLD}, {quality['leaving']:.1%} leave and lose {quality['extra_loss']:.4f} nats, "
        f"{with_exits:.4f} where all others leave too"
    )
    return quality | {"extra_loss_with_exits": with_exits}


def _grid(console, cells, adaptive) -> list[dict]:
    """The accuracy of every fixed pair; those that cost no more than the adaptive run are marked."""
    from rich.table import Table

    spent = sum(result.flops for result in adaptive)
    accuracy = sum(result.right for result in adaptive) / len(adaptive)
    widths = sorted({cell.width for cell in cells})
    table = Table(title=f"fixed width and exit layer: accuracy; * costs no more than adaptive ({accuracy:.1%})")
    table.add_column("exit layer", justify="right")
    for width in widths:
        table.add_column(f"width {width}", justify="right")
    for layer in sorted({cell.exit_layer for cell in cells}):
        row = [cell for cell in cells if cell.exit_layer == layer]
        table.add_row(str(layer), *(f"{cell.accuracy:.1%}{'*' if cell.flops <= spent else ' '}" for cell in row))
    console.print(table)
    affordable = [cell for cell in cells if cell.flops <= spent]
    best = max(affordable, key=lambda cell: cell.accuracy, default=None)
    if best is not None:
        console.print(
            f"best fixed pair within adaptive's compute: width {best.width}, exit {best.exit_layer}: "
            f"{best.accuracy:.1%} against {accuracy:.1%}"
        )
    return [
        {"width": cell.width, "exit_layer": cell.exit_layer, "accuracy": cell.accuracy, "flops": cell.flops}
        for cell in cells
    ]


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
