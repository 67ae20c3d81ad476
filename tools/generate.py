"""Text from a trained model: at one of its widths, or with widths and exits that it chooses for itself.

python tools/generate.py --model runs/quickstart/model --mode think --prompt "def "
python tools/generate.py --model runs/quickstart/model --mode adaptive --stats --prompt "def "
python tools/generate.py --model runs/quickstart/model --file prompts.txt --output texts.jsonl
python tools/generate.py --model runs/quickstart/model --chat
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from inference_commands.options import add_mode_options, add_sampling_options, chosen_mode, chosen_sampling

from megatron_adamba.config.rules import count, file_to_write
from megatron_adamba.config.script import run_script


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a canonical checkpoint, e.g. RUN/model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to go on from")
    source.add_argument("--file", type=Path, help="prompts, one a line, run side by side")
    source.add_argument("--chat", action="store_true", help="read turns from the terminal; an empty one ends")
    add_mode_options(parser)
    add_sampling_options(parser)
    parser.add_argument("--stats", action="store_true", help="width, exit layer and compute of each token")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts of --file at a time")
    parser.add_argument("--dtype", help="bf16 | fp32; by default bf16 where the machine has it")
    parser.add_argument("--no-verify", action="store_true", help="do not hold tensors against their checksums")
    parser.add_argument("--output", metavar="FILE", help="write the text there too; for --file one JSON object a line")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    args = parse(words)

    from inference_commands.sources import chat, generate_file, generate_prompt

    from megatron_adamba.inference.load import load_model

    count("--batch-size", args.batch_size, 4096)
    count("--max-new-tokens", args.max_new_tokens, 2**24)
    file_to_write("--output", args.output, "sample.txt")
    sampling, mode = chosen_sampling(args), chosen_mode(args)
    sampling.check()
    loaded = load_model(args.model, args.dtype, verify=not args.no_verify)
    run = chat if args.chat else generate_file if args.file else generate_prompt
    run(loaded, args, mode, sampling)
    return 0


if __name__ == "__main__":
    run_script(main)
