"""Every cell of the support matrix that says a pair of features runs: the pair trains, with the right losses."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from distributed.curve import cell_config, plain_curve_of
from distributed.grids import slow

from megatron_adamba.blueprint.support import FEATURES, Cell, cell, support_table

STEPS = 2
CELLS = [cell(row, column) for number, row in enumerate(FEATURES) for column in FEATURES[: number + 1]]
DEEPEST = {"ZeRO 3", "pipeline parallel"}
"""features that change how every parameter is held or reached"""


def marked(found: Cell):
    """Each feature by itself and with the deepest ones; the other pairs are among the slow ones."""
    names = (found.row.name, found.column.name)
    quick = names[0] == names[1] or DEEPEST & set(names)
    return pytest.param(*names) if quick else slow(*names)


SUPPORTED = [marked(found) for found in CELLS if found.supported]


@functools.cache
def plain(arguments: str, row: str, column: str) -> list[tuple[float, float]]:
    """`arguments` names the run: cells that differ in their layout alone share it."""
    config = cell_config(row, column)[1]
    return plain_curve_of(config, config.train.freeze, STEPS)


def expected_curve(workers, row: str, column: str) -> list[tuple[float, float]]:
    setup, config = cell_config(row, column)
    if setup.bf16:
        return workers(1).run("curve", "cell_curve", row=row, column=column, steps=STEPS, alone=True, stage=1)[0]
    if config.optimizer.name == "muon":
        return workers(1).run("curve", "cell_curve", row=row, column=column, steps=STEPS, alone=True, stage=0)[0]
    return plain(str((config.model, config.elastic, config.train)), row, column)


@pytest.mark.parametrize(("row", "column"), SUPPORTED)
def test_supported_cell_trains(workers, row, column):
    setup, _ = cell_config(row, column)
    curve = workers(setup.world_size).run("curve", "cell_curve", row=row, column=column, steps=STEPS)[0]
    expected = expected_curve(workers, row, column)
    for (loss, norm), (wanted, wanted_norm) in zip(curve, expected, strict=True):
        if setup.bf16:
            assert abs(loss - wanted) < 0.01
        else:
            assert abs(loss - wanted) < 1e-5
            assert abs(norm - wanted_norm) < 1e-5 * wanted_norm


def test_the_page_shows_the_matrix():
    page = (Path(__file__).parent.parent.parent / "docs" / "layouts.md").read_text()
    assert support_table() in page, "put the output of adamba support-matrix into docs/layouts.md"
