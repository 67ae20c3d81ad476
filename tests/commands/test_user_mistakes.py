"""What users get wrong with the inference, evaluation and surgery commands: one line each, and what `| head` does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands.test_small_tools import ROOT, checkpoint, dataset  # noqa: F401
from surgery.nested_models import saved, source_model
from surgery.test_gates_carried import gated_source

DEEP = "[" * 5000 + "]" * 5000


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return saved(source_model("T"), tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def gated(tmp_path_factory) -> Path:
    return gated_source(tmp_path_factory.mktemp("gated") / "model", "mixed", "TMEMETTT")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with files of all sorts of content."""
    folder = tmp_path_factory.mktemp("files")
    rows = [{"width": 8, "nats_per_token": 1.0, "bits_per_byte": 1.0, "bytes": 3, "exit_layer": None}]
    contents = {
        "deep": DEEP,
        "rows-deep": f'{{"rows": {DEEP}}}',
        "rows-number": '{"rows": 3}',
        "rows-none": '{"rows": []}',
        "rows-text": json.dumps({"rows": [rows[0] | {"nats_per_token": "x"}]}),
        "rows-nan": '{"rows": [{"width": 8, "nats_per_token": NaN}]}',
        "rows-huge": '{"rows": [{"width": 1e400, "nats_per_token": 1}]}',
        "list": "[1]",
        "empty": "",
        "rows": json.dumps({"rows": rows}),
        "metrics-text": '{"step": 1, "loss": "x"}\n',
        "metrics-list": "[1]\n",
        "metrics-half": '{"step": 1, "eval_width": 8}\n',
        "metrics-step": '{"loss": 1.5}\n',
        "metrics-nested": '{"step": [1], "loss": 1.5}\n',
        "items-deep": DEEP + "\n",
        "items-number": '{"prompt": 3, "answer": "x"}\n',
        "items-null": '{"prompt": "x", "answer": null}\n',
        "file": "x",
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    (folder / "bytes").write_bytes(b"\xff\xfe\x00\x81")
    (folder / "folder").mkdir()
    return folder


REFUSED = [
    ("evaluate", "--model M --data D --seq-len 0", 2, "--seq-len 0: must be above 0"),
    ("evaluate", "--model M --data D --batch-size 0", 2, "--batch-size 0: must be above 0"),
    ("evaluate", "--model M --data D --batch-size -3 --adaptive", 2, "--batch-size -3: must be above 0"),
    ("evaluate", "--model M --data D --max-tokens 0", 2, "--max-tokens 0: must be above 0"),
    ("evaluate", "--model M --data D --fixed-exits -1 --adaptive", 2, "--fixed-exits -1: must lie between 0"),
    ("evaluate", "--model M --data D --plot F/folder", 2, "F/folder: is a folder; give the name of a file"),
    ("evaluate", "--model M --data D --json F/folder", 2, "F/folder: is a folder; give the name of a file"),
    ("evaluate", "--model M --data D --json F/file/x.json", 2, "--json: F/file is no folder"),
    ("evaluate", "--model G --items F/items-deep --adaptive", 3, "items-deep: line 1: damaged ("),
    ("evaluate", "--model G --items F/items-number --adaptive", 3, "items-number: line 1: prompt: damaged ("),
    ("evaluate", "--model G --items F/items-null --adaptive", 3, "items-null: line 1: answer: damaged ("),
    ("evaluate", "--model G --items F/bytes --adaptive", 3, "bytes: line 1: damaged ("),
    ("evaluate", "--model G --items F/folder --adaptive", 3, "folder: Is a directory"),
    ("generate", "--model M --prompt x --batch-size 1.5", 2, "--batch-size 1.5: must be a whole number; see"),
    ("generate", "--model M --prompt", 2, "--prompt: expected one argument; see"),
    ("generate", "--model M --promt x", 2, "--promt: unknown flag; did you mean --prompt?"),
    ("surgery", "expand P F/new --hidden 64 --heads grow", 2, "--heads: invalid choice: 'grow'"),
    ("generate", "--model M --prompt x --batch-size 0", 2, "--batch-size 0: must be above 0"),
    ("generate", "--model M --prompt x --max-new-tokens 1000000000000", 2, "--max-new-tokens 1000000000000: must lie"),
    ("generate", "--model M --prompt x --seed 9223372036854775808", 2, "--seed 9223372036854775808: must lie between"),
    ("generate", "--model M --prompt x --temperature nan", 2, "--temperature nan: must be a number; see"),
    ("generate", "--model M --prompt x --output F/folder", 2, "--output F/folder: is a folder"),
    ("generate", "--model M --file F/folder", 3, "--file F/folder: cannot be read as text"),
    ("generate", "--model M --file F/bytes", 3, "--file F/bytes: cannot be read as text"),
    ("plot", "--metrics F/metrics-text --output F/x.png", 3, "record 1: loss: damaged"),
    ("plot", "--metrics F/metrics-list --output F/x.png", 3, "holds no records yet"),
    ("plot", "--metrics F/metrics-half --output F/x.png", 3, "record 1: an evaluation without"),
    ("plot", "--metrics F/metrics-step F/metrics-step --output F/x.png", 3, "holds no records yet"),
    ("plot", "--metrics F/metrics-nested --output F/x.png", 3, "holds no records yet"),
    ("plot", "--metrics F/metrics-text --output F/folder", 2, "--output F/folder: is a folder"),
    ("compare-evaluations", "F/deep", 3, "F/deep: damaged ("),
    ("compare-evaluations", "F/rows-deep", 3, "F/rows-deep: damaged ("),
    ("compare-evaluations", "F/rows-number", 3, "F/rows-number: rows: damaged ("),
    ("compare-evaluations", "F/rows-none", 3, "F/rows-none: rows: damaged ("),
    ("compare-evaluations", "F/rows-text", 3, "F/rows-text: rows: damaged ("),
    ("compare-evaluations", "F/rows-nan", 3, "F/rows-nan: "),
    ("compare-evaluations", "F/rows-huge", 3, "F/rows-huge: "),
    ("compare-evaluations", "F/folder", 3, "F/folder: Is a directory"),
    ("compare-evaluations", "F/bytes", 3, "F/bytes: damaged ("),
    ("compare-evaluations", "F/rows --json F/folder", 2, "--json F/folder: is a folder"),
    ("compare-with-xz", "--eval F/list --data D --tokenizer bytes", 3, "--eval F/list: damaged ("),
    ("compare-with-xz", "--eval F/rows --data D --tokenizer bytes", 3, "scored 3 bytes"),
    ("surgery", "compare P P --data D --seq-len 0", 2, "--seq-len 0: must be above 0"),
    ("surgery", "compare P P --data D --batch-size 0", 2, "--batch-size 0: must be above 0"),
    ("surgery", "compare P P --data D --tokens -1", 2, "--tokens -1: must be above 0"),
    ("surgery", "compare P P --data D --json F/folder", 2, "--json F/folder: is a folder"),
    ("surgery", "reorder P F/new --random -1", 2, "--random -1: must lie between 0"),
    ("surgery", "reorder P F/new --random 99999999999999999999", 2, "--random 99999999999999999999: must lie"),
    ("surgery", "reorder P F/new --data D --batch-size 0", 2, "--batch-size 0: must be above 0"),
    ("surgery", "graft P F/new --pattern TTMT --seed -1", 2, "--seed -1: must lie between 0"),
    ("surgery", "graft P F/new --pattern TTMT --mamba-d-state 0", 2, "mamba"),
    ("surgery", "expand P F/new --hidden 0", 2, "--hidden 0: must be above 0"),
    ("surgery", "expand P F/new --hidden 64 --std nan", 2, "--std nan: must be a number"),
    ("surgery", "expand P F/new --hidden 64 --seed 18446744073709551616", 2, "--seed 18446744073709551616: must lie"),
    ("surgery", "extract P F/file/new --width 8", 2, "F/file"),
    ("surgery", "import hf F/file F/new", 5, "F/file"),
    ("serve", "--model M --slots 0", 2, "--slots 0: must lie between 1"),
    ("serve", "--model M --request-seconds nan", 2, "--request-seconds nan: must be a number"),
    ("serve", "--model M --port 70000", 2, "--port 70000: must lie between"),
    ("serve", "--model M --allow-host a/b", 2, "--allow-host a/b: is no host name"),
    ("serve", "--model M --slots 300000000", 2, "--slots 300000000: must lie between 1 and 4096, for ex"),
    ("serve", "--model M --context 99999999999", 2, "--context 99999999999: must lie between 1 and 16777216"),
    ("serve", "--model M --queue 2000000", 2, "--queue 2000000: must lie between 1 and 1048576"),
    ("serve", "--model M --host 256.1.1.1", 2, "--host 256.1.1.1: is not known ("),
    ("serve", "--model M --host 192.0.2.1", 2, "--host 192.0.2.1: is no address of this machine; for example"),
    ("serve", f"--model M --host {'a' * 70}.b", 2, "is not known ("),
    ("serve", "--model F/file --port 0", 5, "F/file: no such folder"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "words", "code", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_refused(adamba, checkpoint, dataset, plain, gated, files, name, words, code, message):  # noqa: F811
    places = {"M": str(checkpoint), "D": str(dataset), "P": str(plain), "G": str(gated)}
    given = [places.get(word, word.replace("F/", f"{files}/")) for word in words.split()]
    got, _, err = adamba(name, *given)
    assert got == code and err.count("\n") == 1, err
    assert message.replace("F/", f"{files}/") in err
    assert not (files / "new").exists()


def run(words: list, stdin: bytes = b"", **settings) -> subprocess.CompletedProcess:
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, input=stdin, capture_output=True, timeout=120, **settings)


def test_a_reader_that_goes_away_ends_it_without_a_word(plain, tmp_path):
    """`| head`: more than a pipe takes, and less, which is written when the script ends."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom megatron_adamba.config.script import run_script\n"
        "run_script(lambda: [print('x' * 80) for _ in range(int(sys.argv[1]))] and 0)\n"
    )
    status = "echo ${PIPESTATUS[0]}"
    for count, codes in ((1, ("0", "141")), (100_000, ("141",))):
        command = f"{sys.executable} {script} {count} | true; {status}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() in codes and done.stderr == ""
    words = f"{sys.executable} {ROOT / 'tools' / 'surgery.py'} extract {plain} {tmp_path / 'x'} --width 8 --dry-run"
    done = subprocess.run(
        ["bash", "-c", f"{words} | (exec <&-; sleep 8); echo ${{PIPESTATUS[0]}}"], capture_output=True
    )
    assert done.stdout.strip() == b"141" and b"Traceback" not in done.stderr and b"Exception" not in done.stderr


def test_text_that_is_no_text(checkpoint, tmp_path):  # noqa: F811
    """Bytes that are no UTF-8 on the command line, in a conversation, in a stop string: cleaned, as the server does."""
    script = ROOT / "tools" / "generate.py"
    words = [script, "--model", checkpoint, "--max-new-tokens", 3, "--temperature", 0, "--dtype", "fp32"]
    environment = os.environ | {"PYTHONUTF8": "1"}
    bad = run([*words, "--prompt", os.fsdecode(b"a\xffb"), "--stop", os.fsdecode(b"\xfe")], env=environment)
    good = run([*words, "--prompt", "a\ufffdb"], env=environment)
    assert bad.returncode == good.returncode == 0 and bad.stdout == good.stdout, bad.stderr
    words[:1] = ["-m", "megatron_adamba", "chat"]
    chat = run(words, b"a\xffb\n\n", env=environment)
    assert chat.returncode == 0 and b"Traceback" not in chat.stderr
    assert chat.stdout == run(words, "a\ufffdb\n\n".encode(), env=environment).stdout
    # a name that no terminal can show
    refused = run([script, "--model", os.fsdecode(b"/nowhere\xff"), "--prompt", "x"], env=environment)
    assert refused.returncode == 5 and refused.stderr.count(b"\n") == 1
