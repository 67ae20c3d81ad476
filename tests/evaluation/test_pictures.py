"""What the pictures say: titles, labelled axes with units, legends, and the line along the best choices."""

from __future__ import annotations

import io
import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_adamba.evaluation.pictures import (
    curves_figure,
    draw_curves,
    draw_pareto,
    draw_policies,
    draw_road,
    envelope,
    pareto_figure,
    policies_figure,
    road_figure,
)

PLANS = [("width", 8, 1.36), ("width", 9, 1.33), ("width", 11.4, 1.31), ("width", 20, 1.25), ("exit", 6.4, 1.43)]
PLANS += [("exit", 13.4, 1.263), ("exit", 18.3, 1.249)]
CHOICES = [("adaptive", 14.6, 1.28), ("adaptive", 9.7, 1.295), ("adaptive", 14.1, 1.264), ("adaptive", 11.9, 1.2735)]
CHOICES += [("adaptive", 12.1, 1.276), ("adaptive", 19.2, 1.2536)]


def rows(points, size: float = 1e6, bits: bool = True) -> list[SimpleNamespace]:
    made = []
    for number, (kind, flops, loss) in enumerate(points):
        values = {"kind": kind, "flops_per_token": flops * size, "nats_per_token": 3 * loss, "width": 32 << number}
        made.append(SimpleNamespace(**values, bits_per_byte=loss if bits else None, tokens=120_558))
    return made


def records(widths=(32, 64, 128, 256), last: int = 300) -> list[dict]:
    noise, found = random.Random(0), []
    for step in range(10, last + 1, 10):
        loss = 3 + 5 / step**0.5 + noise.uniform(-0.1, 0.1)
        found.append({"step": step, "loss": loss + 0.3, "loss_full": loss, "grad_norm": 1 + 9 / step})
        found[-1] |= {"lr_factor": 1 - step / last, "tokens_per_second": 9000 + noise.uniform(-500, 500)}
    for step, width in itertools.product(range(60, last + 1, 60), widths):
        found.append({"step": step, "eval_width": width, "eval_nats_per_token": 3 + 4 / step**0.5 + 20 / width})
    return found


def legend(place) -> list[str]:
    return [text.get_text() for text in place.legends[0].get_texts()] if hasattr(place, "legends") else _names(place)


def _names(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def by_name(axes, label: str) -> list[tuple[float, float]]:
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return list(zip(*line.get_data()))


def test_the_envelope_is_the_best_at_no_more_compute():
    points = [(flops, loss) for _, flops, loss in CHOICES]
    assert envelope(points) == [(9.7, 1.295), (11.9, 1.2735), (14.1, 1.264), (19.2, 1.2536)]
    assert envelope([]) == [] and envelope([(1, 2), (1, 1), (2, 1), (1, 1)]) == [(1, 1)]


def test_the_envelope_of_any_points():
    numbers = random.Random(1)
    for _ in range(200):
        points = [(numbers.randrange(6), numbers.randrange(6)) for _ in range(numbers.randrange(1, 9))]
        pairs = itertools.product(points, points)
        beaten = {a for a, b in pairs if b != a and b[0] <= a[0] and b[1] <= a[1]}
        assert envelope(points) == sorted(set(points) - beaten)


@pytest.mark.parametrize(("size", "unit"), [(1e6, "MFLOPs"), (1e9, "GFLOPs"), (1e12, "TFLOPs"), (10, "FLOPs")])
def test_quality_against_compute(size, unit):
    (axes,) = pareto_figure(rows(PLANS[:4], size)).axes
    assert axes.get_title() == "Bits per byte against compute: one model at 4 widths"
    assert (axes.get_xlabel(), axes.get_ylabel()) == (f"active forward {unit} per token", "bits per byte")
    assert legend(axes) == ["fixed widths, 120,558 held-out tokens"]
    scale = 10 if unit == "FLOPs" else 1
    drawn = by_name(axes, "fixed widths, 120,558 held-out tokens")
    assert np.allclose(drawn, [(flops * scale, loss) for _, flops, loss in PLANS[:4]])
    assert [note.get_text() for note in axes.texts] == ["width 32", "width 64", "width 128", "width 256"]


def test_nats_where_bytes_are_unknown():
    (axes,) = pareto_figure(rows(PLANS[:4], bits=False)).axes
    assert axes.get_ylabel() == "nats per token" and axes.get_title().startswith("Nats per token against compute")


def test_choices_are_points_and_their_best_a_step():
    (axes,) = policies_figure(rows(PLANS + CHOICES)).axes
    assert axes.get_title() == "Bits per byte against compute: fixed plans and the model's own choices"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("active forward MFLOPs per token", "bits per byte")
    best, choices = "the best of them at no more compute", "the model's own choices"
    assert legend(axes) == ["fixed widths", "fixed exits at full width", choices, best]
    # no line joins the choices
    assert choices not in [line.get_label() for line in axes.lines]
    (points,) = axes.collections
    assert np.allclose(sorted(map(tuple, points.get_offsets())), sorted((x, y) for _, x, y in CHOICES))
    steps = envelope([(x, y) for _, x, y in CHOICES])
    assert np.allclose(by_name(axes, best), [*steps, (19.2, 1.2536)])
    (line,) = [line for line in axes.lines if line.get_label() == best]
    assert line.get_drawstyle() == "steps-post"


def test_policies_without_choices_or_exits():
    (axes,) = policies_figure(rows(PLANS[:4])).axes
    assert legend(axes) == ["fixed widths"]


def test_the_curves_of_a_run():
    top, *small = curves_figure(records()).axes
    assert (top.get_title(), top.get_xlabel(), top.get_ylabel()) == ("Loss over steps", "step", "nats per token")
    held_out = [f"held out, width {width}" for width in (32, 64, 128, 256)]
    assert legend(top) == ["training, all passes", "training, full width", *held_out]
    said = [(axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) for axes in small]
    assert said[0] == ("Gradient norm", "step", "L2 norm")
    assert said[1:] == [("Learning rate", "step", "share of its peak"), ("Speed", "step", "tokens per second")]
    # one series each: the title names it
    assert all(len(axes.lines) == 1 and axes.get_legend() is None for axes in small)


def test_several_runs_in_a_row():
    figure = road_figure([("first", records((128,))), ("second", records()), ("third", records())])
    (axes,) = figure.axes
    assert axes.get_title() == "Loss over 3 runs, each of which goes on with the last"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("steps, counted through all runs", "nats per token")
    names = [f"training, {name}" for name in ("first", "second", "third")]
    assert legend(figure) == names + [f"held out, width {width}" for width in (32, 64, 128, 256)]
    # no line from the last point of a run to the first of the next one, where another model begins
    steps = [x for x, _ in by_name(axes, "held out, width 128")]
    assert np.isnan(steps[5]) and steps[4] == 300 and steps[6] == 360


@pytest.mark.parametrize(
    "figure",
    [
        pareto_figure(rows(PLANS[:4])),
        policies_figure(rows(PLANS + CHOICES, bits=False)),
        curves_figure(records()),
        road_figure([("a", records()), ("b", records())]),
    ],
)
def test_no_text_leaves_the_picture(figure):
    figure.savefig(io.BytesIO(), format="png")
    texts = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts)]
    for box in (text.get_window_extent() for text in texts if text.get_text()):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


@pytest.mark.parametrize(
    ("draw", "what"),
    [
        (draw_pareto, rows(PLANS[:4])),
        (draw_policies, rows(PLANS + CHOICES)),
        (draw_curves, records()),
        (draw_curves, []),
        (draw_road, [("a", records()), ("b", records())]),
    ],
)
def test_pictures_are_as_wide_as_a_page(draw, what, tmp_path):
    draw(what, tmp_path / "p.png")
    picture = imread(io.BytesIO((tmp_path / "p.png").read_bytes()))
    assert abs(picture.shape[1] - 900) <= 1 and picture[..., :3].std() > 0.01
