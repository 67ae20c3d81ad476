"""lm-evaluation-harness, the real one, with our models: the same score as through tools/evaluate.py."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from commands.test_small_tools import ROOT
from surgery.test_gates_carried import gated_source

from megatron_adamba.checkpoint.canonical import read_tensors, write_canonical
from megatron_adamba.inference.generate import Generation, GenerationRequest
from megatron_adamba.inference.load import load_model
from megatron_adamba.inference.modes import Mode

ADAPTIVE = Mode("adaptive")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """It writes letters, and comes to an end."""
    folder = tmp_path_factory.mktemp("run")
    source = gated_source(folder / "source", "mixed", "TMEMETTT")
    tensors = dict(read_tensors(source))
    kept = torch.zeros(257, 1)
    kept[ord("a") : ord("z") + 1], kept[256] = 1.0, 1.2
    tensors["head.weight"] *= kept
    write_canonical(folder / "model", json.loads((source / "config.json").read_text()), tensors.items())
    return folder / "model"


@pytest.fixture(scope="module")
def items(checkpoint) -> list[dict]:
    """Prompts whose answers the model gives, or all but."""
    loaded, items = load_model(checkpoint, "fp32"), []
    for number in range(60):
        prompt = f"prompt {number}>"
        ids = (256, *loaded.tokenizer.encode(prompt))
        generation, text = Generation(loaded, 1, 60), ""
        news = [generation.add(GenerationRequest(ids, ADAPTIVE.policy(loaded, ids), 32))[1]]
        while generation.running:
            news += generation.step()
        text = "".join(new.text for new in news)
        if news[-1].finish == "stop" and text:
            items.append({"prompt": prompt, "answer": text if len(items) % 3 else text + "x"})
    assert len(items) >= 9
    return items


@pytest.mark.slow
def test_one_score_through_both(adamba, checkpoint, items, tmp_path):
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    code, _, _ = adamba(
        "evaluate",
        "--model",
        checkpoint,
        "--items",
        file,
        "--adaptive",
        "--dtype",
        "fp32",
        "--json",
        tmp_path / "t.json",
    )
    assert code == 0
    row = json.loads((tmp_path / "t.json").read_text())["rows"][-1]
    task = yaml.safe_load((ROOT / "examples" / "difficulty" / "lm_eval" / "difficulty_hard.yaml").read_text())
    task["dataset_kwargs"]["data_files"]["test"] = str(file)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "difficulty_hard.yaml").write_text(yaml.safe_dump(task))
    words = ["--model", "adamba", "--model_args", f"pretrained={checkpoint},mode=adaptive,dtype=fp32"]
    words += ["--include_path", str(tmp_path / "tasks"), "--tasks", "difficulty_hard", "--batch_size", "4"]
    script = str(ROOT / "tools" / "evaluate_tasks.py")
    command = [sys.executable, script, "run", *words, "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    score = json.loads(written.read_text())["results"]["difficulty_hard"]["exact_match,none"]
    assert score == row["exact_match"] and 0 < score < 1


def test_loglikelihoods_are_those_of_the_model(checkpoint, monkeypatch):
    """Contexts and continuations, with the space between; long texts in windows; what greedy decoding would give."""
    from lm_eval.api.instance import Instance

    from megatron_adamba.commands.harness import AdambaLM

    lm = AdambaLM(str(checkpoint), dtype="fp32", batch_size=2, max_length=12)
    ask = lambda kind, *arguments: Instance(request_type=kind, doc={}, arguments=arguments, idx=0)
    pairs = [("ab ", "cd"), ("", "xy"), ("a much longer context", "z"), ("q", "")]
    scores = lm.loglikelihood([ask("loglikelihood", *pair) for pair in pairs])
    for (context, continuation), (score, greedy) in zip(pairs, scores):
        whole = [256, *(context + continuation).encode()]
        count = len((context[len(context.rstrip()) :] + continuation).encode())
        # one token more than the model reads: the last is only scored
        whole = whole[-13:]
        logits = lm.loaded.model(torch.tensor([whole[:-1] or [256]]))[0].log_softmax(-1)
        places = range(len(whole) - count - 1, len(whole) - 1)
        want = sum(logits[place, whole[place + 1]].item() for place in places)
        assert score == pytest.approx(want, abs=1e-4)
        assert greedy == all(int(logits[place].argmax()) == whole[place + 1] for place in places)
    text = "thirty letters in three windows"
    (rolled,) = lm.loglikelihood_rolling([ask("loglikelihood_rolling", text)])
    ids, total = [256, *text.encode()], 0.0
    for start in range(0, len(ids) - 1, 12):
        stop = min(start + 13, len(ids))
        # the last window reads as far back as the others
        piece = torch.tensor([ids[max(stop - 13, 0) : stop]])
        losses = torch.nn.functional.cross_entropy(lm.loaded.model(piece[:, :-1])[0], piece[0, 1:], reduction="none")
        total -= losses[start + 1 - stop :].sum().item()
    assert rolled == pytest.approx(total, abs=1e-3) and not math.isnan(rolled)


def test_texts_end_where_the_task_says(checkpoint, items, monkeypatch):
    from lm_eval.api.instance import Instance

    from megatron_adamba.commands.harness import AdambaLM

    lm = AdambaLM(str(checkpoint), mode="adaptive", dtype="fp32", batch_size=3)
    chosen = [item for place, item in enumerate(items[:8]) if place % 3]
    settings = [{"until": item["answer"][2:4], "max_gen_toks": 32} for item in chosen]
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(item["prompt"], own), idx=0)
        for item, own in zip(chosen, settings)
    ]
    for item, own, text in zip(chosen, settings, lm.generate_until(requests), strict=True):
        until = own["until"]
        assert text == (item["answer"].split(until)[0] if until else item["answer"])
