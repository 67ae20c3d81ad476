"""What adamba generate goes on from: one prompt, a file of them, a conversation."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_adamba.errors import ConfigError, DataError
from megatron_adamba.files import write_atomically
from megatron_adamba.inference.compute import ComputeMeter
from megatron_adamba.inference.generate import Generation, GenerationRequest, NewToken
from megatron_adamba.inference.load import LoadedModel
from megatron_adamba.inference.modes import Mode
from megatron_adamba.inference.policy import ComputePolicy
from megatron_adamba.inference.sampling import Sampling
from megatron_adamba.inference.text_stream import clean_text
from megatron_adamba.schema import read_regular


def generate_prompt(loaded: LoadedModel, args: Namespace, mode: Mode, sampling: Sampling) -> None:
    """Shows the text as it comes."""
    if not args.prompt:
        raise ConfigError('--prompt: is empty; for example --prompt "def "')
    prompt = clean_text(args.prompt)
    request = _request(loaded, args, mode, sampling, prompt)
    generation = Generation(loaded, 1, len(request.prompt) + request.max_new_tokens)
    start, text = time.perf_counter(), prompt
    news: list[NewToken] = []
    for new in _one(generation, request):
        print(new.text if news else prompt + new.text, end="", flush=True)
        text += new.text
        news.append(new)
    print()
    seconds = time.perf_counter() - start
    _print_summary(loaded, mode, request, news, seconds)
    if args.stats:
        print_tokens(Console(stderr=True), loaded, request.policy, news)
    if args.output:
        write_atomically(Path(args.output), (text + "\n").encode())


def generate_file(loaded: LoadedModel, args: Namespace, mode: Mode, sampling: Sampling) -> None:
    """Prompts side by side; a finished one makes room for the next. The texts keep the file's order."""
    try:
        prompts = read_regular(args.file, DataError, "give a text file").decode().splitlines()
    except (DataError, UnicodeDecodeError) as error:
        raise DataError(f"--file {args.file}: cannot be read as text ({error})") from None
    if not prompts or not all(prompts):
        raise DataError(f"--file {args.file}: holds an empty line, or none; give a prompt a line")
    requests = [_request(loaded, args, mode, sampling, prompt) for prompt in prompts]
    longest = max(len(request.prompt) for request in requests) + args.max_new_tokens
    generation = Generation(loaded, min(args.batch_size, len(requests)), longest)
    texts, waiting = [""] * len(prompts), list(range(len(prompts)))
    exits: list[list[int]] = [[] for _ in prompts]
    places: dict[int, int] = {}
    start = time.perf_counter()
    while waiting or generation.running:
        news = []
        while waiting and generation.free:
            place = waiting.pop(0)
            sequence, new = generation.add(requests[place])
            places[sequence.number] = place
            news.append(new)
        for new in news + generation.step():
            texts[places[new.number]] += new.text
            exits[places[new.number]].append(new.exit_layer)
    seconds = time.perf_counter() - start
    rows = [
        json.dumps({"prompt": prompt, "text": text, "exit_layers": layers}, ensure_ascii=False)
        for prompt, text, layers in zip(prompts, texts, exits)
    ]
    if args.output:
        write_atomically(Path(args.output), ("\n".join(rows) + "\n").encode())
    else:
        print("\n".join(rows))
    made = sum(map(len, exits))
    print(f"[{len(prompts)} prompts, {made} tokens, {made / seconds:.1f} tokens/s]", file=sys.stderr)


def chat(loaded: LoadedModel, args: Namespace, mode: Mode, sampling: Sampling) -> None:
    """Turns from standard input; each goes on with the caches of those before, at widths of its own."""
    capacity = 4096
    generation = Generation(loaded, 1, capacity)
    number = None
    for turn in _turns():
        request = _request(loaded, args, mode, sampling, turn, first=number is None)
        start, news = time.perf_counter(), []
        for new in _one(generation, request, number):
            print(new.text, end="", flush=True)
            news.append(new)
            number = new.number
        print()
        _print_summary(loaded, mode, request, news, time.perf_counter() - start)
        if args.stats:
            print_tokens(Console(stderr=True), loaded, request.policy, news)


def _turns() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        # bytes that are no UTF-8, and halves of pairs, are cleaned as everywhere
        stream = getattr(sys.stdin, "buffer", None)
        line = sys.stdin.readline() if stream is None else stream.readline().decode(errors="replace")
        if not line.strip():
            return
        yield clean_text(line)


def _request(
    loaded: LoadedModel, args: Namespace, mode: Mode, sampling: Sampling, text: str, first: bool = True
) -> GenerationRequest:
    # documents begin behind an end-of-document token, in training and here
    ids = [loaded.tokenizer.eod_id] * first + loaded.tokenizer.encode(text)
    policy = mode.policy(loaded, ids)
    return GenerationRequest(tuple(ids), policy, args.max_new_tokens, sampling, tuple(args.stop))


def _one(generation: Generation, request: GenerationRequest, number: int | None = None) -> Iterator[NewToken]:
    new = generation.add(request)[1] if number is None else generation.go_on(number, request)
    yield new
    while generation.running:
        yield from generation.step()


def _print_summary(
    loaded: LoadedModel, mode: Mode, request: GenerationRequest, news: list[NewToken], seconds: float
) -> None:
    config = loaded.model.config
    meter = ComputeMeter(config, request.policy, len(request.prompt) + len(news), mode.asks_estimator(loaded))
    layers = [new.exit_layer for new in news]
    spent = meter.total(layers, [new.widened_at for new in news])
    widths = request.policy.plan.widths
    low, high = min(widths), max(widths)
    parts = [f"width {low}" if low == high else f"widths {low} to {high}", f"{len(news)} tokens"]
    if request.policy.adaptive is not None:
        parts.append(f"left behind block {sum(layers) / len(layers):.1f} of {config.num_layers} on average")
    parts.append(f"{1 - spent / (meter.full * len(news)):.0%} of their compute saved")
    parts.append(f"{len(news) / seconds:.1f} tokens/s")
    print(f"[{', '.join(parts)}]", file=sys.stderr)


def print_tokens(console: Console, loaded: LoadedModel, policy: ComputePolicy, news: list[NewToken]) -> None:
    meter = ComputeMeter(loaded.model.config, policy, max(len(news), 1))
    depth = loaded.model.config.num_layers
    table = Table(title="compute of each token")
    table.add_column("token", overflow="fold")
    for name in ("exit layer", "mean width", "widened at", "compute saved"):
        table.add_column(name, justify="right", no_wrap=True)
    for new in news:
        table.add_row(
            # no markup: a model may well write brackets
            Text(repr(loaded.tokenizer.decode([new.token]))),
            str(new.exit_layer),
            f"{meter.mean_width(new.exit_layer, new.widened_at):.0f}",
            "" if new.widened_at == depth else str(new.widened_at),
            f"{1 - meter.of(new.exit_layer, new.widened_at) / meter.full:.0%}",
        )
    console.print(table)
