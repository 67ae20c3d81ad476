"""torch.distributed.checkpoint on files, with its metadata as JSON instead of a pickle."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_adamba.checkpoint.formats import StoredMetadata, StoredTensor
from megatron_adamba.errors import CheckpointError
from megatron_adamba.files import as_storage_error, write_atomically
from megatron_adamba.schema import read_json

METADATA_FILE = "metadata.json"
FORMAT_VERSION = 1

_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)}


class JsonWriter(FileSystemWriter):
    """Writes tensors as torch does (files fsynced) and `metadata.json` last."""

    def __init__(self, folder: str | os.PathLike) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=True, thread_count=1)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Raises StorageError where the disk is full: other ranks see the class of a failure, not what led to it."""
        try:
            return super().write_data(plan, planner)
        except (OSError, RuntimeError) as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise (as_storage_error(cause, str(self.path)) if cause else None) or error from None

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        storage = {result.index: result.storage_data for results_of_rank in results for result in results_of_rank}
        content = json.dumps(metadata_to_dict(metadata, storage)).encode()
        try:
            write_atomically(Path(self.path) / METADATA_FILE, content)
        except OSError as error:
            raise as_storage_error(error, str(self.path)) or error from None


class JsonReader(FileSystemReader):
    """Reads what JsonWriter wrote; no pickle is read except through `weights_only` loading of tensors."""

    def __init__(self, folder: str | os.PathLike) -> None:
        super().__init__(folder)
        self.folder = Path(folder)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = read_metadata(self.folder)
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata

    def read_chunk(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        """One chunk of tensor `name`, on the CPU. Raises CheckpointError naming file and tensor where it is damaged."""
        metadata = self.read_metadata()
        place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        path = self.folder / place.relative_path
        try:
            with open(path, "rb") as stream, warnings.catch_warnings():
                # what a foreign file makes torch say beside its refusal is no news to the user
                warnings.simplefilter("ignore")
                tensor = torch.load(self._slice_file(stream, place), map_location="cpu", weights_only=True)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}; use an earlier checkpoint") from None
        except Exception as error:
            # there is no telling what damaged bytes make torch raise
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise CheckpointError(f"{path}: {name} cannot be read ({cause}); use an earlier checkpoint") from None
        dtype = tensor_entries(metadata)[name].properties.dtype
        plain = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.shape != chunk.sizes or tensor.dtype != dtype:
            wanted = f"{dtype} {tuple(chunk.sizes)}"
            raise CheckpointError(f"{path}: {name} is not the {wanted} that {METADATA_FILE} says; use an earlier one")
        return tensor


def tensor_entries(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """By name; our checkpoints hold tensors only."""
    return cast("dict[str, TensorStorageMetadata]", metadata.state_dict_metadata)


def metadata_to_dict(metadata: Metadata, storage: dict[MetadataIndex, _StorageInfo]) -> dict[str, Any]:
    """{"format": 1, "tensors": {name: {dtype, shape, chunks: [{offset, size, file, start, length}]}}}."""
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), f"{name}: the checkpoint holds tensors only"
        chunks = []
        for chunk in entry.chunks:
            place = storage[MetadataIndex(name, chunk.offsets)]
            chunks.append(
                {
                    "offset": list(chunk.offsets),
                    "size": list(chunk.sizes),
                    "file": place.relative_path,
                    "start": place.offset,
                    "length": place.length,
                }
            )
        tensors[name] = {"dtype": str(entry.properties.dtype), "shape": list(entry.size), "chunks": chunks}
    return {"format": FORMAT_VERSION, "tensors": tensors}


def read_metadata(folder: Path) -> Metadata:
    """Raises CheckpointError naming the file where it is missing or damaged."""
    path = folder / METADATA_FILE
    values = read_json(path, StoredMetadata, CheckpointError, "use an earlier checkpoint")
    if values["format"] != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format {values['format']}, this version reads {FORMAT_VERSION}")
    return _metadata_from_dict(values["tensors"])


def _metadata_from_dict(tensors: dict[str, StoredTensor]) -> Metadata:
    entries: dict[str, STORAGE_TYPES] = {}
    storage, names = {}, {}
    for name, entry in tensors.items():
        chunks = []
        for chunk in entry["chunks"]:
            offset = torch.Size(chunk["offset"])
            chunks.append(ChunkStorageMetadata(offsets=offset, sizes=torch.Size(chunk["size"])))
            storage[MetadataIndex(name, offset)] = _StorageInfo(chunk["file"], chunk["start"], chunk["length"], None)
        properties = TensorProperties(dtype=_DTYPES[entry["dtype"]])
        entries[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        names[name] = (name,)
    return Metadata(entries, planner_data=names, storage_data=storage, storage_meta=StorageMeta())
