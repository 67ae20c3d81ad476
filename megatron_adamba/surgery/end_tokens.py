"""Which tokens end a text: what published folders say of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megatron_adamba.errors import CheckpointError
from megatron_adamba.schema import JsonObject, check_value, read_json

GENERATION_FILE, TOKENIZER_CONFIG_FILE = "generation_config.json", "tokenizer_config.json"
IdOf = Callable[[str | None], int | None]
"""a tokenizer's id of a token by its name; of None that of the end of a document"""
_Id = Annotated[int, Field(ge=0, lt=2**40)]
_Ids = _Id | list[_Id] | None
_Name = str | JsonObject | None
_ADVICE = "restore the file"


def published_end_tokens(folder: Path, config: dict[str, Any], vocab_size: int, id_of: IdOf) -> list[int] | None:
    """Ids at which transformers' `generate` stops. Where there is a generation_config.json it alone counts, and none in
    it means that no token ends a text: an empty list. Else config.json's; where that names none, the tokenizer's own
    eos token; None where that is not known either. Ids beyond the vocabulary never come and are left out.

    Raises CheckpointError.
    """
    found = _ids(config, folder / "config.json")
    path = folder / GENERATION_FILE
    if path.exists():
        values, in_config = read_json(path, JsonObject, CheckpointError, _ADVICE), found
        found = _ids(values, path)
        # what transformers writes of its own accord beside a config.json says nothing that this does not
        said = in_config is not None or values.get("_from_model_config") is not True
        found = [] if found is None and said else found
    if found is None:
        return _eos_token(folder, id_of)
    ids = [found] if isinstance(found, int) else found
    return _unless_usual(list(dict.fromkeys(token for token in ids if token < vocab_size)), id_of)


def named_end_tokens(id_of: IdOf, names: Sequence[str]) -> list[int] | None:
    """Ids of the names that a tokenizer knows; None where it knows none, or only its end of a document."""
    ids = [token for token in map(id_of, names) if token is not None]
    return _unless_usual(ids, id_of) if ids else None


def _unless_usual(ids: list[int], id_of: IdOf) -> list[int] | None:
    """None for the one that is taken where nothing is said."""
    return None if ids == [id_of(None)] else ids


def _ids(values: dict[str, Any], path: Path) -> int | list[int] | None:
    return check_value(values.get("eos_token_id"), _Ids, f"{path}: eos_token_id", CheckpointError, _ADVICE)


def _eos_token(folder: Path, id_of: IdOf) -> list[int] | None:
    path = folder / TOKENIZER_CONFIG_FILE
    if not path.exists():
        return None
    values = read_json(path, JsonObject, CheckpointError, _ADVICE)
    token = check_value(values.get("eos_token"), _Name, f"{path}: eos_token", CheckpointError, _ADVICE)
    name = token.get("content") if isinstance(token, dict) else token
    return named_end_tokens(id_of, [name]) if isinstance(name, str) else None
