"""Every signal that ends jobs saves first, in the middle of a long step too, in the time that launchers leave."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from training.runs import ROOT, arguments, environment, free_port, losses, train

from megatron_adamba.training.signals import StopRequest


def start(ranks: int, words: list[str]) -> list[subprocess.Popen]:
    port, processes = str(free_port()), []
    for rank in range(ranks):
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-u", str(ROOT / "pretrain_adamba.py"), *words],
                env=environment() | (places if ranks > 1 else {}),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=hear_signals,
            )
        )
    return processes


def hear_signals() -> None:
    """Under nohup, tests inherit that SIGHUP is ignored, and in a shell's background SIGINT; a run leaves it so."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def wait_until(processes, condition, patience=180):
    end = time.monotonic() + patience
    while not condition():
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP], ids=lambda number: number.name)
def test_signals_of_slurm_and_terminals_save(tmp_path, data, number):
    run = tmp_path / "run"
    processes = start(1, arguments(data, run, train__steps=5000, checkpoint__interval=0))
    metrics = run / "metrics.jsonl"
    wait_until(processes, lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
    processes[0].send_signal(number)
    _, errors = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 8 and f"error: {number.name}: saved " in errors
    step = int((run / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert max(losses(run)) == step


def test_a_signal_to_one_rank_is_named_by_the_other(tmp_path, data):
    """Short steps: all ranks stop at the end of one, before any of them looks for words of others."""
    run = tmp_path / "run"
    processes = start(2, arguments(data, run, train__steps=5000, checkpoint__interval=0))
    metrics = run / "metrics.jsonl"
    wait_until(processes, lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
    processes[1].send_signal(signal.SIGUSR2)
    told = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [8, 8]
    assert "error: SIGUSR2: saved " in told[0] and "".join(told).count("error: ") == 1


def test_what_asked_is_known_before_ranks_agree_to_stop(tmp_path):
    """Of two ranks the one without a signal may end before its thread has looked at the board."""

    class Board:
        words: str | None = None

        def write(self, topic: str, text: str) -> None:
            self.words = text

        def read(self, topic: str) -> str | None:
            return self.words

    board = Board()
    ranks = [StopRequest(lambda: tmp_path, board, lambda line: None, lambda error: None) for _ in range(2)]
    with ranks[1]:
        signal.raise_signal(signal.SIGUSR2)
        assert [rank.asked() for rank in ranks] == [False, True]
        assert str(ranks[0].stopped(tmp_path)).startswith(f"SIGUSR2: saved {tmp_path}; ")


def test_a_signal_in_the_middle_of_a_look_at_the_board_is_not_lost(tmp_path):
    """The answer of a store may take its time, and what a handler noted meanwhile stays."""

    class Board:
        words: str | None = None

        def write(self, topic: str, text: str) -> None:
            self.words = text

        def read(self, topic: str) -> str | None:
            found = self.words
            time.sleep(0.4)
            return found

    board = Board()
    stop = StopRequest(lambda: tmp_path, board, lambda line: None, lambda error: None)
    with stop:
        time.sleep(0.7)  # its thread is in the middle of a look
        signal.raise_signal(signal.SIGUSR2)
        time.sleep(0.6)
        assert stop.requested == "SIGUSR2" and stop.asked() and board.words == "SIGUSR2"


@pytest.mark.parametrize("saved", [False, True])
def test_a_second_interrupt_does_not_wait(tmp_path, data, saved):
    """It says what there is: nothing, or an earlier checkpoint."""
    run = tmp_path / "run"
    if saved:
        train(1, arguments(data, run, train__steps=2, checkpoint__interval=0))
    words = arguments(data, run, train__steps=4, checkpoint__interval=0, train__global_batch_size=40000)
    processes = start(1, [*words, "--resume", "auto"])
    log = run / "logs" / "rank-0.log"
    begun = lambda: "resumed from" in log.read_text() if saved else (run / "metrics.jsonl").exists()
    wait_until(processes, begun)
    time.sleep(2)
    for _ in range(2):
        processes[0].send_signal(signal.SIGINT)
        time.sleep(0.3)
    _, errors = processes[0].communicate(timeout=60)
    what = (
        f"the last checkpoint is {run}/checkpoints/step-00000002; go on with --resume auto" if saved else "nothing was"
    )
    assert processes[0].returncode == 130 and f"error: interrupted; {what}" in errors
    assert errors.count("error: ") == 1 and "Traceback" not in errors


def test_a_signal_that_is_ignored_stays_so(tmp_path, data):
    """nohup's way of asking that a closing terminal does not matter."""
    run = tmp_path / "run"
    words = arguments(data, run, train__steps=30, checkpoint__interval=0)
    command = [sys.executable, str(ROOT / "pretrain_adamba.py"), *words]
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, preexec_fn=ignore, stdout=subprocess.DEVNULL)
    metrics = run / "metrics.jsonl"
    wait_until([process], lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0


@pytest.mark.parametrize(
    "options",
    [{}, {"parallel__pp": 2, "elastic__plans_per_step": 1}],
    ids=["replicas", "pipeline"],
)
def test_a_step_of_minutes_is_left_for_the_last_state(tmp_path, data, options):
    """The first rank alone gets the signal, as from DeepSpeed's launcher, which then waits for it before it goes on to
    the next; the step would take minutes."""
    run = tmp_path / "run"
    words = arguments(data, run, train__steps=2, checkpoint__interval=0, **options)
    train(2, words)
    before, loss = (run / "checkpoints" / "latest").read_text(), losses(run)
    long = arguments(data, run, train__steps=4, checkpoint__interval=0, train__global_batch_size=40000, **options)
    processes = start(2, [*long, "--resume", "auto"])
    log = run / "logs" / "rank-0.log"
    wait_until(processes, lambda: "resumed from" in log.read_text())
    time.sleep(3)
    begun = time.monotonic()
    processes[0].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60) for process in processes]
    assert time.monotonic() - begun < 30
    assert [process.returncode for process in processes] == [8, 8]
    said = "".join(errors for _, errors in outputs)
    assert said.count("error: ") == 1 and "SIGTERM: saved" in said and "30 s after" in outputs[0][0]
    assert (run / "checkpoints" / "latest").read_text() == before == "step-00000002"
    done = train(2, [*arguments(data, run, train__steps=3, checkpoint__interval=0, **options), "--resume", "auto"])
    assert "at step 2" in done.stdout
    assert {step: losses(run)[step] for step in loss} == loss
