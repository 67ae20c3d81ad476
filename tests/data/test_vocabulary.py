"""No reader of a dataset gets an id that its model has no row for; held-out data says so before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_helpers import write_dataset

from megatron_adamba.data.blend import build_dataset, open_dataset
from megatron_adamba.data.packed import evaluation_batches
from megatron_adamba.data.tokenizer import load_tokenizer
from megatron_adamba.errors import DataError
from megatron_adamba.inference.adaptive_evaluation import document_items

BAD = pytest.mark.parametrize("bad", [257, 40_000, -1])


def held_out(folder: Path, bad: int) -> str:
    """Without a sidecar, as Megatron-LM writes; the wrong id stands in the last document."""
    write_dataset(folder / "held", [[1, 2, 256], [3, 4, 5, 256], [6, bad, 256]], dtype="<i4")
    return str(folder / "held")


@BAD
def test_every_reader_refuses_at_once(tmp_path: Path, bad: int):
    tokenizer = load_tokenizer("bytes")
    indexed = open_dataset(held_out(tmp_path, bad), tokenizer, "--data")
    message = f"token id {bad} is outside the vocabulary of 257"
    readers = (
        lambda: evaluation_batches(indexed, 4, 2, tokenizer.eod_id),
        lambda: document_items(indexed, tokenizer, 8, 1),
        lambda: indexed.document(2),
        lambda: indexed.gather(np.arange(10)),
        lambda: [build_dataset([held_out(tmp_path, bad)], 4, 0, tokenizer)[place] for place in range(3)],
    )
    for read in readers:
        with pytest.raises(DataError, match=message):
            read()
    assert evaluation_batches(indexed, 4, 2, tokenizer.eod_id, max_tokens=7).num_documents == 2


def test_without_a_tokenizer_the_sidecar_says_the_vocabulary(tmp_path: Path):
    write_dataset(tmp_path / "d", [[1, 12, 0]] * 4, [1] * 4, vocab_size=12)
    with pytest.raises(DataError, match="token id 12 is outside the vocabulary of 12"):
        evaluation_batches(open_dataset(str(tmp_path / "d"), None), 4, 2, 0)


@pytest.mark.parametrize(
    "bad", [{"eod_id": 12}, {"eod_id": -1}, {"vocab_size": 2**40}, {"num_tokens": "12"}, {"eod_id": True}]
)
def test_a_sidecar_that_cannot_be_is_refused(tmp_path: Path, bad: dict):
    write_dataset(tmp_path / "d", [[1, 2, 0]] * 4, [1] * 4, vocab_size=12)
    path = tmp_path / "d.meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | bad))
    with pytest.raises(DataError, match=r"d\.meta\.json"):
        open_dataset(str(tmp_path / "d"), None)


def test_bytes_that_are_not_the_sidecars_are_refused(tmp_path: Path):
    write_dataset(tmp_path / "d", [[1, 2, 0]] * 4, [5] * 4, vocab_size=12)
    (tmp_path / "d.bytes").write_bytes(np.array([5, 5, 50, 5], dtype="<u4").tobytes())
    with pytest.raises(DataError, match="65 bytes of text"):
        evaluation_batches(open_dataset(str(tmp_path / "d"), None), 4, 2, 0)
