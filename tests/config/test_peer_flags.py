"""Flags of other programs are told what they are called here."""

from __future__ import annotations

import re

import pytest

from megatron_adamba.config.cli import build_parser, parse_arguments
from megatron_adamba.config.peer_flags import known_peers, peer_hint
from megatron_adamba.errors import ConfigError


def test_every_hint_names_flags_that_exist_and_hides_none():
    ours = {flag for action in build_parser("adamba train")._actions for flag in action.option_strings}
    peers = known_peers()
    assert len(peers) > 100 and not ours & set(peers)
    for peer in peers:
        named = re.findall(r"--[\w.]+\w", peer_hint(peer))
        assert set(named) <= ours, (peer, named)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lr", "0.1"], "--lr: is called --optimizer.lr here"),
        (["--learning_rate=0.1"], "--learning_rate: is called --optimizer.lr here"),
        (["--steps", "5"], "--steps: is called --train.steps here"),
        (["--tp", "2"], "--tp: is called --parallel.tp here"),
        (["--tensor-model-parallel-size", "2"], "--tensor-model-parallel-size: is called --parallel.tp here"),
        (["--save", "x"], "--save: is called --logging.run_dir here"),
        (["--epochs", "1"], "--epochs: a run has steps; write --train.steps N"),
        (["--training.steps", "1"], "--training.steps: is called --train.steps here"),
        (["--device_batch_size", "1"], "--device_batch_size: is called --train.micro_batch_size here"),
        (["--train.stepz", "1"], "--train.stepz: unknown flag; did you mean --train.steps?"),
    ],
)
def test_what_is_said(words, told):
    with pytest.raises(ConfigError) as caught:
        parse_arguments(words)
    assert str(caught.value).startswith(told)
