"""train --input: from texts of one's own to a trained model, its picture and a sample, within a number of minutes.

Everything lands in one run folder: the dataset, the tokenizer, and `settings.yaml`, which says what was chosen and why;
`adamba train --config RUN/settings.yaml` is the same run by hand.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_adamba.commands.own_recipe import Recipe, recipe_for, vocab_size_for
from megatron_adamba.config.cli import ParsedArguments, parse_arguments
from megatron_adamba.config.rules import folder_to_write
from megatron_adamba.data.corpus_files import LeftOut
from megatron_adamba.data.held_out import split_documents
from megatron_adamba.errors import AdambaError, ConfigError
from megatron_adamba.files import write_atomically
from megatron_adamba.schema import JsonObject, read_json

OWN_FLAGS = ("--input", "--minutes")
TIMED_STEPS = 8
NOTE, SETTINGS = "own_text.json", "settings.yaml"
SPARE = 0.15
"""share of the time that start-up, evaluation and the sample take"""


@dataclass(frozen=True)
class OwnRun:
    """A run on texts of one's own, ready to start."""

    folder: Path
    words: list[str]
    """command line of the run itself"""
    lines: list[str]
    """what was chosen and why"""


def without_own_flags(words: Sequence[str]) -> list[str]:
    """The command line without `--input PATH ...` and `--minutes N`."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word.split("=", 1)[0] in OWN_FLAGS
        if not dropping:
            kept.append(word)
    return kept


def prepare(parsed: ParsedArguments, words: Sequence[str], say: Callable[[str], None]) -> OwnRun:
    """Splits and tokenizes the texts and chooses the run's settings; what an earlier call has made for the same texts
    is taken up. Raises ConfigError, DataError, TokenizerError."""
    started = time.monotonic()
    _check(parsed)
    inputs = [os.path.abspath(path) if os.path.exists(path) else path for path in parsed.inputs]
    rest = without_own_flags(words)
    corpus = _Corpus.read(inputs)
    folder = _folder(parsed, inputs, corpus.fingerprint)
    preset = [] if parsed.has_preset else ["--preset", "tiny-hybrid"]
    command = [*preset, "--config", str(folder / SETTINGS), "--logging.run_dir", str(folder), *rest]
    if (folder / SETTINGS).exists():
        say(f"{folder}: goes on with what is there: the dataset, the tokenizer and {SETTINGS}")
        return OwnRun(folder, command, [])
    say(f"text       {corpus.num_documents:,} documents, {corpus.num_bytes:,} bytes")
    tokenizer = parsed.config.data.tokenizer or _make_tokenizer(inputs, corpus.num_bytes, folder / "data", say)
    tokens = _make_dataset(parsed, inputs, tokenizer, folder / "data", say)
    recipe = recipe_for(tokens, str(folder / "data"), tokenizer, scaled=not parsed.has_preset)
    if parsed.sources["train.steps"] != "command line":
        seconds = _seconds_per_step(recipe, preset, rest)
        left = 60 * parsed.minutes * (1 - SPARE) - (time.monotonic() - started)
        recipe = recipe.with_steps(seconds, left, parsed.minutes)
    write_atomically(folder / SETTINGS, recipe.as_yaml().encode())
    return OwnRun(folder, command, recipe.lines())


def finish(run: OwnRun, prog: str) -> None:
    """The table and picture of every width, the curves, and a sample that goes on from held-out text."""
    from megatron_adamba.commands import evaluate, generate, plot
    from megatron_adamba.data.indexed_dataset import IndexedDataset
    from megatron_adamba.inference.load import load_model

    folder, model = run.folder, str(run.folder / "model")
    held_out = str(parse_arguments(run.words).config.data.validation[0])
    written = ["--json", str(folder / "eval.json"), "--plot", str(folder / "pareto.png")]
    evaluate.COMMAND.main(["--model", model, "--data", held_out, "--max-tokens", "100000", *written], prog)
    curves = ["--metrics", str(folder / "metrics.jsonl"), "--output", str(folder / "curves.png")]
    plot.COMMAND.main(curves, prog)
    ids = IndexedDataset(Path(held_out)).document(0)[:24].tolist()
    prompt = load_model(model).tokenizer.decode(ids).rstrip("\ufffd")
    sample = ["--max-new-tokens", "200", "--output", str(folder / "sample.txt")]
    generate.COMMAND.main(["--model", model, f"--prompt={prompt}", *sample], prog)
    print(f"see {folder}: model, eval.json, pareto.png, curves.png, sample.txt; go on: adamba chat --model {model}")


@dataclass(frozen=True)
class _Corpus:
    num_documents: int
    num_bytes: int
    fingerprint: str

    @staticmethod
    def read(inputs: Sequence[str]) -> _Corpus:
        """Raises DataError."""
        digest, count, size = hashlib.sha256(), 0, 0
        for text, _ in split_documents(inputs, "text", 0.0, LeftOut()):
            content = text.encode("utf-8", errors="replace")
            digest.update(len(content).to_bytes(8, "little") + content)
            count, size = count + 1, size + len(content)
        return _Corpus(count, size, digest.hexdigest())


def _check(parsed: ParsedArguments) -> None:
    """Raises ConfigError."""
    folder_to_write("--logging.run_dir", parsed.config.logging.run_dir)
    if not 0.1 <= parsed.minutes <= 60 * 24 * 365:
        raise ConfigError(f"--minutes {parsed.minutes}: must lie between 0.1 and 525600, for example --minutes 10")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ConfigError(
            "--input: one process prepares the texts; leave the launcher out, or make the dataset with adamba data, "
            "and give --data.train DATA/train --data.validation DATA/validation"
        )
    for name in ("train", "validation"):
        if parsed.sources[f"data.{name}"] == "command line":
            raise ConfigError(f"--data.{name}: the dataset is made from --input; give one of the two")


def _folder(parsed: ParsedArguments, inputs: Sequence[str], fingerprint: str) -> Path:
    """The run folder: the given one, or one named after the first text, of these texts alone. Raises ConfigError."""
    mine = {"inputs": list(inputs), "fingerprint": fingerprint}
    if parsed.sources["logging.run_dir"] != "default":
        folder = Path(parsed.config.logging.run_dir)
        if not _is_for(folder, mine):
            raise ConfigError(f"--logging.run_dir {folder}: holds something else already; for example {folder}-2")
    else:
        name = Path(inputs[0]).name.split(".")[0] or "own"
        folder, number = Path("runs", name), 1
        while not _is_for(folder, mine):
            number += 1
            folder = Path("runs", f"{name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / NOTE, (json.dumps(mine, indent=1) + "\n").encode())
    return folder


def _is_for(folder: Path, mine: dict) -> bool:
    """Whether a run on these texts may use the folder."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return True
    if not (folder / NOTE).is_file():
        return False
    return read_json(folder / NOTE, JsonObject, ConfigError, "move the folder away") == mine


def _make_tokenizer(inputs: Sequence[str], num_bytes: int, folder: Path, say: Callable[[str], None]) -> str:
    """Trains one on the training side, with as many pieces as the text can fill; its file, or `bytes`."""
    from megatron_adamba.data.sentencepiece_training import train_sentencepiece

    wanted = vocab_size_for(num_bytes)
    if wanted is None:
        say("tokenizer  bytes: the text is too short to learn pieces from")
        return "bytes"
    texts = [text for text, held_out in split_documents(inputs, "text", 0.05, LeftOut()) if not held_out]
    file = folder / "tokenizer.model"
    try:
        made = train_sentencepiece(texts, wanted, file)
    except ConfigError as error:
        # scripts of many letters need more pieces, monotonous texts give fewer: the message ends with a number
        fitting = int(str(error).rsplit(" ", 3)[1 if str(error).endswith("or more") else -1])
        made = train_sentencepiece(texts, fitting + 512 if fitting > wanted else fitting, file)
    say(f"tokenizer  {made.vocab_size:,} pieces, trained on the text: {file}")
    return str(file)


def _make_dataset(
    parsed: ParsedArguments, inputs: Sequence[str], tokenizer: str, folder: Path, say: Callable[[str], None]
) -> int:
    """Tokens of the training side."""
    from megatron_adamba.data.preprocess import PreprocessOptions, preprocess

    data = parsed.config.data
    options = PreprocessOptions(tuple(inputs), str(folder), tokenizer, data.eod_token, data.split_pattern, split=True)
    metas, left_out = preprocess(options)
    training, held_out = (metas[str(folder / side)] for side in ("train", "validation"))
    ratio = training.num_bytes / training.num_tokens
    say(
        f"dataset    {training.num_tokens:,} tokens to train on, {held_out.num_tokens:,} held out, "
        f"{ratio:.2f} bytes a token" + (f"; left out: {left_out.described()}" if left_out.described() else "")
    )
    return training.num_tokens


def _seconds_per_step(recipe: Recipe, preset: Sequence[str], rest: Sequence[str]) -> float:
    """Measured: the run itself, for a few steps, in a process and a folder of its own. Raises ConfigError with what
    the run says where it cannot start."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = Path(scratch, SETTINGS)
        settings.write_text(recipe.as_yaml())
        short: dict[str, str | int] = {"train.steps": TIMED_STEPS, "train.eval_interval": 0}
        short |= {"checkpoint.interval": 0, "logging.interval": 1}
        short |= {"optimizer.warmup_steps": 1, "logging.run_dir": f"{scratch}/run", "checkpoint.resume": "never"}
        short |= {"logging.tensorboard": "false", "logging.wandb_project": "null", "data.validation": "[]"}
        command = [sys.executable, "-m", "megatron_adamba", "train", *preset, "--config", str(settings), *rest]
        command += [word for name, value in short.items() for word in (f"--{name}", str(value))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            text = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
            raise _Told(text[-1].removeprefix("error: "), done.returncode)
        rows = [json.loads(line) for line in Path(scratch, "run", "metrics.jsonl").read_text().splitlines()]
    # the first ones compile and warm up; the mean, as steps differ by their widths
    return statistics.mean(row["seconds"] for row in rows[2:])


class _Told(AdambaError):
    """What the run itself said, with its exit code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.exit_code = code if 0 < code < 128 else math.trunc(ConfigError.exit_code)
