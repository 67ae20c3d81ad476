"""What the tests of this folder share: texts, and small datasets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_adamba.data.indexed_builder import IndexedDatasetBuilder
from megatron_adamba.data.indexed_dataset import DatasetMeta, IndexedDataset

TABBED = "int main(void)\n{\n\tint total = 0;\n\tfor (;;) {\n\t\ttotal += 1;\n\t\treturn total;\n\t}\n}\n"
INDENTED = "def total(self):\n    for item in self.items:\n        if item:\n            return item\n\n\nprint(1)\n"


def write_dataset(
    prefix: Path,
    documents: Sequence[Sequence[int]],
    num_bytes: Sequence[int] | None = None,
    dtype: str = "<u2",
    **meta: object,
) -> IndexedDataset:
    """Writes `documents` as they are (closing token included) and opens them; a sidecar only with `num_bytes`."""
    with IndexedDatasetBuilder(prefix, dtype) as builder:
        for place, document in enumerate(documents):
            builder.add_document(np.array(document, dtype=np.int64), num_bytes[place] if num_bytes else 0)
        sidecar = None
        if num_bytes is not None:
            known = {"tokenizer_hash": "0" * 64, "tokenizer_name": "none", "vocab_size": 1000, "eod_id": 0}
            counts = {"num_tokens": builder.num_tokens, "num_bytes": builder.num_bytes, "source": "test"}
            sidecar = DatasetMeta(**{**known, **counts, "num_documents": builder.num_documents, **meta})
        builder.finalize(sidecar)
    return IndexedDataset(prefix)
