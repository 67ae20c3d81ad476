"""tools/generate.py where the model chooses: adaptive texts, files of prompts, conversations."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
from surgery.test_gates_carried import gated_source

from megatron_adamba.inference.generate import Generation, GenerationRequest
from megatron_adamba.inference.load import load_model
from megatron_adamba.inference.modes import Mode

SETTINGS = {"exit_threshold": 0.4, "expand_cost": 0.5}
ADAPTIVE = ("--mode", "adaptive", "--exit-threshold", 0.4, "--temperature", 0, "--dtype", "fp32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return gated_source(tmp_path_factory.mktemp("run") / "model", "mixed", "TMEMETTT")


def expected(checkpoint, prompt: str, count: int, **settings):
    """What the model makes by itself: its text, and what its tokens took."""
    loaded = load_model(checkpoint, "fp32")
    ids = [loaded.tokenizer.eod_id, *loaded.tokenizer.encode(prompt)]
    policy = Mode("adaptive", None, SETTINGS).policy(loaded, ids)
    generation = Generation(loaded, 1, 200)
    news = [generation.add(GenerationRequest(tuple(ids), policy, count, **settings))[1]]
    while generation.running:
        news += generation.step()
    return "".join(new.text for new in news), news


def test_adaptive_with_stats(adamba, checkpoint):
    code, out, err = adamba(
        "generate", "--model", checkpoint, "--prompt", "ab", *ADAPTIVE, "--max-new-tokens", 12, "--stats"
    )
    text, news = expected(checkpoint, "ab", 12)
    assert code == 0 and out == "ab" + text + "\n"
    assert re.search(r"\[widths \d+ to 32, 12 tokens, left behind block \d\.\d of 8 on average, \d+% of their", err)
    rows = [re.findall(r"[^│]+", line) for line in err.splitlines() if line.startswith("│")]
    assert [int(row[1]) for row in rows] == [new.exit_layer for new in news]
    assert len({new.exit_layer for new in news}) > 1


def test_a_file_of_prompts(adamba, checkpoint, tmp_path):
    """More prompts than places, of different lengths: each text is what it is alone."""
    prompts = ["a", "some words", "xyz", "häuser", "0123456789"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    words = ("--model", checkpoint, "--file", tmp_path / "prompts.txt", *ADAPTIVE, "--max-new-tokens", 7)
    code, out, err = adamba("generate", *words, "--batch-size", 2, "--output", tmp_path / "texts.jsonl")
    assert (code, out) == (0, "") and err.startswith("[5 prompts, 35 tokens, ")
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    for row, prompt in zip(rows, prompts, strict=True):
        text, news = expected(checkpoint, prompt, 7)
        assert row == {"prompt": prompt, "text": text, "exit_layers": [new.exit_layer for new in news]}
    _, printed, _ = adamba("generate", *words)
    assert printed == (tmp_path / "texts.jsonl").read_text()


def test_a_conversation_goes_on_from_its_caches(adamba, checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand more\n\nnever read\n"))
    words = ("--model", checkpoint, "--temperature", 0, "--dtype", "fp32", "--max-new-tokens", 5)
    code, out, err = adamba("chat", *words)
    assert code == 0 and err.count(", 5 tokens, ") == 2
    loaded = load_model(checkpoint, "fp32")
    ids, texts = [loaded.tokenizer.eod_id], []
    for turn in ("hello\n", "and more\n"):
        ids += loaded.tokenizer.encode(turn)
        generation = Generation(loaded, 1, 100)
        request = GenerationRequest(tuple(ids), Mode("think").policy(loaded, ids), 5)
        new = generation.add(request)[1]
        made = [new.token]
        while generation.running:
            made += [new.token for new in generation.step()]
        ids += made
        texts.append(loaded.tokenizer.decode(made))
    assert out == "".join(text + "\n" for text in texts)


def test_it_ends_at_a_stop_string(adamba, checkpoint):
    text, _ = expected(checkpoint, "ab", 12)
    stop = next(text[place : place + 2] for place in range(2, 11) if text[place : place + 2].isprintable())
    words = ("--model", checkpoint, "--prompt", "ab", *ADAPTIVE, "--max-new-tokens", 12, "--stop", stop)
    _, out, _ = adamba("generate", *words)
    assert out == "ab" + text[: text.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--prompt", "x", "--mode", "adaptive", "--exit-threshold", 2), 2, "--exit-threshold 2.0: must lie between"),
        (("--prompt", "x", "--mode", "adaptive", "--exit-per", "word"), 2, "--exit-per word: must be one of token"),
        (
            ("--prompt", "x", "--mode", "adaptive", "--energy-price", -1),
            2,
            "--energy-price -1.0: must be at least 0, for",
        ),
        (("--prompt", "x", "--mode", "adaptive", "--min-width", 0), 2, "--min-width 0: must be at least 1"),
        (("--prompt", "x", "--mode", "adaptive", "--expand-cost", "nan"), 2, "--expand-cost nan: must be a number"),
        (("--prompt", "x", "--expand-cost", "much"), 2, "--expand-cost much: must be a number"),
        (("--prompt", "x", "--seed", -1), 2, "--seed -1: must lie between"),
        (("--file", "/nowhere.txt"), 3, "--file /nowhere.txt: cannot be read as text"),
    ],
    ids=str,
)
def test_what_is_refused(adamba, checkpoint, words, code, message):
    got, out, err = adamba("generate", "--model", checkpoint, *words)
    assert (got, out) == (code, "") and message in err and err.count("\n") == 1


def test_infinity_is_never_and_the_least_width(adamba, checkpoint):
    loaded = load_model(checkpoint, "fp32")
    words = ("generate", "--model", checkpoint, "--prompt", "ab", *ADAPTIVE, "--max-new-tokens", 12)
    made = {}
    for given in ({"expand_cost": float("inf")}, {"energy_price": float("inf")}):
        settings = {"exit_threshold": 0.4, **given}
        price = settings.pop("energy_price", None)
        ids = [loaded.tokenizer.eod_id, *b"ab"]
        policy = Mode("adaptive", None, settings, price).policy(loaded, ids)
        generation = Generation(loaded, 1, 200)
        news = [generation.add(GenerationRequest(tuple(ids), policy, 12))[1]]
        while generation.running:
            news += generation.step()
        (name,) = given
        flag = f"--{name.replace('_', '-')}"
        for word in ("inf", "Infinity", ".inf"):
            assert adamba(*words, flag, word)[:2] == (0, "ab" + "".join(new.text for new in news) + "\n"), word
        made[name] = news, policy
    assert all(new.widened_at == 8 for new in made["expand_cost"][0])
    assert set(made["energy_price"][1].plan.widths) == {min(row.width for row in loaded.model.config.nest)}


def test_a_model_without_gates_says_so(adamba, checkpoint, tmp_path):
    from surgery.nested_models import saved, source_model

    plain = saved(source_model("T"), tmp_path / "plain")
    code, _, err = adamba("generate", "--model", plain, "--prompt", "x", "--mode", "adaptive")
    assert code == 2 and "this model has no gates; train them" in err
