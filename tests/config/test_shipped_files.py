"""The ds_configs that the package ships: found by name, and the same files as in the folder at the top."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_adamba.config.ds_config import read_ds_config, shipped_ds_configs
from megatron_adamba.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_the_folder_at_the_top_holds_the_same_files():
    at_the_top = {path.stem: path.read_bytes() for path in (ROOT / "ds_configs").iterdir()}
    assert at_the_top == {name: path.read_bytes() for name, path in shipped_ds_configs().items()} and at_the_top


def test_by_name_and_by_path():
    assert read_ds_config("zero2") == read_ds_config(str(ROOT / "ds_configs" / "zero2.json"))
    with pytest.raises(
        ConfigError, match=r"--deepspeed_config zero2_ofload: No such file or directory; did you mean zero2_offload\?"
    ):
        read_ds_config("zero2_ofload")
