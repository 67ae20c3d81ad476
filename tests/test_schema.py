"""Values from disk: what is not of the stated kind ends in the stated error, one line, whatever it is."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_adamba.errors import CheckpointError
from megatron_adamba.schema import Count, Finite, JsonObject, check_value, parse_json, read_json

ADVICE = "use an earlier checkpoint"


@dataclass
class _Row:
    step: Count
    share: Finite = 0.0


def _refused(content: str | bytes, kind: type) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse_json(content, kind, "FILE", CheckpointError, ADVICE)
    message = str(caught.value)
    assert message.startswith("FILE: damaged (") and message.endswith(ADVICE) and "\n" not in message
    return message


def test_a_value_of_the_kind_comes_back_as_it():
    assert parse_json('{"step": 3, "share": 1}', _Row, "FILE", CheckpointError, ADVICE) == _Row(3, 1.0)
    assert check_value({"step": 3}, _Row, "FILE", CheckpointError, ADVICE) == _Row(3)


@pytest.mark.parametrize(
    "content",
    [
        '{"step": true}',
        '{"step": 1.5}',
        '{"step": 1.0}',
        '{"step": "1"}',
        '{"step": -1}',
        '{"step": 1e400}',
        '{"step": 9999999999999999999999999999}',
        '{"step": null}',
        '{"step": 1, "share": NaN}',
        '{"step": 1, "share": Infinity}',
        '{"step": 1, "share": true}',
        "{}",
        "[]",
        "null",
        "",
        "{",
        '{"step": 1} x',
        "[" * 200_000,
        '{"a":' * 100_000,
        '{"step": 1, "\\ud800": 1}',
        b"\xff\xfe",
        b"\x00" * 16,
    ],
)
def test_everything_else_is_the_stated_error(content):
    _refused(content, _Row)


def test_the_message_names_the_first_wrong_place():
    assert "(step: Input should be a valid integer)" in _refused('{"step": "1"}', _Row)


def test_deep_python_values_are_refused_too():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, {"a": {1, 2}}, {"a": object()}):
        with pytest.raises(CheckpointError, match=ADVICE):
            check_value(value, JsonObject, "FILE", CheckpointError, ADVICE)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for path in (*(tmp_path / name for name in ("pipe", "folder", "loop", "none")), Path("nul\0")):
        with pytest.raises(CheckpointError, match=ADVICE):
            read_json(path, JsonObject, CheckpointError, ADVICE)
    (tmp_path / "good").write_text(json.dumps({"a": 1}))
    assert read_json(tmp_path / "good", JsonObject, CheckpointError, ADVICE) == {"a": 1}
