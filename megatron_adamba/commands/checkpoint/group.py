"""checkpoint: convert, show, check and compare checkpoints, in one process and without a job."""

from __future__ import annotations

from megatron_adamba.commands.checkpoint import convert, diff, inspect, verify
from megatron_adamba.commands.command import Group

COMMAND = Group(
    "convert, show, check and compare checkpoints",
    {"convert": convert.COMMAND, "inspect": inspect.COMMAND, "verify": verify.COMMAND, "diff": diff.COMMAND},
    details="""In one process and without a job; one tensor is in memory at a time. A checkpoint is a
canonical folder (RUN/model), a training checkpoint (RUN/checkpoints/step-00000200), or
RUN/checkpoints, which means the latest in it. Exit codes: 0 good or identical, 1
different, 2 wrong flags, 5 damaged, 6 disk full.""",
    examples=(
        "adamba checkpoint convert RUN/checkpoints MODEL",
        "adamba checkpoint inspect RUN/checkpoints/step-00000200",
        "adamba checkpoint verify RUN/model",
        "adamba checkpoint diff RUN/checkpoints RUN/model",
    ),
)
