"""Sections of a checkpoint's config.json that generation reads, changed at random: the clean error alone."""

from __future__ import annotations

import json
import random

from surgery.mutations import mutated_values
from surgery.test_gates_carried import gated_source

from megatron_adamba.errors import AdambaError
from megatron_adamba.inference.load import load_model

SECTIONS = ("gates", "elastic", "data", "tokenizer_hash")


def test_mutated_sections(tmp_path):
    folder, random_ = gated_source(tmp_path / "model", "mixed", "TMEMETTT"), random.Random(21)
    path = folder / "config.json"
    values = {"gates": {}, "elastic": {"min_exit_layer": 2}, **json.loads(path.read_text())}
    refused = 0
    for number in range(120):
        name = SECTIONS[number % len(SECTIONS)]
        changed = mutated_values(random_, {name: values.get(name)})
        path.write_text(json.dumps(values | {name: changed.get(name, 3)}))
        try:
            load_model(folder, "fp32")
        except AdambaError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 30
