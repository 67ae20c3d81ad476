"""Every command of the pages runs, in the order of the pages, in a folder of its own; sizes alone are smaller."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from docs.pages import COMMAND_LINES, words_of_adamba
from docs.workspace import add_published, fill, programs, small

PAGE_ORDER = (
    "docs/quickstart.md",
    "docs/own-text.md",
    "docs/training.md",
    "docs/layouts.md",
    "docs/models.md",
    "docs/evaluation.md",
    "docs/adaptive.md",
    "docs/checkpoints.md",
    "docs/serving.md",
    "docs/growing/index.md",
    "docs/growing/nanochat.md",
    "docs/growing/gpt-oss.md",
    "docs/growing/hugging-face.md",
    "README.md",
)
ELSEWHERE = {
    "make ": "CI calls each of them",
    "source ": "a shell's own",
    "pip install": "docs/test_wheel.py, with the wheel built here",
    "pytest ": "this one",
    "bash examples/": "surgery/test_nanochat_road.py, surgery/test_gpt_oss_examples.py, commands/test_own_text.py",
    "curl ": "docs/serving.md below",
}
PORT = "18741"


class Folder:
    """Where commands run."""

    def __init__(self, place: Path, environment: dict[str, str]) -> None:
        self.place, self.environment = place, environment

    def run(self, line: str, timeout: float = 240) -> str:
        command = ["bash", "-c", line]
        done = subprocess.run(
            command, cwd=self.place, env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def copy(self, source: str, target: str) -> None:
        shutil.copytree(self.place / source, self.place / target, symlinks=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Folder:
    root = tmp_path_factory.mktemp("pages")
    return Folder(fill(root), programs(root / "bin"))


def lines_of(page: str) -> list[str]:
    lines = [line for name, line in COMMAND_LINES if name == page]
    return [line for line in lines if not line.startswith(tuple(ELSEWHERE))]


def prepare(folder: Folder, page: str) -> None:
    """What a page says it starts from."""
    trained = "runs/by-hand"
    if page == "docs/training.md":
        folder.copy(trained, "runs/quickstart")
        folder.run(
            "adamba evaluate --model runs/quickstart/model --data runs/quickstart/data/validation "
            "--max-tokens 300 --json runs/quickstart/eval.json"
        )
        plain = "adamba train --preset tiny-hybrid --data.train data/train --data.validation data/validation "
        folder.run(
            small(
                f"{plain} --data.tokenizer data/tokenizer.model --model.block_pattern TT --logging.run_dir runs/plain"
            )
        )
        folder.run("adamba surgery graft runs/plain/model runs/grafted --pattern TMT --mamba-head-dim 8")
    if page == "docs/evaluation.md":
        items = folder.place / "runs" / "difficulty" / "data"
        folder.run(f"python examples/difficulty/tasks.py --output {items} --train 500")
        for path in items.glob("heldout-*.jsonl"):
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
        gates = "--train.phase 2 --gates.train true --gates.size 8 --elastic.exit_fraction 0.5 "
        data = "runs/quickstart/data"
        with_gates = f"adamba train --preset tiny-hybrid {gates}"
        folder.run(
            small(
                f"{with_gates} --data.train {data}/train --data.tokenizer {data}/tokenizer.model "
                "--logging.run_dir runs/adaptive"
            )
        )
        folder.run("adamba data --input runs/difficulty/data/train.jsonl --tokenizer bytes --output runs/bytes")
        folder.run(
            small(
                f"{with_gates} --data.train runs/bytes --data.validation runs/bytes --data.tokenizer bytes "
                "--logging.run_dir runs/difficulty"
            )
        )
    if page == "docs/growing/index.md":
        add_published(folder.place)
        for name in "ab":
            folder.copy(trained, f"runs/{name}")
    if page in ("docs/growing/nanochat.md", "docs/growing/hugging-face.md", "README.md"):
        for name in ("d32", "gpt-oss-20b", "gpt-oss-20b-hf", "hybrid", "phase-1"):
            shutil.rmtree(folder.place / "runs" / name, ignore_errors=True)
    if page == "docs/growing/gpt-oss.md":
        shutil.rmtree(folder.place / "runs" / "hybrid", ignore_errors=True)


def serve(folder: Folder, line: str) -> None:
    """The server answers the page's own request, and ends on a signal."""
    (request,) = [line for name, line in COMMAND_LINES if name == "docs/serving.md" and line.startswith("curl")]
    words = [*folder.environment["PATH"].split(":")[:1]]
    server = subprocess.Popen(
        [f"{words[0]}/{line.split()[0]}", *line.split()[1:], "--port", PORT],
        cwd=folder.place,
        env=folder.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        ready = f"curl -sf localhost:{PORT}/v1/models"
        for _ in range(120):
            if subprocess.run(ready.split(), capture_output=True).returncode == 0:
                break
            assert server.poll() is None, server.stdout.read()
            time.sleep(0.5)
        answer = folder.run(request.replace("curl ", "curl -s ").replace(":8000", f":{PORT}"))
        assert '"text"' in answer, answer
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGE_ORDER)
def test_a_pages_commands_run(folder, page):
    prepare(folder, page)
    for line in lines_of(page):
        if line.startswith("adamba serve"):
            serve(folder, line)
        elif line.startswith("adamba chat"):
            assert folder.run(f"echo hello | {line} --max-new-tokens 4").strip()
        else:
            folder.run(small(line))


def test_no_page_with_commands_is_left_out():
    ours = {name for name, line in COMMAND_LINES if not line.startswith(tuple(ELSEWHERE))}
    assert ours == set(PAGE_ORDER)
    assert all(words_of_adamba(line) is not None for page in PAGE_ORDER for line in lines_of(page))
