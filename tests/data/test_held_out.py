"""Both sides of a split hold something, whatever the corpus; a large one is split by its documents' ids alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_adamba.data.corpus_files import LeftOut
from megatron_adamba.data.held_out import is_validation, split_documents
from megatron_adamba.data.indexed_dataset import IndexedDataset
from megatron_adamba.data.preprocess import PreprocessOptions, preprocess


def sides(folder: Path | list[Path], fraction: float = 0.05) -> tuple[list[str], list[str]]:
    inputs = [str(path) for path in (folder if isinstance(folder, list) else [folder])]
    found = list(split_documents(inputs, "text", fraction, LeftOut()))
    return [text for text, apart in found if not apart], [text for text, apart in found if apart]


def write(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text)
    return folder


def test_ids_alone_where_both_sides_hold_something(tmp_path):
    texts = [f"text {number}" for number in range(120)]
    training, held_out = sides(write(tmp_path / "many", texts))
    want = [is_validation(f"{number:03}.txt", 0.05) for number in range(120)]
    assert 0 < len(held_out) < 20
    assert held_out == [text for text, apart in zip(texts, want) if apart]
    assert training == [text for text, apart in zip(texts, want) if not apart]
    assert sides(tmp_path / "many", 0.0) == (texts, [])


@pytest.mark.parametrize("count", range(2, 12))
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.999])
def test_of_few_documents_one_is_on_the_other_side(tmp_path, count, fraction):
    texts = [f"text {number}" for number in range(count)]
    training, held_out = sides(write(tmp_path / "few", texts), fraction)
    assert training and held_out and sorted(training + held_out) == sorted(texts)
    assert sides(tmp_path / "few", fraction) == (training, held_out)


def test_the_longest_document_stays_in_training(tmp_path):
    texts = ["long " * 1000, *("short" for _ in range(3))]
    for number in range(8):  # other ids, other draws
        folder = tmp_path / str(number)
        folder.mkdir()
        for place, text in enumerate(texts):
            (folder / f"{number}-{place}.txt").write_text(text)
        training, held_out = sides(folder, 1e-9)
        assert texts[0] in training and held_out == ["short"]


def test_the_tail_of_the_only_document(tmp_path):
    """At the end of a paragraph, of a line, of a sentence, of a word, or in the middle where there is none."""
    paragraphs = [f"Paragraph {number} has words. " * 4 for number in range(100)]
    file = tmp_path / "book.txt"
    for joint in ("\n\n", "\n", ""):
        text = joint.join(paragraphs)
        file.write_text(text)
        (training,), (held_out,) = sides(file)
        assert training + held_out == text and 0.02 < len(held_out) / len(text) < 0.08
        assert training.endswith(joint or "words. ") and held_out.startswith(("Paragraph", " Paragraph"))
    file.write_text("x" * 1000)
    (training,), (held_out,) = sides(file)
    assert (len(training), len(held_out)) == (950, 50)
    for text in ("ab", "abc"):
        file.write_text(text)
        (training,), (held_out,) = sides(file)
        assert training and held_out and training + held_out == text


def test_a_single_file_becomes_two_datasets(tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text("".join(f'{{"text": "line {number}"}}\n' for number in range(5)))
    metas, _ = preprocess(PreprocessOptions((str(file),), str(tmp_path / "data"), "bytes", split=True))
    counts = {Path(prefix).name: meta.num_documents for prefix, meta in metas.items()}
    assert counts == {"train": 4, "validation": 1}
    book = tmp_path / "book.md"
    book.write_text("# Title\n\n" + "words and words\n" * 50)
    preprocess(PreprocessOptions((str(book),), str(tmp_path / "book"), "bytes", split=True))
    parts = [IndexedDataset(tmp_path / "book" / side).document(0)[:-1] for side in ("train", "validation")]
    assert b"".join(bytes(part.tolist()) for part in parts).decode() == book.read_text()
