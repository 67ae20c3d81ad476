"""TensorBoard and W&B get every width and exit under a tag of its own, read back by their own readers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from training.runs import arguments, train, write_corpus

EXITS = {
    "elastic__width_sampling": "sandwich",
    "elastic__plans_per_step": "1",
    "elastic__exit_fraction": "0.3",
    "train__eval_interval": "2",
    "optimizer__name": "muon",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_tensorboard(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    settings = EXITS | {"logging__tensorboard": "true", "checkpoint__resume": "auto"}
    train(1, arguments(data, run, **settings, train__steps=2))
    train(1, arguments(data, run, **settings, train__steps=4, optimizer__warmup_steps=1))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    for tag in ("train/loss", "train/gradient_norm", "learning_rate/lr", "learning_rate/muon_lr", "speed/mfu"):
        assert tag in tags, tags
    assert {f"held_out_nats_per_token/width_{width}" for width in (8, 16, 32)} <= tags
    assert {"held_out_bits_per_byte/exit_1", "memory/peak_gib", "speed/tokens_per_second"} <= tags
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert shown == pytest.approx(losses) and sorted(shown) == [1, 2, 3, 4]
    rate = next(event.value for event in events.Scalars("learning_rate/muon_lr") if event.step == 4)
    assert rate == pytest.approx(0.02 * next(row["lr_factor"] for row in rows if row["step"] == 4))
    charts = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    assert b"all widths" in charts and b"held_out_nats_per_token/width_.*" in charts
    text = events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert yaml.safe_load(text)["train"]["steps"] == 4
    layout = events.Tensors("layout/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "ZeRO 1" in layout and "widths [8, 16, 32]" in layout


def test_a_resumed_run_goes_on_in_the_same_wandb_run(data, tmp_path, monkeypatch):
    """W&B's own client, offline."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    run = tmp_path / "run"
    settings = EXITS | {"logging__wandb_project": "tiny", "checkpoint__resume": "auto"}
    for steps in (2, 4):
        train(1, arguments(data, run, **settings, train__steps=steps, optimizer__warmup_steps=1))
    folders = sorted(path.name for path in (run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({name.rsplit("-", 1)[1] for name in folders}) == 1, os.listdir(run)
    config = json.loads((run / "model" / "config.json").read_text())
    assert folders[0].endswith(config["run_id"])
