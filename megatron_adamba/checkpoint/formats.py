"""What the JSON files of a checkpoint must hold, for the one reader of such files (`schema`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Required

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from megatron_adamba.config.root import StoredConfig
from megatron_adamba.schema import Count, FileName, JsonObject, TensorName

Crc32 = Annotated[int, Field(ge=0, lt=2**32)]


class Fingerprint(TypedDict):
    """Of a file."""

    bytes: Count
    crc32: Crc32


Files = dict[FileName, Fingerprint]
"""files.json of a training checkpoint: every other file by name"""


class Counters(TypedDict, total=False):
    """How far a run has come."""

    step: Count
    consumed_samples: Count
    optimizer_steps: Count
    skipped: Count
    skipped_in_a_row: Count
    gate_steps: Count
    order_start: Count


@with_config(ConfigDict(extra="allow"))
class StoredState(TypedDict, total=False):
    """state.json of a training checkpoint."""

    counters: Counters
    config: StoredConfig
    history: list[JsonObject]
    optimizer_starts: dict[TensorName, Count]
    data_order: JsonObject
    layout: JsonObject


@with_config(ConfigDict(extra="allow"))
class Index(TypedDict, total=False):
    """model.safetensors.index.json of a canonical checkpoint: tensor -> shard, and, beside what others write, tensor ->
    checksum of its bytes."""

    weight_map: Required[dict[TensorName, FileName]]
    metadata: Any
    crc32: dict[TensorName, Crc32]


class StoredChunk(TypedDict):
    """A rectangle of a tensor, and the bytes of a file that hold it."""

    offset: list[Count]
    size: list[Count]
    file: FileName
    start: Count
    length: Count


class StoredTensor(TypedDict):
    """A whole tensor's place."""

    dtype: Literal["torch.float64", "torch.float32", "torch.bfloat16", "torch.float16", "torch.int64"]
    shape: list[Count]
    chunks: list[StoredChunk]


class StoredMetadata(TypedDict):
    """metadata.json of a training checkpoint."""

    format: int
    tensors: dict[TensorName, StoredTensor]
