"""Whether a model that learned the difficulty tasks thinks where it has to: adaptive beside full compute and beside
every fixed width and exit.

python examples/difficulty/evaluate.py --model runs/difficulty/model --data runs/difficulty/data
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_adamba.config.script import run_script
from megatron_adamba.files import write_atomically

TIERS = ("easy", "medium", "hard")


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with heldout-TIER.jsonl")
    parser.add_argument("--items", type=int, help="only so many of each tier")
    parser.add_argument("--energy-price", type=float, help="nats; widths by lookup without")
    parser.add_argument("--full-width", action="store_true", help="exits alone")
    parser.add_argument("--exit-threshold", type=float, default=0.95)
    parser.add_argument("--expand-cost", type=float, default=0.5)
    parser.add_argument("--no-grid", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args(words)


def summary(results, num_layers: int) -> dict[str, float]:
    exits = [layer for result in results for layer in result.answer_exits]
    widths = [width for result in results for width in result.answer_widths]
    return {
        "accuracy": sum(result.right for result in results) / len(results),
        "left_early": sum(layer < num_layers for layer in exits) / len(exits),
        "mean_exit": sum(exits) / len(exits),
        "mean_width": sum(widths) / len(widths),
        "saved": 1 - sum(result.flops for result in results) / sum(result.full_flops for result in results),
        "flops_per_token": sum(r.flops for r in results) / (sum(r.full_flops for r in results)),
    }


def main(words: list[str]) -> int:
    args = parse(words)

    from rich.console import Console
    from rich.table import Table

    from megatron_adamba.inference.gate_quality import extra_loss, gate_quality
    from megatron_adamba.inference.items import evaluate_grid, evaluate_mode, read_items
    from megatron_adamba.inference.load import load_model
    from megatron_adamba.inference.modes import Mode

    loaded = load_model(args.model, "fp32")
    depth = loaded.model.config.num_layers
    tiers = {tier: read_items(args.data / f"heldout-{tier}.jsonl", loaded.tokenizer)[: args.items] for tier in TIERS}
    every = [item for items in tiers.values() for item in items]
    console = Console()
    settings = {"exit_threshold": args.exit_threshold, "expand_cost": args.expand_cost}
    modes = {
        "full": Mode("full"),
        "adaptive": Mode("adaptive", None, settings, args.energy_price, predict=not args.full_width),
    }
    report: dict = {"modes": {}}
    found = {}
    table = Table(title="held-out items")
    for name in ("mode", "tier", "accuracy", "left early", "mean exit", "mean width", "compute saved"):
        table.add_column(name, justify="right")
    for name, mode in modes.items():
        found[name] = evaluate_mode(loaded, every, mode)
        start, rows = 0, {}
        for tier, items in tiers.items():
            rows[tier] = summary(found[name][start : start + len(items)], depth)
            start += len(items)
        rows["all"] = summary(found[name], depth)
        report["modes"][name] = rows
        for tier, row in rows.items():
            table.add_row(name, tier, f"{row['accuracy']:.1%}", f"{row['left_early']:.1%}", f"{row['mean_exit']:.2f}",
                          f"{row['mean_width']:.1f}", f"{row['saved']:.1%}")  # fmt: skip
    console.print(table)
    quality = gate_quality(loaded, every, args.exit_threshold)
    report["gates"] = asdict(quality) | {"extra_loss_adaptive": extra_loss(found["adaptive"], found["full"], depth)}
    console.print(report["gates"])
    if not args.no_grid:
        report["grid"] = _grid(console, evaluate_grid(loaded, every), found["adaptive"])
    if args.json:
        write_atomically(args.json, (json.dumps(report, indent=2) + "\n").encode())
    return 0


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
    run_script(main)
