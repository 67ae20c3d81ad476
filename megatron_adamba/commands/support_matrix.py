"""support-matrix: what combines with what."""

from __future__ import annotations

from argparse import Namespace

from megatron_adamba.commands.command import Command


def run(_: Namespace) -> int:
    from megatron_adamba.blueprint.support import support_table

    print(support_table())
    return 0


COMMAND = Command("what combines with what", lambda parser: None, run)
