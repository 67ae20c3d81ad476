"""Text from a trained model at one of its widths.

python tools/generate.py --model runs/quickstart/model --mode think --prompt "def "
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_adamba.config.script import run_script
from megatron_adamba.errors import ConfigError
from megatron_adamba.files import write_atomically


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a canonical checkpoint, e.g. RUN/model")
    parser.add_argument("--prompt", required=True, help="text to go on from")
    parser.add_argument("--mode", default="think", help="ghost | whisper | normal | think")
    parser.add_argument("--width", type=int, help="a width of the nest instead of a mode")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int, default=0, help="0 turns it off")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bf16", help="bf16 | fp32")
    parser.add_argument("--output", metavar="FILE", help="write prompt and text there too")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    args = parse(words)

    import torch

    from megatron_adamba.blueprint.nest import mode_width
    from megatron_adamba.elastic.plan import uniform_plan
    from megatron_adamba.inference.generate import Sampling, generate
    from megatron_adamba.inference.load import load_model

    if not args.prompt:
        raise ConfigError('--prompt: is empty; for example --prompt "def "')
    loaded = load_model(args.model, args.dtype)
    config = loaded.model.config
    width = args.width if args.width is not None else mode_width(config, args.mode)
    plan = uniform_plan(config, width)
    # documents begin behind an end-of-document token, in training and here
    ids = [loaded.tokenizer.eod_id, *loaded.tokenizer.encode(args.prompt)]
    prompt = torch.tensor([ids], device=loaded.device)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    start, made = time.perf_counter(), []
    for tokens in generate(loaded.model, prompt, plan, args.max_new_tokens, sampling, loaded.tokenizer.eod_id):
        made.append(int(tokens[0]))
    seconds = time.perf_counter() - start
    text = loaded.tokenizer.decode(ids[1:] + made)
    print(text)
    print(f"[width {width}, {len(made)} tokens, {len(made) / seconds:.1f} tokens/s]", file=sys.stderr)
    if args.output:
        write_atomically(Path(args.output), (text + "\n").encode())
    return 0


if __name__ == "__main__":
    run_script(main)
