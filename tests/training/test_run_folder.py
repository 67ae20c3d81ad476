"""What a run folder holds is never lost: going on from elsewhere, going back, strangers' files, damage, locks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training.runs import ROOT, arguments, command, environment, losses, train

from megatron_adamba.config.root import AdambaConfig
from megatron_adamba.config.sections import CheckpointConfig, LoggingConfig
from megatron_adamba.errors import ConfigError
from megatron_adamba.training.metrics import _cut_back, read_metrics
from megatron_adamba.training.run_lock import RunLock
from megatron_adamba.training.start import find_resume


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A run of 8 steps that kept its checkpoints at 2, 4, 6 and 8."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(1, arguments(data, run, train__steps=8, checkpoint__interval=2, checkpoint__keep_last=9))
    return run


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def tree(folder: Path) -> dict[str, bytes]:
    logs = folder / "logs"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and logs not in path.parents
    }


def refused(words, code, *fragments):
    done = train(1, words, check=False)
    assert done.returncode == code, done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert all(fragment in line for fragment in fragments), line


def test_going_on_from_elsewhere_does_not_touch_a_run_that_is_there(data, run, finished):
    before = tree(run)
    start = str(finished / "checkpoints" / "step-00000004")
    refused([*arguments(data, run, train__steps=9), "--resume", start], 2, "--logging.run_dir", f"{run}-2")
    assert tree(run) == before
    elsewhere = run.with_name("elsewhere")
    train(1, [*arguments(data, elsewhere, train__steps=5), "--resume", start])
    assert sorted(losses(elsewhere)) == [5] and tree(run) == before


def test_going_back_keeps_the_later_steps_aside(data, run):
    before, start = tree(run), run / "checkpoints" / "step-00000004"
    words = [*arguments(data, run, train__steps=6, checkpoint__keep_last=9), "--resume", str(start)]
    done = train(1, words)
    after = tree(run)
    assert "went back to step 4: step-00000006, step-00000008 set aside" in done.stdout
    for name, content in before.items():
        if "step-00000006" in name or "step-00000008" in name:
            assert after[name.replace("checkpoints/", "checkpoints/set-aside/")] == content
    aside = [json.loads(line) for line in (run / "metrics-set-aside.jsonl").read_text().splitlines()]
    assert {record["step"] for record in aside} == {5, 6, 7, 8}
    # and once more: nothing of the first time is overwritten
    train(1, words)
    assert (run / "checkpoints" / "set-aside" / "step-00000006-2" / "files.json").exists()


def test_what_this_run_did_not_write_stays(data, run):
    """A copy under a name of the user's own, another run's checkpoint, and a model that lies where this run's goes."""
    root = run / "checkpoints"
    shutil.copytree(root / "step-00000002", root / "step-00000002-good")
    shutil.copytree(root / "step-00000002", root / "step-00000001")
    state = json.loads((root / "step-00000001" / "state.json").read_text())
    state["config"]["run_id"] = "of another run"
    (root / "step-00000001" / "state.json").write_text(json.dumps(state))
    config = json.loads((run / "model" / "config.json").read_text())
    (run / "model" / "config.json").write_text(json.dumps(config | {"run_id": "of another run"}))
    model = tree(run / "model")
    words = arguments(data, run, train__steps=12, checkpoint__interval=2, checkpoint__keep_last=1)
    train(1, [*words, "--resume", "auto"])
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    assert names == ["step-00000001", "step-00000002-good", "step-00000012"]
    assert tree(run / "set-aside" / "model") == model
    assert json.loads((run / "model" / "config.json").read_text())["run_id"] == config["run_id"]


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_missing_latest_is_no_fresh_start(data, run, resume):
    (run / "checkpoints" / "latest").unlink()
    before = tree(run)
    words = [*arguments(data, run, train__steps=9), "--resume", resume]
    if resume == "never":
        refused(words, 2, "holds checkpoints of an earlier run")
        assert tree(run) == before
    else:
        assert "at step 8" in train(1, words).stdout
        assert sorted(losses(run)) == list(range(1, 10))


@pytest.mark.parametrize(
    ("latest", "order"), [("step-00000004", "426"), ("step-00000006", "642"), ("mine", ["mine", *"642"])]
)
def test_older_checkpoints_come_before_newer_ones(tmp_path, latest, order):
    """Where `latest` names a folder that people named, the others come newest first."""
    root = tmp_path / "checkpoints"
    for name in ("mine", *(f"step-{step:08d}" for step in (2, 4, 6))):
        (root / name).mkdir(parents=True)
        (root / name / "files.json").write_text("{}")
    (root / "latest").write_text(latest)
    asked = CheckpointConfig(resume="auto")
    found = find_resume(AdambaConfig(checkpoint=asked, logging=LoggingConfig(run_dir=str(tmp_path))))
    assert [path.name.removeprefix("step-0000000") for path in found] == list(order)


def test_checkpoints_that_are_all_incomplete_are_no_fresh_start(data, run):
    for path in (run / "checkpoints").glob("step-*"):
        (path / "files.json").unlink()
    (run / "checkpoints" / "latest").unlink()
    before = tree(run)
    refused([*arguments(data, run), "--resume", "auto"], 5, "files.json", "no checkpoint beside it is complete")
    assert tree(run) == before


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None, b"x" * 5000])
def test_a_latest_that_is_no_name_is_one_line(data, run, content):
    latest = run / "checkpoints" / "latest"
    latest.unlink()
    if content is None:
        latest.mkdir()
    else:
        latest.write_bytes(content)
    refused([*arguments(data, run), "--resume", "auto"], 5, "latest", "--resume", "step-00000008")


def test_damaged_checkpoints_are_passed_over_to_the_newest_whole_one(data, run):
    root = run / "checkpoints"
    for step, name in ((8, "__0_0.distcp"), (6, "state.json")):
        path = root / f"step-{step:08}" / name
        path.write_bytes(path.read_bytes()[:-9])
    done = train(1, [*arguments(data, run, train__steps=9), "--resume", "auto"])
    warnings = [line for line in done.stdout.splitlines() if line.startswith("WARNING: passed over")]
    assert len(warnings) == 2 and "step-00000008" in warnings[0] and "step-00000006" in warnings[1]
    assert "at step 4" in done.stdout and sorted(losses(run)) == list(range(1, 10))


def test_nothing_is_left_that_verifies(data, run):
    for path in (run / "checkpoints").glob("step-*/__0_0.distcp"):
        path.write_bytes(b"")
    refused([*arguments(data, run), "--resume", "auto"], 5, "step-00000008", "0 bytes of")


def test_fewer_steps_than_were_made(data, run):
    before = tree(run)
    refused([*arguments(data, run, train__steps=7), "--resume", "auto"], 2, "--train.steps 7", "has made 8")
    assert tree(run) == before


@pytest.mark.parametrize("bad", [b"{", b"\x00\xff\xfe binary", b"[1]", b'{"loss": 1}', b"[" * 9000, b'{"step": "4"}'])
def test_bad_lines_of_metrics_are_set_aside_and_good_ones_kept(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "loss": 1.0}).encode() for step in (1, 2, 3, 4)]
    path.write_bytes(b"\n".join([good[0], good[1], bad, good[2], good[3][:9]]))
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    _cut_back(path, 2, False)
    assert path.read_bytes() == b"\n".join([*good[:2], b""])
    assert (tmp_path / "metrics-set-aside.jsonl").read_bytes() == b"\n".join([bad, good[2], good[3][:9], b""])


def test_metrics_of_an_earlier_try_are_kept_beside_a_fresh_start(data, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 3, "loss": 5.0}\n')
    train(1, arguments(data, run, train__steps=1))
    assert sorted(losses(run)) == [1]
    assert (run / "metrics-set-aside.jsonl").read_text() == '{"step": 3, "loss": 5.0}\n'


HOLD = """
import sys, time
from pathlib import Path
from megatron_adamba.training.run_lock import RunLock
from megatron_adamba.training.start import find_resume
RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_two_runs_in_one_folder(data, tmp_path):
    """The second is told who has it; what a killed owner left is taken over."""
    run = tmp_path / "run"
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "held\n"
        refused(arguments(data, run, train__steps=1), 2, f"process {owner.pid}", "lock.json", f"{run}-2")
        owner.kill()
        owner.wait()
        assert (run / "lock.json").exists()
        train(1, arguments(data, run, train__steps=1))
        assert not (run / "lock.json").exists() and sorted(losses(run)) == [1]
    finally:
        owner.kill()
        owner.wait()


def elsewhere(folder: Path, beats: int) -> None:
    owner = {"host": "node7", "space": "", "pid": 1, "started": "", "key": "k", "since": "today", "beats": beats}
    aside = folder / "owner"
    aside.write_text(json.dumps(owner))
    os.replace(aside, folder / "lock.json")


def test_an_owner_on_another_machine_lives_as_long_as_it_counts(tmp_path):
    elsewhere(tmp_path, 1)
    said = []
    source = "import sys, time; sys.path.insert(0, sys.argv[1])\nfrom test_run_folder import elsewhere\n"
    source += "from pathlib import Path\nfor n in range(2, 99): elsewhere(Path(sys.argv[2]), n); time.sleep(0.1)"
    path = f"{Path(__file__).parent.parent}{os.pathsep}{Path(__file__).parent.parent.parent}"
    words = [sys.executable, "-c", source, str(Path(__file__).parent), str(tmp_path)]
    owner = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": path})
    try:
        end = time.monotonic() + 60
        while json.loads((tmp_path / "lock.json").read_text())["beats"] < 3 and time.monotonic() < end:
            time.sleep(0.05)
        with pytest.raises(ConfigError, match="process 1 on node7 since today"):
            RunLock(tmp_path, said.append, patience=5).acquire()
    finally:
        owner.kill()
        owner.wait()
    assert len(said) == 1 and "waits 5 s" in said[0]
    lock = RunLock(tmp_path, said.append, patience=0.5).acquire()
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    lock.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_a_damaged_lock_is_named(tmp_path):
    (tmp_path / "lock.json").write_text("{")
    with pytest.raises(ConfigError, match=r"lock\.json: damaged .*delete it if no run uses the folder"):
        RunLock(tmp_path).acquire()


def test_a_reader_that_goes_away_does_not_end_the_run(data, tmp_path):
    run = tmp_path / "run"
    words = arguments(data, run, train__steps=30, checkpoint__interval=0)
    process = subprocess.Popen(command(1, words), stdout=subprocess.PIPE, env=environment(), cwd=ROOT)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert max(losses(run)) == 30 and (run / "model" / "config.json").exists()


KINDS = [
    ("metrics.jsonl", "fifo"),
    ("metrics-set-aside.jsonl", "fifo"),
    ("metrics.jsonl", "dangling"),
    ("model", "dangling"),
    ("logs", "file"),
    ("logs/failure.json", "folder"),
    ("logs/rank-0.log", "folder"),
    ("checkpoints/set-aside", "file"),
    ("checkpoints/set-aside", "dangling"),
]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_what_is_of_another_kind_is_found_out_at_the_start(data, run, name, kind):
    """A pipe would be waited for, a link that leads nowhere be noticed when all training is done."""
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    make = {"fifo": os.mkfifo, "dangling": lambda at: os.symlink("/nowhere/at/all", at), "folder": os.mkdir}
    make.get(kind, Path.touch)(path)
    before = {path: path.lstat().st_mtime_ns for path in run.rglob("step-*")}
    refused([*arguments(data, run, train__steps=9), "--resume", "auto"], 2, "--logging.run_dir", f"{name} there is no")
    assert before == {path: path.lstat().st_mtime_ns for path in run.rglob("step-*")}


def test_leftovers_of_any_kind_are_no_obstacle(data, run):
    root = run / "checkpoints"
    (root / "step-00000010.tmp").write_text("a file")
    os.symlink("/nowhere/at/all", root / "step-00000010")
    train(1, [*arguments(data, run, train__steps=10, checkpoint__interval=2), "--resume", "auto"])
    assert (root / "step-00000010" / "state.json").is_file() and not (root / "step-00000010.tmp").exists()
    assert os.path.islink(root / "set-aside" / "step-00000010")


def test_a_run_that_starts_over_beside_traces_of_another_says_so(data, run):
    """Checkpoints of an unfinished run are lost; those of a finished one are, and its metrics; one lies set aside."""
    words = [*arguments(data, run, train__steps=3, checkpoint__interval=0), "--resume", "auto"]
    spared = run / "checkpoints" / "set-aside" / "step-00000008"
    spared.parent.mkdir()
    (run / "checkpoints" / "step-00000008").rename(spared)
    shutil.rmtree(run / "model")
    for path in (*(run / "checkpoints").glob("step-*"), run / "checkpoints" / "latest"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = train(1, words)
    for said in ("has no checkpoint to go on from", "metrics.jsonl (its lines", f"{spared} (go on from it with"):
        assert said in done.stdout, done.stdout
    assert "the run starts over" in done.stdout and spared.is_dir()
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    done = train(1, words)
    assert "model (it will be set aside)" in done.stdout and (run / "set-aside" / "model").is_dir()


def test_a_latest_that_names_what_is_gone_is_said(data, run):
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    done = train(1, [*arguments(data, run, train__steps=8, checkpoint__interval=0), "--resume", "auto"])
    assert "latest names step-00000008, which is not there" in done.stdout, done.stdout
    assert "step-00000006 at step 6" in done.stdout


def test_a_model_folder_that_is_a_link_stays_one(data, tmp_path):
    """To an empty folder on a larger disk."""
    run, scratch = tmp_path / "run", tmp_path / "scratch" / "model"
    scratch.mkdir(parents=True)
    run.mkdir()
    (run / "model").symlink_to(scratch)
    train(1, arguments(data, run, train__steps=2, checkpoint__interval=0))
    assert (run / "model").is_symlink() and (scratch / "config.json").is_file()
    assert not (run / "set-aside").exists() and not (scratch.parent / "set-aside").exists()
