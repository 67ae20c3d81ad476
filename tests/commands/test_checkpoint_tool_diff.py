"""tools/checkpoint.py names what two checkpoints differ in."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import BIG, GAIN, reassemble, refused, save_as, specs_of, spoil_value


def test_identical_checkpoints_of_every_kind(call, one_rank, two_ranks, tmp_path):
    assert call("diff", two_ranks / "checkpoints", two_ranks / "checkpoints")[:2] == (
        0,
        identical(two_ranks, weights_only=False),
    )
    assert call("diff", two_ranks / "checkpoints", two_ranks / "checkpoints", "--weights-only")[1] == identical(
        two_ranks
    )
    assert call("convert", two_ranks / "model", tmp_path / "start", "--tp", 2, "--dp", 2)[0] == 0
    said = f"comparing weights only: {two_ranks / 'model'} is canonical and holds nothing else\n"
    assert call("diff", tmp_path / "start", two_ranks / "model") == (0, said + identical(two_ranks), "")
    assert call("diff", two_ranks / "model", two_ranks / "checkpoints") == (0, said + identical(two_ranks), "")
    shards = save_as(two_ranks / "model", tmp_path / "shards", lambda name, tensor: tensor)
    assert call("diff", two_ranks / "model", shards) == (0, identical(two_ranks), "")
    assert call("diff", one_rank / "checkpoints", one_rank / "model")[0] == 0


def identical(run: Path, weights_only: bool = True) -> str:
    held = reassemble(run / "checkpoints" / "step-00000010")
    held = {name: t for name, t in held.items() if name.startswith("weight/") or not weights_only}
    count = sum(tensor.numel() for tensor in held.values())
    return f"identical: {len(held)} tensors, {count:,} elements, {4 * count / 1000:.1f} kB\n"


def test_the_first_difference_is_the_models_first(call, two_ranks):
    first, last = (two_ranks / "checkpoints" / f"step-{step:08d}" for step in (5, 10))
    a, b = reassemble(first), reassemble(last)
    name, gap = "weight/embedding.weight", (a["weight/embedding.weight"].double() - b["weight/embedding.weight"]).abs()
    place = [int(index) for index in torch.unravel_index(gap.argmax(), gap.shape)]
    count = int((a[name] != b[name]).sum())
    code, out, err = call("diff", first, last)
    assert (code, err) == (1, "") and out.count("\n") == 1
    assert out.startswith(f"{name}: {count:,} of 8,224 values differ, by {gap.max():g} at most, at {place}: ")
    code, out, _ = call("diff", first, last, "--all")
    lines = out.splitlines()
    changed = [name for name in a if not torch.equal(a[name], b[name])]
    named = [line.partition(": ")[0] for line in lines[:-1]]
    assert code == 1 and sorted(named) == sorted(changed) and lines[-1] == f"{len(changed)} tensors differ"
    specs = specs_of(two_ranks / "model")
    order = [f"weight/{spec.name}" for spec in specs if f"weight/{spec.name}" in changed]
    assert named[: len(order)] == order and not any(name.startswith("weight/") for name in named[len(order) :])


@pytest.mark.parametrize(
    ("change", "words", "line"),
    [
        (spoil_value(BIG, (3, 4), 5.0), (), f"weight/{BIG}: 1 of 5,248 values differ, by "),
        (lambda n, t: None if n == GAIN else t, (), f"weight/{GAIN}: missing in "),
        (lambda n, t: t.reshape(3, 1) if n == GAIN else t, (), f"weight/{GAIN}: shape [3] against [3, 1]"),
        (lambda n, t: t.double() if n == GAIN else t, (), f"weight/{GAIN}: dtype float32 against float64; the values "),
        (
            spoil_value(GAIN, (2,), math.nan),
            ("--tolerance", 9),
            f"weight/{GAIN}: 1 of 3 values differ, by inf at most, ",
        ),
        (
            lambda n, t: t + 0.25 if n == GAIN else t,
            ("--tolerance", 0.2),
            f"weight/{GAIN}: 3 of 3 values differ, by 0.25",
        ),
        (lambda n, t: t + 0.25 if n == GAIN else t, ("--tolerance", 0.3), None),
        (lambda n, t: t.double() if n == GAIN else t, ("--tolerance", 1), f"weight/{GAIN}: dtype float32 against "),
    ],
    ids=["value", "missing", "shape", "dtype", "nan", "beyond", "within", "dtype within"],
)
def test_how_tensors_differ(call, two_ranks, tmp_path, change, words, line):
    other = save_as(two_ranks / "model", tmp_path / "other", change)
    code, out, _ = call("diff", two_ranks / "model", other, *words)
    assert (code, out.count("\n")) == (int(line is not None), 1)
    assert out.startswith(line or "identical within 0.3: 24 tensors"), out
    swapped = call("diff", other, two_ranks / "model", *words)[1]
    assert swapped.partition(":")[0] == out.partition(":")[0]
    if line and "missing" in line:
        assert out == swapped == f"{line}{other}\n"


def test_bits_count_where_values_do_not(call, two_ranks, tmp_path):
    zero, minus = (
        save_as(two_ranks / "model", tmp_path / str(value), spoil_value(GAIN, (1,), value)) for value in (0.0, -0.0)
    )
    code, out, _ = call("diff", zero, minus)
    assert code == 1 and "1 of 3 values differ, in bits only, by 0 at most, at [1]: 0.0 against -0.0" in out
    assert call("diff", zero, minus, "--tolerance", 0)[0] == 0
    nan = save_as(two_ranks / "model", tmp_path / "nan", spoil_value(GAIN, (1,), math.nan))
    assert call("diff", nan, nan)[0] == call("diff", nan, nan, "--tolerance", 0)[0] == 0
    refused(call("diff", nan, nan, "--tolerance", -1), 2, "--tolerance -1")
    refused(call("diff", nan, tmp_path / "nothing"), 5, tmp_path / "nothing")
