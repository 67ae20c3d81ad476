"""The public API: the example runs, values are those of the model, errors name arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands.test_small_tools import TEXTS, WIDTHS, losses_by_hand, tiny_model, write_model

import megatron_adamba as adamba
from megatron_adamba.data.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> adamba.Model:
    return adamba.load(write_model(tmp_path_factory.mktemp("model") / "model"), dtype="fp32")


def test_the_example(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(ROOT / "examples" / "python_api.py"), str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "width  64: " in done.stdout and "logits differ by 0.0e+00" in done.stdout
    first, last = (float(word) for word in done.stdout.split("loss ")[1].split(";")[0].split(" -> "))
    assert last < first - 2


def test_importing_it_waits_for_nothing():
    program = "import sys, megatron_adamba as a; assert 'torch' not in sys.modules; print(sorted(a.__all__))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "'load'" in done.stdout, done.stderr
    assert set(adamba.__all__) <= set(dir(adamba))
    for name in adamba.__all__:
        assert getattr(adamba, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        adamba.lode  # noqa: B018


def test_scores_are_those_of_each_text_alone(model):
    total = dict.fromkeys(WIDTHS, 0.0)
    for text in TEXTS:
        scores = model.score(text)
        assert tuple(scores) == model.widths == tuple(WIDTHS)
        for width, score in scores.items():
            assert score.tokens == len(text.encode()) + 1 and score.bytes == len(text.encode())
            total[width] += score.nats
    assert total == {width: pytest.approx(losses_by_hand(width), abs=1e-4) for width in WIDTHS}
    # pieces of a long text begin without what came before
    ids = torch.tensor([[256, *TEXTS[0].encode(), 256]])
    pieces = [ids[:, start : start + 9] for start in range(0, ids.shape[1] - 1, 8)]
    nats = sum(
        torch.nn.functional.cross_entropy(tiny_model()(piece[:, :-1])[0], piece[0, 1:], reduction="sum").item()
        for piece in pieces
    )
    assert model.score(TEXTS[0], widths=[32], window=8)[32].nats == pytest.approx(nats, abs=1e-4)


def test_streams_and_texts(model):
    settings = {"width": 16, "max_new_tokens": 12, "temperature": 0.9, "seed": 5}
    tokens = list(model.stream("def f(", **settings))
    assert model.generate("def f(", **settings) == "".join(token.text for token in tokens)
    assert len(tokens) == 12 and tokens[-1].finish == "length" and tokens[0].finish is None
    assert all(token.exit_layer == 2 and 0 < token.compute < 1 for token in tokens)
    (greedy, *_) = model.stream("def f(", temperature=0)
    logits = tiny_model()(torch.tensor([[256, *b"def f("]]))[0, -1]
    assert greedy.id == int(logits.argmax()) and greedy.compute == 1
    assert model.generate("def f(", stop=[tokens[0].text], **settings) == "" or not tokens[0].text.strip()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m, _: m.generate("x", max_new_tokens=0), "max_new_tokens 0: must be above 0, for example max_new"),
        (lambda m, _: m.generate(""), "prompt: is empty"),
        (lambda m, _: m.generate("x", temperature=-1), "temperature -1: must lie"),
        (lambda m, _: m.generate("x", mode="adaptive"), "mode adaptive: this model has no gates"),
        (lambda m, _: m.score("x", widths=[9]), "9"),
        (lambda _, p: adamba.load(p / "none"), "no such folder"),
        (lambda _, p: adamba.load(p, dtype="fp8"), "dtype fp8"),
        (lambda _, p: adamba.make_config(settings={"model.hiden_size": 3}), "did you mean model.hidden_size?"),
        (lambda _, p: adamba.make_config(settings={"lr": 3}), "is called optimizer.lr here"),
        (lambda _, p: adamba.make_config("tiny-hibrid"), "did you mean tiny-hybrid?"),
        (lambda _, p: adamba.open_dataset(p / "none"), "no such file"),
        (lambda _, p: adamba.write_dataset([], p / "d", ByteTokenizer()), "there is none that is not empty"),
        (lambda _, p: adamba.load_tokenizer(p / "x.model"), "no such file"),
        (lambda _, p: adamba.train_tokenizer(["x"], p / "x.bin"), "ends in .model"),
        (lambda _, p: adamba.operations.export(p, p / "x", "gguf"), "kind gguf"),
        (lambda _, p: adamba.operations.extract(p / "none", p / "x", width=8), "none"),
        (lambda _, p: adamba.train(adamba.make_config(settings={"data.tokenizer": "bytes"})), "data.train: no dataset"),
    ],
)
def test_errors_name_arguments(model, tmp_path, call, told):
    with pytest.raises(adamba.AdambaError) as caught:
        call(model, tmp_path)
    said = str(caught.value).replace("(adamba train --train.phase 2)", "")  # a command, to be typed
    assert told in said and " --" not in f" {said}", said


def test_datasets(tmp_path):
    texts = ["first", "zweiter häuser", "third"]
    written = adamba.write_dataset(texts, tmp_path / "data", ByteTokenizer())
    dataset = adamba.open_dataset(tmp_path / "data")
    assert len(written) == len(dataset) == 3 and dataset.meta.source == "write_dataset"
    assert [bytes(document[:-1].tolist()).decode() for document in dataset] == texts
    assert [document.tolist() for document in dataset[1:]] == [dataset[1].tolist(), dataset[-1].tolist()]
    assert dataset[0].dtype == np.int64 and dataset[0][-1] == 256
    assert dataset.num_tokens == sum(len(text.encode()) + 1 for text in texts)
    with pytest.raises(IndexError):
        dataset[3]


def test_two_runs_in_one_process_and_their_metrics(tmp_path):
    """In a process of its own, as the process group outlives the runs. The second run goes on where the first ended."""
    program = f"""
import json, megatron_adamba as adamba
from pathlib import Path
folder = Path({str(tmp_path)!r})
tokenizer = adamba.load_tokenizer("bytes")
for name in ("train", "validation"):
    adamba.write_dataset(["some words and more " * 9] * 9, folder / name, tokenizer)
settings = {{"model.hidden_size": 32, "model.block_pattern": "TM", "model.head_dim": 8, "model.ffn_granule": 16,
    "model.mamba_head_dim": 16, "model.widths": [16, 32], "data.tokenizer": "bytes", "train.seq_len": 32,
    "data.train": [str(folder / "train")], "data.validation": [str(folder / "validation")],
    "optimizer.warmup_steps": 1, "logging.interval": 1, "logging.tensorboard": False, "checkpoint.resume": "auto",
    "logging.run_dir": str(folder / "run")}}
records = []
for steps in (2, 4):
    config = adamba.make_config(settings=settings | {{"train.steps": steps}})
    run = adamba.train(config, on_metrics=records.append)
print(json.dumps([[row for row in records if "loss" in row], len(run.evaluation), str(run.model)]))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    records, evaluated, model = json.loads(done.stdout)
    assert [record["step"] for record in records] == [1, 2, 3, 4] and evaluated == 2
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row for row in written if "loss" in row] == records and adamba.load(model).widths == (16, 32)
