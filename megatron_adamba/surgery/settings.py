"""Reading the settings of somebody else's config.json: each by name and kind, none overlooked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field

from megatron_adamba.errors import CheckpointError
from megatron_adamba.schema import JsonObject, check_value

MOST, MOST_LAYERS = 2**31 - 1, 4096
"""of any size, and of blocks: more is no model, and working out what its tensors would be takes for ever"""
_SHOWN = 120
"""characters of a value or key in a message"""
_REQUIRED = object()
_NOTES = ("_", "unsloth_", "transformers.js_")
"""beginnings of keys that converters write for themselves"""
_OF_ALL_MODELS = frozenset(
    (
        "base_model_name_or_path", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id",
        "dtype", "eos_token_id", "finetuning_task", "id2label", "initializer_range", "is_decoder", "label2id",
        "license", "model_name", "name_or_path", "output_attentions", "output_hidden_states", "pad_token_id",
        "prefix", "pretraining_tp", "problem_type", "return_dict", "sep_token_id", "task_specific_params",
        "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "unk_token_id", "use_cache",
    )
)  # fmt: skip
"""settings of transformers that leave the logits alone"""


class Settings:
    """A JSON object whose keys must all be known. Every complaint is a CheckpointError that names the key."""

    def __init__(self, values: JsonObject, where: str) -> None:
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

    def whole(self, key: str, default: Any = _REQUIRED, most: int = MOST) -> int:
        """From 0 to `most`."""
        return self._checked(key, default, Annotated[int, Field(ge=0, le=most)], f"must be a whole number, 0 to {most}")

    def layers(self, key: str) -> int:
        return self.whole(key, most=MOST_LAYERS)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        self._checked(key, default, float, "must be a number")
        kind = Annotated[float, Field(ge=0, le=1e300, allow_inf_nan=False)]
        return float(self._checked(key, default, kind, "must be 0 or more, and finite"))

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        return self._checked(key, default, bool, "must be true or false")

    def text(self, key: str, default: Any = _REQUIRED, rule: str = "must be text") -> str:
        return self._checked(key, default, str, rule)

    def words(self, key: str, default: Any = _REQUIRED) -> list[str]:
        return self._checked(key, default, list[str], "must be a list of words")

    def section(self, key: str, default: Any = _REQUIRED) -> Settings:
        """An object inside, with settings of its own; must be finished too."""
        return Settings(self._checked(key, default, JsonObject, "must be an object"), f"{self.where}: {key}")

    def _checked(self, key: str, default: Any, kind: Any, rule: str) -> Any:
        value = self.take(key, default)
        if value is default:
            return value
        try:
            return check_value(value, kind, self.where, CheckpointError, rule)
        except CheckpointError:
            raise self.refusal(key, rule) from None

    def must_be(self, key: str, allowed: Any, default: Any, why: str) -> None:
        """A setting that exists in one form only in our models."""
        value = self.take(key, default)
        # true is no number here either
        if value != allowed or isinstance(value, bool) != isinstance(allowed, bool):
            raise self.refusal(key, f"must be {allowed!r}: {why}")

    def must_agree(self, key: str, value: Any, other: str) -> None:
        """A second name of a setting, where it is given."""
        if self.take(key, value) != value:
            raise self.refusal(key, f"is {value!r} under {other}; correct one of them")

    def refusal(self, key: str, rule: str) -> CheckpointError:
        shown = repr(self.values.get(key))
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        return CheckpointError(f"{self.where}: {key[:_SHOWN]} {shown}: {rule}")

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """Refuse what nobody read and is not null: it may change what the model computes."""
        left = set(self.values) - self._read - _OF_ALL_MODELS - set(harmless)
        unknown = sorted(key for key in left if not key.startswith(_NOTES) and self.values[key] is not None)
        if unknown:
            raise self.refusal(
                unknown[0], "is not known here; take it out of the file if it does not change what the model computes"
            )
