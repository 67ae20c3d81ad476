"""expand: more channels around the old ones."""

from __future__ import annotations

from argparse import Namespace

from megatron_adamba.commands.surgery.jobs import job_command
from megatron_adamba.config.parser import CommandParser

SIZE_FLAGS = {
    "num_kv_groups": "KV groups of the wider model",
    "ffn_size": "rows of its MLPs",
    "expert_ffn_size": "rows of its experts",
    "mamba_num_groups": "groups of its Mamba-2 mixers",
}


def add_options(parser: CommandParser) -> None:
    parser.add_argument("--hidden", type=int, required=True, help="channels of the wider model")
    text = "more KV groups of the old head_dim, or larger heads (the same logits where there is no QK-norm)"
    parser.add_argument("--heads", choices=("add-heads", "grow-dim"), default="add-heads", help=text)
    parser.add_argument("--rank", type=int, default=16, help="of new weights that read: A @ B")
    parser.add_argument("--std", type=float, default=0.01, help="standard deviation of A")
    parser.add_argument("--seed", type=int, default=1234, help="of new weights")
    for name, text in SIZE_FLAGS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, help=f"{text}; in proportion to --hidden by default")


def _plan(args: Namespace):
    from megatron_adamba.config.rules import check_seed, count, in_range
    from megatron_adamba.surgery.expand import Noise, expand
    from megatron_adamba.surgery.expand_config import Sizes

    count("--hidden", args.hidden, 2**24)
    count("--rank", args.rank, 2**16)
    in_range("--std", args.std, 0, 1e6)
    check_seed("--seed", args.seed)
    sizes = Sizes(**{name: getattr(args, name) for name in SIZE_FLAGS})
    return expand(args.source, args.hidden, args.heads, Noise(args.rank, args.std, args.seed), sizes)


COMMAND = job_command(
    "a wider model that computes what the source does",
    _plan,
    add_options,
    examples=("adamba surgery expand runs/hybrid runs/hybrid-2560 --hidden 2560",),
)
