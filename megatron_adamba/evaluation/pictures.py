"""Pictures of a run: quality against compute, and its curves. Each is drawn for 900 pixels, the width of a page."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from megatron_adamba.evaluation.widths import EvaluationRow
from megatron_adamba.files import write_atomically

DPI = 130
INCHES = 900 / DPI
BLUE, ORANGE, GREY = "#1f5fa8", "#c8730a", "#7d7d7d"
HELD_OUT = "held out, width {}"
KINDS = ("width", "exit", "adaptive")
UNITS = ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"), (1, "FLOPs"))


def draw_pareto(rows: Sequence[EvaluationRow], path: Path) -> None:
    """Bits per byte (nats per token where bytes are unknown) against active forward FLOPs per token."""
    _save(pareto_figure(rows), path)


def draw_policies(rows: Sequence[Any], path: Path) -> None:
    """Quality against compute of fixed widths, fixed exits and the model's own choices.

    rows: with kind (width | exit | adaptive), bits_per_byte or None, nats_per_token and flops_per_token.
    """
    _save(policies_figure(rows), path)


def draw_curves(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss over steps, evaluations at every width, gradient norm, learning rate and speed. records: lines of
    metrics.jsonl."""
    _save(curves_figure(records), path)


def draw_road(runs: Sequence[tuple[str, Sequence[dict[str, Any]]]], path: Path) -> None:
    """The losses of runs that follow each other, end to end. runs: name and lines of metrics.jsonl of each."""
    _save(road_figure(runs), path)


def envelope(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (compute, loss) that no other one equals or beats at no more compute, from the cheapest on."""
    best: list[tuple[float, float]] = []
    for compute, loss in sorted(points):
        if not best or loss < best[-1][1]:
            best.append((compute, loss))
    return best


def pareto_figure(rows: Sequence[EvaluationRow]) -> Figure:
    figure, axes = _figure()
    points, measure = _against_compute(axes, rows)
    axes.plot(*zip(*points), marker="o", color=BLUE, label=f"fixed widths, {rows[0].tokens:,} held-out tokens")
    for row, (x, y) in zip(rows, points):
        # the last label would leave the picture on the right
        last = x == max(points)[0]
        place = {"xytext": (-9, -13), "ha": "right"} if last else {"xytext": (7, 6)}
        axes.annotate(f"width {row.width}", (x, y), textcoords="offset points", **place)
    axes.margins(x=0.16, y=0.14)
    axes.set_title(f"{measure} against compute: one model at {len(rows)} widths")
    axes.legend(loc="upper right")
    return figure


def policies_figure(rows: Sequence[Any]) -> Figure:
    """Lines join what is ordered, as widths and exits are. Choices are points, with a step along the best of them."""
    figure, axes = _figure()
    points, measure = _against_compute(axes, rows)
    found = {kind: sorted(point for row, point in zip(rows, points) if row.kind == kind) for kind in KINDS}
    if found["width"]:
        axes.plot(*zip(*found["width"]), marker="o", color=BLUE, label="fixed widths")
    if found["exit"]:
        line = {"marker": "s", "linestyle": "--", "color": GREY}
        axes.plot(*zip(*found["exit"]), **line, label="fixed exits at full width")
    if found["adaptive"]:
        axes.scatter(*zip(*found["adaptive"]), marker="^", color=ORANGE, zorder=3, label="the model's own choices")
        best = envelope(found["adaptive"])
        # the best one stays the best with more compute, up to the dearest choice
        best.append((found["adaptive"][-1][0], best[-1][1]))
        step = {"drawstyle": "steps-post", "linewidth": 1.2, "alpha": 0.7}
        axes.plot(*zip(*best), color=ORANGE, **step, label="the best of them at no more compute")
    axes.set_title(f"{measure} against compute: fixed plans and the model's own choices")
    axes.legend()
    return figure


def curves_figure(records: Sequence[dict[str, Any]]) -> Figure:
    """The loss above, and below it three figures of a series each, named over it."""
    steps = [record for record in records if "loss" in record]
    figure = Figure(figsize=(INCHES, INCHES * 0.86), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(3, 2))[:, 0]
    top, small = above.subplots(), below.subplots(1, 3)
    _line(top, steps, "loss", "training, all passes", color="#b5b5b5")
    _line(top, steps, "loss_full", "training, full width", color=GREY)
    held_out = _held_out(records)
    for colour, (width, points) in zip(_blues(len(held_out)), sorted(held_out.items())):
        line = {"marker": "o", "markersize": 4, "linestyle": "--", "label": HELD_OUT.format(width)}
        top.plot(*zip(*points), **line, color=colour)
    _finish(top, "Loss over steps", "nats per token")
    _line(small[0], steps, "grad_norm", "gradient norm", color=BLUE)
    _finish(small[0], "Gradient norm", "L2 norm")
    _line(small[1], steps, "lr_factor", "learning rate", color=BLUE)
    _finish(small[1], "Learning rate", "share of its peak")
    _line(small[2], steps, "tokens_per_second", "speed", color=BLUE)
    _finish(small[2], "Speed", "tokens per second")
    return figure


def road_figure(runs: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> Figure:
    """Held-out lines are broken between runs: another model begins there."""
    figure, axes = _figure(0.62)
    start = 0
    held_out: dict[int, list[tuple[float, float]]] = {}
    for number, (name, records) in enumerate(runs):
        steps = [record for record in records if "loss" in record]
        full = [record.get("loss_full", record["loss"]) for record in steps]
        colour = matplotlib.colormaps["Set2"](number % 8)
        places = [start + record["step"] for record in steps]
        axes.plot(places, full, linewidth=1.2, color=colour, label=f"training, {name}")
        for width, found in _held_out(records).items():
            moved = [(start + step, loss) for step, loss in found]
            held_out.setdefault(width, []).extend([*moved, (math.nan, math.nan)])
        start += max((record["step"] for record in records), default=0)
        if number + 1 < len(runs):
            axes.axvline(start, color="grey", linewidth=0.8, linestyle=":")
    for colour, (width, points) in zip(_blues(len(held_out)), sorted(held_out.items())):
        line = {"marker": "o", "markersize": 4, "linestyle": "--", "linewidth": 1.0}
        axes.plot(*zip(*points), **line, color=colour, label=HELD_OUT.format(width))
    axes.set_title(f"Loss over {len(runs)} runs, each of which goes on with the last")
    axes.set_xlabel("steps, counted through all runs")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    # beside the curves, which fill the picture
    figure.legend(loc="outside lower center", ncols=min(4, len(runs) + len(held_out)), fontsize=8)
    return figure


def _figure(height: float = 0.68) -> tuple[Figure, Any]:
    figure = Figure(figsize=(INCHES, INCHES * height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    write_atomically(path, content.getvalue())


def _against_compute(axes, rows: Sequence[Any]) -> tuple[list[tuple[float, float]], str]:
    """Labels the axes; the points of the rows, and the name of what is measured."""
    bits = all(row.bits_per_byte is not None for row in rows)
    most = max(row.flops_per_token for row in rows)
    size, unit = next((size, unit) for size, unit in UNITS if most >= size or size == 1)
    axes.set_xlabel(f"active forward {unit} per token")
    axes.set_ylabel("bits per byte" if bits else "nats per token")
    axes.grid(alpha=0.3)
    points = [(row.flops_per_token / size, row.bits_per_byte if bits else row.nats_per_token) for row in rows]
    return points, "Bits per byte" if bits else "Nats per token"


def _held_out(records: Sequence[dict[str, Any]]) -> dict[int, list[tuple[int, float]]]:
    """(step, loss) of the evaluations, by width."""
    found: dict[int, list[tuple[int, float]]] = {}
    for record in records:
        if "eval_width" in record:
            found.setdefault(record["eval_width"], []).append((record["step"], record["eval_nats_per_token"]))
    return found


def _blues(count: int) -> Iterator[Any]:
    """From light to dark, as widths go from narrow to wide."""
    return (matplotlib.colormaps["Blues"](0.4 + 0.55 * i / max(count - 1, 1)) for i in range(count))


def _finish(axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    if len(axes.lines) > 1:
        axes.legend(fontsize=8)


def _line(axes, records: Sequence[dict[str, Any]], key: str, label: str, color: str) -> None:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    if points:
        axes.plot(*zip(*points), label=label, linewidth=1.2, color=color)
