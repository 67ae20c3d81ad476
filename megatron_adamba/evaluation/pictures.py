"""Pictures of a run: quality against compute, and its curves."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from megatron_adamba.evaluation.widths import EvaluationRow
from megatron_adamba.files import write_atomically


def _figure(columns: int = 1):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(5.6 * columns, 4.0), layout="constrained")


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    pyplot.close(figure)
    write_atomically(path, content.getvalue())


def draw_pareto(rows: Sequence[EvaluationRow], path: Path) -> None:
    """Bits per byte (nats per token where bytes are unknown) against active forward FLOPs per token."""
    bits = all(row.bits_per_byte is not None for row in rows)
    values = [row.bits_per_byte if bits else row.nats_per_token for row in rows]
    flops = [row.flops_per_token / 1e6 for row in rows]
    figure, axes = _figure()
    axes.plot(flops, values, marker="o", color="#1f5fa8")
    for row, x, y in zip(rows, flops, values):
        # the last label would leave the picture on the right
        last = x == max(flops)
        place = {"xytext": (-9, -13), "ha": "right"} if last else {"xytext": (7, 6)}
        axes.annotate(f"width {row.width}", (x, y), textcoords="offset points", **place)
    axes.margins(x=0.16, y=0.14)
    axes.set_xlabel("active forward MFLOPs per token")
    axes.set_ylabel("bits per byte" if bits else "nats per token")
    axes.set_title(f"one model, {len(rows)} widths, {rows[0].tokens:,} held-out tokens")
    axes.grid(alpha=0.3)
    _save(figure, path)


def draw_policies(rows: Sequence[Any], path: Path) -> None:
    """Quality against compute of fixed widths, fixed exits and the model's own choices.

    rows: with kind (width | exit | adaptive), bits_per_byte or None, nats_per_token and flops_per_token.
    """
    bits = all(row.bits_per_byte is not None for row in rows)
    figure, axes = _figure()
    looks = {"width": ("o", "-", "#1f5fa8"), "exit": ("s", "--", "#8a8a8a"), "adaptive": ("^", "-", "#c2452d")}
    names = {"width": "fixed widths", "exit": "fixed exits at full width", "adaptive": "the model's own choices"}
    for kind, (marker, line, colour) in looks.items():
        points = sorted(
            (row.flops_per_token / 1e6, row.bits_per_byte if bits else row.nats_per_token)
            for row in rows
            if row.kind == kind
        )
        if points:
            axes.plot(*zip(*points), marker=marker, linestyle=line, color=colour, label=names[kind])
    axes.set_xlabel("active forward MFLOPs per token")
    axes.set_ylabel("bits per byte" if bits else "nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def draw_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss over steps, evaluations at every width, gradient norm and speed. records: lines of metrics.jsonl."""
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "eval_width" in record]
    figure, (left, middle, right) = _figure(3)
    _line(left, steps, "loss", "all passes")
    _line(left, steps, "loss_full", "full width")
    for width in sorted({record["eval_width"] for record in evaluations}):
        points = [record for record in evaluations if record["eval_width"] == width]
        x, y = [p["step"] for p in points], [p["eval_nats_per_token"] for p in points]
        left.plot(x, y, marker="o", linestyle="--", label=f"held out, width {width}")
    left.set_ylabel("nats per token")
    _line(middle, steps, "grad_norm", "gradient norm")
    _line(middle, steps, "lr_factor", "learning rate, share of peak")
    _line(right, steps, "tokens_per_second", "tokens per second")
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    _save(figure, path)


def draw_road(runs: Sequence[tuple[str, Sequence[dict[str, Any]]]], path: Path) -> None:
    """The losses of runs that follow each other, end to end. runs: name and lines of metrics.jsonl of each."""
    figure, axes = _figure()
    figure.set_size_inches(9.0, 4.5)
    start, held_out = 0, {}
    for number, (name, records) in enumerate(runs):
        steps = [record for record in records if "loss" in record]
        full = [record.get("loss_full", record["loss"]) for record in steps]
        axes.plot([start + record["step"] for record in steps], full, linewidth=1.0, label=f"{name}, training")
        for record in records:
            if "eval_width" in record:
                place = (start + record["step"], record["eval_nats_per_token"])
                held_out.setdefault(record["eval_width"], []).append(place)
        start += max((record["step"] for record in records), default=0)
        if number + 1 < len(runs):
            axes.axvline(start, color="grey", linewidth=0.8, linestyle=":")
    for width, places in sorted(held_out.items()):
        axes.plot(*zip(*places), marker="o", markersize=3, linestyle="--", linewidth=0.8, label=f"held out, {width}")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    _save(figure, path)


def _line(axes, records: Sequence[dict[str, Any]], key: str, label: str) -> None:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    if points:
        axes.plot([step for step, _ in points], [value for _, value in points], label=label, linewidth=1.2)
