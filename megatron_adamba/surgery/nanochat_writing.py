"""Writing nanochat's own checkpoints: model_NNNNNN.pt and meta_NNNNNN.json."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megatron_adamba.checkpoint.aside import written_aside
from megatron_adamba.checkpoint.history import HISTORY_FILE
from megatron_adamba.files import write_atomically
from megatron_adamba.surgery.torch_file_writer import write_torch_file
from megatron_adamba.surgery.writing import Job, Report, prepare_target


def write_nanochat(job: Job, folder: Path, report: Report) -> None:
    """Write aside and rename: after a failure `folder` is not there. Memory: a tensor or two.

    job: of `export_nanochat`, its config being the metadata. Raises ConfigError where the folder exists, StorageError
    where the disk is too small or refuses.
    """
    prepare_target(folder, job.num_bytes)
    digits = f"{job.config['step']:06d}"
    with written_aside(folder) as aside:
        write_torch_file(aside / f"model_{digits}.pt", job.infos, _made(job, report))
        write_atomically(aside / f"meta_{digits}.json", json.dumps(job.config, indent=2).encode())
        write_atomically(aside / HISTORY_FILE, (json.dumps(job.history, indent=1) + "\n").encode())
        for path in job.files:
            write_atomically(aside / path.name, path.read_bytes())


def _made(job: Job, report: Report) -> Iterator[tuple[str, Tensor]]:
    for tensor in job.tensors:
        start = time.perf_counter()
        # the writer comes back for the next one when this one is written
        yield tensor.name, tensor.make()
        report(tensor.name, tensor.info.num_bytes, time.perf_counter() - start)
