"""train: the whole of a training run, on each of its ranks."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_adamba.commands.command import Program
from megatron_adamba.config.cli import ParsedArguments, parse_arguments
from megatron_adamba.config.script import INTERRUPTED, leave
from megatron_adamba.engine.environment import first_rank, tells_before_ranks_meet
from megatron_adamba.errors import AdambaError, TokenizerError
from megatron_adamba.files import as_user_error


def start(words: Sequence[str], prog: str) -> int:
    """Returns the exit code; what fails is told here, by the rank that has to."""
    # torch prints a C++ stack where a peer's store is gone; what that means is said in one line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    told = lambda error: tells_before_ranks_meet(str(error))
    try:
        parsed = parse_arguments(words, prog)
        if parsed.print_config or parsed.summary:
            return show_config(parsed)
        return train_on_own_text(parsed, words, prog) if parsed.inputs else train(parsed)
    except AdambaError as error:
        return fail(error, told(error))
    except OSError as error:
        found = as_user_error(error, str(error.filename or "writing"))
        if found is None:
            raise
        return fail(found, told(found))
    except KeyboardInterrupt:
        return fail(Interrupted("interrupted; nothing was saved"), first_rank())


class Interrupted(AdambaError):
    """Ctrl-C where nothing is there to be saved yet, or a second one, which does not wait for that."""

    exit_code = INTERRUPTED


def fail(error: AdambaError, tell: bool) -> int:
    """One line: on stderr, or in the log of a rank whose trouble another one tells. Where the first rank, whose machine
    is the one that people look at, has not failed so, rank and machine are named."""
    line = f"error: {' '.join(str(error).split())}"
    if tell and not first_rank() and "(on rank " not in line:
        line += f" (on rank {os.environ.get('RANK', '?')}, {socket.gethostname()})"
    if tell:
        with contextlib.suppress(BrokenPipeError):
            print(line, file=sys.stderr, flush=True)
    if (logger := logging.getLogger("megatron_adamba")).handlers:
        logger.error(line)
    return error.exit_code


def show_config(parsed: ParsedArguments) -> int:
    from megatron_adamba.blueprint.compat import micro_steps
    from megatron_adamba.blueprint.resolve import resolve_model
    from megatron_adamba.blueprint.stages import plan_stages
    from megatron_adamba.data.tokenizer import load_tokenizer
    from megatron_adamba.data.tokenizer_options import RUN_FLAGS
    from megatron_adamba.training.progress import RunConsole
    from megatron_adamba.training.report import print_config, print_stages, print_summary

    config = parsed.config
    vocab_size, data = config.model.vocab_size, config.data
    if vocab_size is None:
        try:
            tokenizer = load_tokenizer(data.tokenizer or "bytes", data.eod_token, data.split_pattern, flags=RUN_FLAGS)
            vocab_size = tokenizer.vocab_size
        except TokenizerError:
            # it may be made later; parameters cannot be counted without it
            if parsed.summary:
                raise
    model = resolve_model(config.model, vocab_size or 1)
    # marks of pipeline stages are the user's
    marked = "|" in str(config.model.block_pattern)
    pattern = config.model.block_pattern if marked else model.block_pattern
    model = replace(model, vocab_size=vocab_size)
    shown = replace(model, block_pattern=pattern)
    sources = dict(parsed.sources)
    for name, value in vars(shown).items():
        if getattr(config.model, name) != value:
            sources[f"model.{name}"] = f"derived from {sources[f'model.{name}']}"
    console = RunConsole()
    if parsed.print_config:
        print_config(console, replace(config, model=shown), sources)
    if parsed.summary:
        print_summary(console, model, config.train)
        if config.parallel.pp > 1:
            stages = plan_stages(model, config.parallel, config.train.seq_len, config.model.block_pattern)
            print_stages(console, model, stages, config.train, micro_steps(config))
    return 0


def train_on_own_text(parsed: ParsedArguments, words: Sequence[str], prog: str) -> int:
    from megatron_adamba.commands.own_text import finish, prepare
    from megatron_adamba.training.progress import RunConsole

    console = RunConsole()
    say = lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)
    own = prepare(parsed, words, say)
    for line in own.lines:
        say(line)
    code = train(parse_arguments(own.words, prog))
    if code == 0:
        finish(own, prog)
    return code


def train(parsed: ParsedArguments) -> int:
    from megatron_adamba.training.job import run_job
    from megatron_adamba.training.progress import RunConsole
    from megatron_adamba.training.report import print_rows

    codes: list[int] = []
    # rank 0 alone shows how it goes
    console = RunConsole(quiet=not first_rank())
    try:
        done = run_job(parsed, console, lambda error, tell: codes.append(fail(error, tell)))
    except KeyboardInterrupt:
        found = what_is_saved(Path(parsed.config.logging.run_dir))
        return fail(Interrupted(f"interrupted; {found}"), first_rank())
    if done is None:
        return codes[0]
    if done.rows:
        print_rows(console, done.rows)
    console.print(f"model written to {done.folder / 'model'}", highlight=False)
    return 0


def what_is_saved(run_dir: Path) -> str:
    """For the user who did not wait for it to be done."""
    from megatron_adamba.checkpoint.training import latest_checkpoint

    try:
        found = latest_checkpoint(run_dir / "checkpoints")
    except AdambaError as error:
        return f"nothing was saved ({error})"
    return f"the last checkpoint is {found}; go on with --resume auto" if found else "nothing was saved"


COMMAND = Program("train an elastic hybrid model, on one process or many ranks", start, leave=leave)
