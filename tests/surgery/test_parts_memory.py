"""Extracting and averaging hold a tensor or two, however large the model and however many the sources."""

from __future__ import annotations

import pytest
from surgery.test_surgery_memory import openai_folder, peak


def peaks_of(root, name, **sizes) -> tuple[int, int, dict[str, int]]:
    """Bytes of the largest tensor, of all, and the peaks of both operations."""
    source = root / f"{name}-source"
    largest = openai_folder(source, False, **sizes)
    peak("import", "gpt-oss", source, root / name)
    total = sum(file.stat().st_size for file in (root / name).glob("*.safetensors"))
    peaks = {
        # all rows of some columns, so that what is read is not what is kept
        "extract": peak("extract", root / name, root / f"{name}-part", "--width", sizes["hidden"] // 2),
        "merge-average": peak("merge-average", *[root / name] * 4, root / f"{name}-mean"),
    }
    return largest, total, peaks


@pytest.mark.slow
def test_peaks(tmp_path):
    _, _, tiny = peaks_of(tmp_path, "tiny", layers=1, hidden=64, vocab=64, experts=2)
    largest, total, large = peaks_of(tmp_path, "large", layers=2, hidden=1536, vocab=1024, experts=10)
    assert total > 4 * largest, "what held the whole model would not show"
    growth = {operation: (large[operation] - tiny[operation]) / largest for operation in large}
    print({operation: f"{value:.2f} of the largest tensor" for operation, value in growth.items()})
    assert growth["extract"] < 2 and growth["merge-average"] < 3, growth
