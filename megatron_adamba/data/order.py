"""What the order of a run's samples depends on, so that a run that goes on can tell whether it is still the same."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from megatron_adamba.data.blend import BlendedDataset
from megatron_adamba.data.indexed_dataset import IndexedDataset, dataset_file
from megatron_adamba.data.packed import PackedDataset

_WHOLE, _BLOCKS = 1 << 28, 4096
"""bytes up to which a file is read whole; of a larger one so many blocks that make up as much"""


def data_order(dataset: PackedDataset | BlendedDataset[PackedDataset]) -> dict[str, Any]:
    """JSON values; two datasets with the same ones give the same samples in the same order.

    Documents are told by a SHA-256 over the index and the tokens; of files above 256 MiB over blocks spread evenly.
    """
    if isinstance(dataset, BlendedDataset):
        parts, units = dataset.datasets, dataset.units
    else:
        parts, units = [dataset], [1]
    first = parts[0]
    return {
        "seed": first.seed,
        "seq_len": first.seq_len,
        "shuffle": first.shuffle,
        "datasets": [
            {
                "share": share,
                "documents": part.indexed.num_documents,
                "tokens": part.indexed.num_tokens,
                "end_of_document": part.eod_id,
                "sha256": _digest(part.indexed),
            }
            for share, part in zip(units, parts)
        ],
    }


def order_change(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The first thing in which two results of `data_order` differ, beginning with the flag; None where they agree."""
    for name, flag in (("seed", "--train.seed"), ("seq_len", "--train.seq_len"), ("shuffle", "shuffling")):
        if before.get(name) != after[name]:
            return f"{flag} {after[name]}: is not the {before.get(name)}"
    theirs, ours = before.get("datasets") or [], after["datasets"]
    if len(theirs) != len(ours):
        return f"--data.train: is {len(ours)} datasets and not the {len(theirs)}"
    for number, (old, new) in enumerate(zip(theirs, ours), start=1):
        for name in ("documents", "tokens", "end_of_document", "share"):
            if old.get(name) != new[name]:
                return f"--data.train: {name} of dataset {number} is {new[name]}, not the {old.get(name)}"
        if old.get("sha256") != new["sha256"]:
            return f"--data.train: dataset {number} has other documents than those"
    return None


def _digest(indexed: IndexedDataset) -> str:
    digest = hashlib.sha256(str(indexed.dtype).encode())
    for suffix in (".idx", ".bin"):
        _add_file(digest, dataset_file(indexed.prefix, suffix))
    return digest.hexdigest()


def _add_file(digest: Any, path: Path) -> None:
    content = np.memmap(path, dtype=np.uint8, mode="r")
    digest.update(content.size.to_bytes(8, "little"))
    if content.size <= _WHOLE:
        digest.update(content)
        return
    block = _WHOLE // _BLOCKS
    for start in np.linspace(0, content.size - block, _BLOCKS, dtype=np.int64):
        digest.update(content[start : start + block])
