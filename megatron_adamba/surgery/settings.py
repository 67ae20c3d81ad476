"""Reading the settings of somebody else's config.json: each by name and kind, none overlooked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from megatron_adamba.errors import CheckpointError

_REQUIRED = object()
_NOTES = ("_", "unsloth_", "transformers.js_")
"""beginnings of keys that converters write for themselves"""
_OF_ALL_MODELS = frozenset(
    (
        "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id", "dtype", "eos_token_id",
        "finetuning_task", "id2label", "initializer_range", "is_decoder", "label2id", "license", "name_or_path",
        "output_attentions", "output_hidden_states", "pad_token_id", "prefix", "problem_type", "return_dict",
        "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript",
        "transformers_version", "unk_token_id", "use_cache",
    )
)  # fmt: skip
"""settings of transformers that leave the logits alone"""


class Settings:
    """A JSON object whose keys must all be known. Every complaint is a CheckpointError that names the key."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self._read: set[str] = set()

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value as it is; null counts as left out."""
        self._read.add(key)
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise CheckpointError(f"{self.where}: has no {key}; restore the file")
        return default

    def whole(self, key: str, default: Any = _REQUIRED) -> int:
        return self._number(key, default, int)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        return float(self._number(key, default, (int, float)))

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, "must be true or false")
        return value

    def _number(self, key: str, default: Any, kind: Any) -> Any:
        value = self.take(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, kind):
            raise self.refusal(key, "must be a whole number" if kind is int else "must be a number")
        if not 0 <= value < math.inf:
            raise self.refusal(key, "must be 0 or more, and finite")
        return value

    def must_be(self, key: str, allowed: Any, default: Any, why: str) -> None:
        """A setting that exists in one form only in our models."""
        if self.take(key, default) != allowed:
            raise self.refusal(key, f"must be {allowed!r}: {why}")

    def must_agree(self, key: str, value: Any, other: str) -> None:
        """A second name of a setting, where it is given."""
        if self.take(key, value) != value:
            raise self.refusal(key, f"is {value!r} under {other}; correct one of them")

    def refusal(self, key: str, rule: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} {self.values.get(key)!r}: {rule}")

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """Refuse what nobody read and is not null: it may change what the model computes."""
        left = set(self.values) - self._read - _OF_ALL_MODELS - set(harmless)
        unknown = sorted(key for key in left if not key.startswith(_NOTES) and self.values[key] is not None)
        if unknown:
            raise self.refusal(
                unknown[0], "is not known here; take it out of the file if it does not change what the model computes"
            )
