"""graft: new Mamba blocks between the old blocks."""

from __future__ import annotations

import argparse

from surgery_commands.jobs import add_job

MAMBA_FLAGS = {
    "mamba_version": "2 (SSD) or 1 (selective scan)",
    "mamba_expand": "inner size in units of the hidden size, where heads are not given",
    "mamba_num_heads": "Mamba-2 heads",
    "mamba_head_dim": "channels of a Mamba-2 head",
    "mamba_num_groups": "Mamba-2 groups that share B and C",
    "mamba_d_state": "state size",
}


def add(commands) -> None:
    command = add_job(commands, "graft", "new Mamba blocks between the old blocks", _plan)
    command.add_argument("--pattern", required=True, help='of all blocks, e.g. "(EEM)x12"')
    command.add_argument("--seed", type=int, default=1234, help="of the new weights")
    for name, text in MAMBA_FLAGS.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)


def _plan(args: argparse.Namespace):
    from megatron_adamba.config.rules import check_seed
    from megatron_adamba.surgery.graft import graft

    check_seed("--seed", args.seed)
    given = {name: value for name in MAMBA_FLAGS if (value := getattr(args, name)) is not None}
    return graft(args.source, args.pattern, given, args.seed)
