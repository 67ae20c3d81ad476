"""graft: new Mamba blocks between the old blocks."""

from __future__ import annotations

from argparse import Namespace

from megatron_adamba.commands.surgery.jobs import job_command
from megatron_adamba.config.parser import CommandParser

MAMBA_FLAGS = {
    "mamba_version": "2 (SSD) or 1 (selective scan)",
    "mamba_expand": "inner size in units of the hidden size, where heads are not given",
    "mamba_num_heads": "Mamba-2 heads",
    "mamba_head_dim": "channels of a Mamba-2 head",
    "mamba_num_groups": "Mamba-2 groups that share B and C",
    "mamba_d_state": "state size",
}


def add_options(parser: CommandParser) -> None:
    parser.add_argument("--pattern", required=True, help='of all blocks, e.g. "(EEM)x12"')
    parser.add_argument("--seed", type=int, default=1234, help="of the new weights")
    for name, text in MAMBA_FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=text)


def _plan(args: Namespace):
    from megatron_adamba.config.rules import check_seed
    from megatron_adamba.surgery.graft import graft

    check_seed("--seed", args.seed)
    given = {name: value for name in MAMBA_FLAGS if (value := getattr(args, name)) is not None}
    return graft(args.source, args.pattern, given, args.seed)


COMMAND = job_command(
    "new Mamba blocks between the old blocks",
    _plan,
    add_options,
    examples=('adamba surgery graft runs/gpt-oss-20b runs/hybrid --pattern "(EEM)x12" --mamba-num-heads 256',),
)
