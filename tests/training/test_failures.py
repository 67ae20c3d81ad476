"""Bad input and bad luck: one clear line, the right exit code, and nothing lost."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess

import pytest
from training.runs import ROOT, arguments, command, environment, losses, train, write_corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A run of 10 steps with checkpoints at 5 and 10."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(1, arguments(data, run, train__steps=10))
    return run


def fails(words, code, *fragments):
    """The script ends with `code` and one line on stderr that holds every fragment."""
    done = train(1, words, check=False)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout[-1500:]}{done.stderr[-3000:]}"
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for fragment in fragments:
        assert fragment in lines[0], lines[0]
    return lines[0]


def test_unknown_key(data, tmp_path):
    words = [*arguments(data, tmp_path / "run"), "--model.hidden_sise", "64"]
    fails(words, 2, "--model.hidden_sise", "--model.hidden_size")


def test_bad_pattern(data, tmp_path):
    fails(arguments(data, tmp_path / "run", model__block_pattern="X"), 2, "--model.block_pattern", "'X'", "(TM)x4")


def test_width_that_does_not_fit(data, tmp_path):
    fails(arguments(data, tmp_path / "run", model__widths="[8,64]"), 2, "--model.widths", "64", "32")


def test_batch_that_does_not_divide(data, tmp_path):
    fails(arguments(data, tmp_path / "run", train__global_batch_size=7), 2, "--train.global_batch_size 7", "try 8")


def test_two_sources_that_differ(data, tmp_path):
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"gradient_clipping": 0.5, "zero_optimization": {"stage": 1}}))
    words = [*arguments(data, tmp_path / "run"), "--deepspeed_config", str(settings)]
    fails(words, 2, str(settings), "0.5", "--train.gradient_clipping", "1.0")


def test_muon_with_zero_3(data, tmp_path):
    words = arguments(data, tmp_path / "run", optimizer__name="muon")
    fails([*words, "--deepspeed_config", str(ROOT / "ds_configs/zero3.json")], 2, "--optimizer.name muon", "stage 2")


def test_missing_dataset(data, tmp_path):
    fails(arguments(data, tmp_path / "run", data__train=f"[{tmp_path / 'nothing'}]"), 3, "nothing")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_dataset(data, tmp_path, suffix):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    path = copy / f"train{suffix}"
    path.write_bytes(path.read_bytes()[:-7])
    fails(arguments(copy, tmp_path / "run"), 3, f"train{suffix}")


def test_wrong_tokenizer(data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    side = copy / "train.meta.json"
    side.write_text(json.dumps(json.loads(side.read_text()) | {"tokenizer_hash": "0" * 64}))
    fails(arguments(copy, tmp_path / "run"), 4, "--data.tokenizer", "preprocess again")


def test_missing_tokenizer(data, tmp_path):
    fails(arguments(data, tmp_path / "run", data__tokenizer=str(tmp_path / "no.model")), 4, "no.model")


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "metadata", "state"])
def test_damaged_checkpoint(data, finished, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    folder = run / "checkpoints" / "step-00000010"
    tensors = folder / "__0_0.distcp"
    content = bytearray(tensors.read_bytes())
    named = "__0_0.distcp"
    if damage == "flip":
        content[len(content) // 2] ^= 1
        tensors.write_bytes(content)
    elif damage == "truncate":
        tensors.write_bytes(content[:-100])
    elif damage == "missing":
        tensors.unlink()
    else:
        named = f"{damage}.json"
        (folder / named).write_text("{")
    before = (run / "metrics.jsonl").read_text()
    fails([*arguments(data, run, train__steps=12), "--resume", str(folder)], 5, named)
    assert (run / "metrics.jsonl").read_text() == before
    # of the run's own the one before it serves, and that is said
    done = train(1, [*arguments(data, run, train__steps=12), "--resume", "auto"])
    passed = next(line for line in done.stdout.splitlines() if line.startswith("WARNING: passed over"))
    assert str(folder) in passed and named in passed and "at step 5" in done.stdout
    assert (run / "checkpoints" / "set-aside" / folder.name / "files.json").exists()
    again = [json.loads(line)["step"] for line in (run / "metrics-set-aside.jsonl").read_text().splitlines()]
    assert {6, 7, 8, 9, 10} == set(again) and set(losses(run)) == set(range(1, 13))


def test_checkpoint_of_another_model(data, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    words = arguments(data, run, train__steps=12, model__mamba_d_state=16)
    fails([*words, "--resume", "auto"], 5, "model.mamba_d_state 8", "16")


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_disk_full_while_saving(data, finished, tmp_path, asynchronous):
    """A limit on the size of files stands in for the end of the disk: both make a write fail half-way."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    size = (run / "checkpoints" / "step-00000010" / "__0_0.distcp").stat().st_size
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    words = [*arguments(data, run, train__steps=15, checkpoint__asynchronous=asynchronous), "--resume", "auto"]
    done = subprocess.run(
        command(1, words), capture_output=True, text=True, env=environment(), cwd=ROOT, preexec_fn=limit, timeout=120
    )
    assert done.returncode == 6, done.stderr[-3000:]
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert not list((run / "checkpoints").glob("*.tmp"))
    assert (run / "checkpoints" / "latest").read_text() == "step-00000010"
    assert "at step 10" in train(1, words).stdout


def test_nonfinite_steps_are_skipped_then_named(data, tmp_path):
    """A learning rate far beyond use: the updates that would be nan are left out, and the run stops naming a tensor."""
    run = tmp_path / "run"
    words = arguments(
        data, run, optimizer__lr="1e30", optimizer__warmup_steps=0, train__nonfinite_patience=3, train__steps=30
    )
    line = fails(words, 7, "3 steps in a row", "first bad tensor: ")
    assert "weight " in line or "output of " in line
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["skipped"] >= 3
    assert losses(run)


def test_unknown_freeze_group(data, tmp_path):
    fails(arguments(data, tmp_path / "run", train__freeze="[atention]"), 2, "--train.freeze", "attention")


def test_a_fresh_start_does_not_write_over_an_earlier_run(data, finished):
    before = (finished / "metrics.jsonl").read_text()
    fails(arguments(data, finished, train__steps=10), 2, "--logging.run_dir", "--resume auto")
    assert (finished / "metrics.jsonl").read_text() == before


def test_latest_without_its_folder(data, finished, tmp_path):
    """A kill between two renames can leave `latest` naming nothing; the newest complete checkpoint serves."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    assert "at step 5" in train(1, [*arguments(data, run, train__steps=12), "--resume", "auto"]).stdout
