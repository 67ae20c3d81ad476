"""The chat page in a real browser: what it shows of each token is what the server said of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from inference.served import LIMITS, alone, serving
from surgery.test_gates_carried import gated_source

from megatron_adamba.inference.load import load_model
from megatron_adamba.inference.modes import Mode

BROWSER = Path(__file__).with_name("browser.py")
FLAGS = "--no-sandbox --disable-gpu"
BLANKS = " \t\n\v\f\r\u00a0\ufeff\u1680\u2028\u2029\u202f\u205f\u3000"
"""what a browser trims; Python's strip takes more"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(gated_source(tmp_path_factory.mktemp("run") / "model", "mixed", "TMEMETTT"), "fp32")


def open_browser(*words: str, patience: float) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": FLAGS}
    command = [sys.executable, str(BROWSER), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patience)


@pytest.fixture(scope="module")
def visit():
    """visit(address, mode, turns...): the turns that the page shows in the end."""
    try:
        # a machine may lack what Chromium links to
        tried = open_browser("data:text/html,hello", patience=120)
    except subprocess.TimeoutExpired:
        pytest.skip("PyQt6-WebEngine's Chromium does not answer on this machine")
    if tried.returncode or "loaded" not in tried.stdout:
        pytest.skip(f"PyQt6-WebEngine's Chromium does not start on this machine: {tried.stderr.strip()[-200:]}")

    def start(address: str, mode: str, *turns: str) -> list[dict]:
        result = open_browser(address, mode, *turns, patience=240)
        assert result.returncode == 0, result.stderr[-2000:]
        return json.loads(result.stdout.splitlines()[-1])["turns"]

    return start


def test_a_conversation_on_the_page(loaded, visit):
    with serving(loaded, LIMITS) as address:
        turns = visit(address, "adaptive", "hello <b>you</b>", "more")
    assert [turn["kind"] for turn in turns] == ["turn user", "turn assistant"] * 2
    assert turns[0]["text"] == "hello <b>you</b>"
    mode, transcript, layers = Mode("adaptive"), "", set()
    for asked, answered in zip(turns[::2], turns[1::2]):
        transcript += f"User: {asked['text']}\nAssistant:"
        count = min(LIMITS.new_tokens, LIMITS.context - len(transcript.encode()) - 1)
        text, news = alone(loaded, transcript, count, mode, stop=("\nUser:",))
        shown = answered["tokens"]
        assert "".join(token["text"] for token in shown) == text.strip() and len(shown) == len(news)
        assert [int(token["exitLayer"]) for token in shown] == [new.exit_layer for new in news]
        assert all(token["title"].startswith(f"width {token['width']}, left behind block ") for token in shown)
        assert answered["total"].startswith(f"{len(news)} tokens, ") and all(token["colour"] for token in shown)
        layers |= {new.exit_layer for new in news}
        transcript += f" {text.strip().strip(BLANKS)}\n"
    assert layers


def test_what_goes_wrong_is_shown(loaded, visit):
    with serving(loaded, LIMITS) as address:
        turns = visit(address, "think", "x" * 400)
    assert turns[-1]["kind"] == "turn error" and "of this context" in turns[-1]["text"]
