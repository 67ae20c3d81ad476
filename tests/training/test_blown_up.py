"""A run that blows up: nothing is saved inside the streak of bad steps, and what it advises works."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from training.runs import arguments, losses, train

from megatron_adamba.config.sections import OptimizerConfig
from megatron_adamba.training.learning_watch import LearningWatch
from megatron_adamba.training.nonfinite import way_on


@pytest.mark.parametrize("options", [{}, {"keep_last": 1}, {"keep_last": 1, "asynchronous": "true"}])
def test_good_checkpoints_outlive_the_streak_and_the_advice_works(data, tmp_path, options):
    run = tmp_path / "run"
    options = {f"checkpoint__{name}": value for name, value in options.items()} | {"checkpoint__interval": 1}
    train(1, arguments(data, run, train__steps=4, **options))
    assert len(list((run / "checkpoints").glob("step-*"))) == options.get("checkpoint__keep_last", 2)
    blown = {"optimizer__lr": "1e30", "optimizer__warmup_steps": 0, "train__nonfinite_patience": 4}
    words = arguments(data, run, train__steps=30, **options, **blown)
    done = train(1, [*words, "--resume", "auto"], check=False)
    assert done.returncode == 7
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    skipped = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    # the last step that was taken is saved, and replaces none: its weights are bad; those of the streak are not saved
    assert len(kept) == options.get("checkpoint__keep_last", 2) + 1
    assert max(skipped) - int(kept[-1].removeprefix("step-")) == 4
    advice = shlex.split(re.search(r"try (--resume .*)$", line)[1])
    assert advice[1].endswith(kept[0])
    again = dict(zip(advice[::2], advice[1::2]))
    words = arguments(data, run, train__steps=8, **options, optimizer__warmup_steps=0)
    index = words.index("--train.steps")
    done = train(1, [*words[:index], *words[index:], *(word for pair in again.items() for word in pair)])
    assert max(losses(run)) == 8
    assert len(list((run / "checkpoints").glob("step-*"))) == options.get("checkpoint__keep_last", 2)


def test_a_signal_inside_a_streak_saves_the_last_good_step(data, tmp_path):
    """Weights have not changed since: the checkpoint is that of the step before the streak."""
    import signal

    from training.test_signals import start, wait_until

    run = tmp_path / "run"
    train(1, arguments(data, run, train__steps=3, checkpoint__interval=0))
    blown = {"optimizer__lr": "1e30", "optimizer__warmup_steps": 0, "train__nonfinite_patience": 100000}
    words = arguments(data, run, train__steps=100000, checkpoint__interval=0, **blown)
    processes = start(1, [*words, "--resume", "auto"])
    log = run / "logs" / "rank-0.log"
    wait_until(processes, lambda: "not finite" in log.read_text())
    processes[0].send_signal(signal.SIGTERM)
    processes[0].communicate(timeout=60)
    assert processes[0].returncode == 8
    saved = int((run / "checkpoints" / "latest").read_text().removeprefix("step-"))
    first_skipped = int(re.search(r"step (\d+): loss or gradient is not finite", log.read_text())[1])
    assert saved == first_skipped - 1
    state = json.loads((run / "checkpoints" / f"step-{saved:08}" / "state.json").read_text())
    assert state["counters"]["skipped_in_a_row"] == 0


def test_the_way_on_names_what_can_work(tmp_path):
    kept = tmp_path / "step-00000100"
    assert way_on(kept, OptimizerConfig(lr=4e-4), "runs/a") == f"--resume {kept} --optimizer.lr 0.0002"
    decayed = OptimizerConfig(lr=4e-4, weight_decay=1e30)
    assert way_on(kept, decayed, "runs/a") == f"--resume {kept} --optimizer.weight_decay 0.1"
    fresh = way_on(None, OptimizerConfig(lr=1e30), "runs/a")
    assert fresh == "a fresh start with --logging.run_dir runs/a-2 --optimizer.lr 0.001"
    muon = OptimizerConfig(name="muon", lr=1e-3, muon_lr=0.02, vector_lr=1e30, embedding_lr=0.2)
    assert way_on(kept, muon, "runs/a").endswith(
        "--optimizer.lr 0.0005 --optimizer.muon_lr 0.01 --optimizer.embedding_lr 0.1 --optimizer.vector_lr 0.001"
    )


def test_a_run_that_ends_in_a_streak_keeps_its_good_checkpoint(data, tmp_path):
    run = tmp_path / "run"
    blown = {"optimizer__lr": "1e25", "optimizer__warmup_steps": 0, "train__nonfinite_patience": 50}
    words = arguments(data, run, train__steps=5, checkpoint__interval=1, checkpoint__keep_last=1, **blown)
    done = train(1, words, check=False)
    assert done.returncode == 0 and "steps were not finite and left out" in done.stdout
    kept = [path.name for path in (run / "checkpoints").glob("step-*")]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    good = max(record["step"] for record in steps if not record["skipped"])
    assert kept == [f"step-{good:08}"]


def test_a_run_that_guesses_is_told():
    watch = LearningWatch(256, 0, 10, 1000)
    said = [watch.look(step, 5.545 if step % 2 else float("nan")) for step in range(1, 1001)]
    assert [step for step, text in enumerate(said, 1) if text] == [210]
    assert "5.5450" in said[209] and "ln(vocabulary) = 5.5452" in said[209]
    watch = LearningWatch(256, 0, 10, 1000)
    assert not any(watch.look(step, 5.4) for step in range(1, 1001))
    # one that learnt, and fell back
    watch = LearningWatch(256, 0, 10, 1000)
    said = [watch.look(step, 3.0 if step < 300 else 5.6) for step in range(1, 1001)]
    assert [step for step, text in enumerate(said, 1) if text] == [610]


def test_a_stuck_run_says_so(data, tmp_path):
    run = tmp_path / "run"
    words = arguments(data, run, train__steps=60, optimizer__lr="1e-12", checkpoint__interval=0, logging__interval=60)
    assert "the model learns nothing" in train(1, words).stdout


def spoiled_model(folder, source):
    """A copy of a canonical checkpoint whose head holds an infinity, without checksums."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values.pop("crc32")
    index.write_text(json.dumps(values))
    shard = folder / values["weight_map"]["head.weight"]
    tensors = load_file(shard)
    tensors["head.weight"][3, 5] = float("inf")
    save_file(tensors, shard, {"format": "pt"})
    return folder


def test_weights_that_came_damaged_are_not_blamed_on_the_rate(data, tmp_path):
    """Whether patience ends first or the steps do: no model is written, and the way on is another start."""
    train(1, arguments(data, tmp_path / "first", train__steps=2, checkpoint__interval=0))
    start = spoiled_model(tmp_path / "start", tmp_path / "first" / "model")
    for number, settings in enumerate(({"train__nonfinite_patience": 3}, {"train__nonfinite_patience": 30})):
        run = tmp_path / f"run-{number}"
        words = arguments(data, run, train__steps=5, checkpoint__init_from=start, checkpoint__interval=0, **settings)
        done = train(1, words, check=False)
        assert done.returncode == 7, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert line == (
            f"error: first bad tensor: weight head.weight, as {start} holds it; start from another checkpoint"
        )
        assert not (run / "model").exists() and not list((run / "checkpoints").glob("step-*"))


def test_the_advised_checkpoint_is_whole(data, tmp_path):
    run = tmp_path / "run"
    train(1, arguments(data, run, train__steps=4, checkpoint__interval=1, checkpoint__keep_last=9))
    damaged = next((run / "checkpoints" / "step-00000001").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    blown = {"optimizer__weight_decay": "1e30", "optimizer__warmup_steps": 0, "train__nonfinite_patience": 2}
    words = arguments(data, run, train__steps=30, checkpoint__keep_last=9, checkpoint__interval=0, **blown)
    done = train(1, [*words, "--resume", "auto"], check=False)
    assert done.returncode == 7
    advised = f"--resume {run / 'checkpoints' / 'step-00000002'} --optimizer.weight_decay 0.1"
    assert advised in done.stderr, done.stderr
