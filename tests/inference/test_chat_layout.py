"""The chat page's looks and controls in a real browser: both widths, stopping, settings, keys, markup, colours."""

from __future__ import annotations

import colorsys
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from inference.served import LIMITS, serving
from inference.test_chat_page import FLAGS, visit  # noqa: F401
from matplotlib.image import imread
from surgery.test_gates_carried import gated_source

from megatron_adamba.inference.load import load_model

BROWSER = Path(__file__).with_name("browser_steps.py")
BY_ID = "const at = (id) => document.getElementById(id);"
IDLE = {"until": "!document.getElementById('send').disabled"}
TOKENS = "document.querySelectorAll('.token').length"
# the body of each request, kept where the test finds it
WATCH = """window.bodies = []; const real = window.fetch;
window.fetch = (address, options) => {
  window.bodies.push(JSON.parse(options.body));
  return real(address, options);
};"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(gated_source(tmp_path_factory.mktemp("run") / "model", "mixed", "TMEMETTT"), "fp32")


@pytest.fixture(scope="module")
def walk(visit):  # noqa: F811
    """walk(address, steps...): what each step gave. Skips as `visit` does where there is no browser."""

    def start(address: str, *steps: dict) -> list:
        environment = os.environ | {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": FLAGS}
        command = [sys.executable, str(BROWSER), address, json.dumps(steps)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return start


@pytest.fixture(scope="module")
def address(loaded):
    with serving(loaded, LIMITS) as address:
        yield address


@pytest.fixture
def slow_address(loaded):
    """Of a server that makes a text of thousands of tokens: there is time to stop it."""
    with serving(loaded, replace(LIMITS, new_tokens=3000, context=4000)) as address:
        yield address


def script(text: str) -> dict:
    return {"run": f"(() => {{ {BY_ID} {text} }})()"}


def say(text: str, **settings: str) -> dict:
    values = {"temperature": "0", "text": text} | settings
    return script("".join(f"at({name!r}).value = {json.dumps(value)};" for name, value in values.items()) + SEND)


SEND = "at('send').click();"


def key(name: str, shift: bool = False) -> str:
    given = json.dumps({"key": name, "shiftKey": shift, "bubbles": True, "cancelable": True})
    return f"return at('text').dispatchEvent(new KeyboardEvent('keydown', {given}));"


@pytest.mark.parametrize("width", [1000, 380])
def test_the_page_fits(address, walk, width, tmp_path):
    """Before and behind a conversation of long words, with the settings open: nothing overflows, all can be reached."""
    overflow = script("const page = document.documentElement; return page.scrollWidth <= innerWidth && innerWidth;")
    # every control in the view, once scrolled to, and not covered
    reach = script("""const all = document.querySelectorAll('button, input, select, textarea, summary');
        return [...all].filter((one) => {
        one.scrollIntoView({ block: "center" });
        const box = one.getBoundingClientRect();
        const hit = document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2);
        return !(box.width >= 20 && box.left >= 0 && box.right <= innerWidth && one.contains(hit));
    }).map((one) => one.id || one.tagName);""")
    folded = script("const open = at('panel').open; at('panel').open = true; return open;")
    files = [tmp_path / f"{number}.png" for number in range(2)]
    steps = [{"size": [width, 800]}, overflow, folded, reach, {"picture": str(files[0])}]
    steps += [
        say("w" * 150, mode="adaptive"),
        {"until": f"{TOKENS} > 3"},
        IDLE,
        overflow,
        reach,
        {"picture": str(files[1])},
    ]
    given = walk(address, *steps)
    assert (given[1], given[3], given[8], given[9]) == (width, [], width, [])
    for picture in map(imread, map(str, files)):
        assert picture.shape[:2] == (800, width) and picture[..., :3].std() > 0.02
    before, behind = (imread(str(file))[..., :3] for file in files)
    assert np.abs(before - behind).max() > 0.3


def test_every_input_has_a_label(address, walk):
    inputs = "[...document.querySelectorAll('input, select, textarea')]"
    labels = "[...one.labels].map((label) => label.textContent.trim()).join()"
    (names,) = walk(address, {"run": f"{inputs}.map((one) => [one.id, {labels}])"})
    assert {name for name, _ in names} == {"mode", "temperature", "length", "system", "text"}
    assert all(label for _, label in names)


def test_what_a_base_model_does_is_said(address, walk):
    text = walk(address, {"run": "document.body.innerText"})[0]
    assert "A base model goes on with a text. It does not answer questions." in text


def test_settings_travel(address, walk):
    first = say("one", mode="normal", temperature="0.4", length="5", system=" Be brief. ")
    second = say("two", temperature="", length="", system="")
    done = [{"until": f"{TOKENS} > 0"}, IDLE]
    given = walk(address, script(WATCH), first, *done, second, *done, {"run": "window.bodies"})[-1]
    answer = given[1]["messages"][1]
    assert given[0] == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}],
        "mode": "normal", "stream": True, "temperature": 0.4, "max_tokens": 5,
    }  # fmt: skip
    # what is left empty is the server's to decide; the conversation goes on
    assert given[1] == {
        "messages": [{"role": "user", "content": "one"}, answer, {"role": "user", "content": "two"}],
        "mode": "normal", "stream": True,
    }  # fmt: skip
    assert answer["role"] == "assistant"


def test_speed_and_length_are_shown(address, walk):
    given = walk(address, say("hello", length="7"), {"until": f"{TOKENS} > 0"}, IDLE,
                 {"run": "document.querySelector('.total').textContent"})  # fmt: skip
    assert re.fullmatch(r"7 tokens, \d+\.\d tokens/s, \d+% of their compute saved", given[-1])


@pytest.mark.parametrize("how", ["at('stop').click();", key("Escape")])
def test_stopping(slow_address, walk, how):
    """What came stays, the server stops too, and the conversation goes on with it."""
    ready = {"run": "[document.getElementById('send').disabled, document.getElementById('stop').disabled]"}
    total = {"run": "[...document.querySelectorAll('.total')].at(-1).textContent"}
    steps = [script(WATCH), ready, say("hello"), {"until": f"{TOKENS} > 4"}, ready, script(how), IDLE, ready, total]
    steps += [{"run": TOKENS}, say("more", length="3"), {"until": "window.bodies.length > 1"}, IDLE, total]
    given = walk(slow_address, *steps, {"run": "window.bodies[1].messages.map((one) => one.role)"})
    assert given[1] == [False, True] and given[4] == [True, False] and given[7] == [False, True]
    assert re.fullmatch(r"\d+ tokens, .* saved, stopped", given[8]) and 4 < given[9] < 3000
    assert given[13].startswith("3 tokens, ") and "stopped" not in given[13]
    assert given[14] == ["user", "assistant", "user"]
    until = time.monotonic() + 20
    while httpx.get(f"{slow_address}/health").json()["waiting"]:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_new_conversation_in_the_middle_of_an_answer(slow_address, walk):
    """Nothing of the old one is left, on the page or in what is sent."""
    steps = [script(WATCH), say("old"), {"until": f"{TOKENS} > 4"}, script("at('clear').click();"), IDLE]
    steps += [{"run": "document.querySelectorAll('.turn').length"}, say("new", length="3"), {"until": f"{TOKENS} > 0"}]
    given = walk(slow_address, *steps, IDLE, {"run": "window.bodies[1].messages"})
    assert given[5] == 0 and given[-1] == [{"role": "user", "content": "new"}]


def test_keys(address, walk):
    """Enter sends, Shift and Enter do not; the key is then left to the text."""
    typed = script("at('length').value = '3'; at('text').value = 'hello';")
    turns = {"run": "document.querySelectorAll('.turn').length"}
    steps = [typed, script(key("Enter", shift=True)), turns, script(key("Enter")), {"until": f"{TOKENS} > 0"}, IDLE]
    given = walk(address, *steps, turns)
    assert given[1] is True and given[2] == 0 and given[3] is False and given[-1] == 2


def test_markup_stays_text(address, walk):
    """In what is said, in settings, and in what the model says."""
    evil = "<img src=x onerror='window.hit = 1'><b>bold</b>"
    fake = """window.fetch = async () => new Response('data: ' + JSON.stringify({ choices: [{
        delta: { content: %s }, adamba: { compute: 1, width: 8, exit_layer: 8 } }] }) + '\\n\\ndata: [DONE]\\n\\n');"""
    steps = [script(fake % json.dumps(evil)), say(evil, system=evil), {"until": f"{TOKENS} > 0"}, IDLE]
    count = {"run": "[document.querySelectorAll('#turns img, #turns b').length, window.hit ?? 0]"}
    given = walk(
        address, *steps, count, {"run": "[...document.querySelectorAll('.turn')].map((one) => one.textContent)"}
    )
    assert given[4] == [0, 0] and given[5][0] == evil and given[5][1].startswith(evil)


def test_compute_is_one_hue_from_light_to_dark(address, walk):
    """No colour that reads as good or bad; black text stays readable on all of them."""
    paint = """const canvas = document.createElement('canvas').getContext('2d');
        return [0, .25, .5, .75, 1].map((share) => {
            const span = document.createElement('span');
            span.style.background = colour(share);
            document.body.append(span);
            canvas.fillStyle = getComputedStyle(span).backgroundColor;
            canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
        });"""
    colours = walk(address, script(paint))[0]
    seen = [colorsys.rgb_to_hls(*(part / 255 for part in one)) for one in colours]
    assert all(0.5 < hue < 0.72 for hue, _, _ in seen)
    lightness = [light for _, light, _ in seen]
    assert lightness == sorted(lightness, reverse=True) and lightness[0] - lightness[-1] > 0.15
    assert lightness[-1] > 0.6
