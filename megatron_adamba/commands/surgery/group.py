"""surgery: operations on checkpoints that keep what the model computes."""

from __future__ import annotations

from megatron_adamba.commands.command import Group
from megatron_adamba.commands.surgery import compare, expand, extract, graft, merge_average, published, reorder

COMMAND = Group(
    "operations on checkpoints that keep what the model computes",
    {
        "import": published.IMPORT,
        "graft": graft.COMMAND,
        "expand": expand.COMMAND,
        "reorder": reorder.COMMAND,
        "extract": extract.COMMAND,
        "merge-average": merge_average.COMMAND,
        "compare": compare.COMMAND,
        "export": published.EXPORT,
    },
    details="Each streams tensor by tensor from one folder into a new one.",
    examples=(
        "adamba surgery import gpt-oss gpt-oss-20b/original runs/gpt-oss-20b",
        'adamba surgery graft runs/gpt-oss-20b runs/hybrid --pattern "(EEM)x12" --mamba-num-heads 256',
        "adamba surgery extract runs/hybrid runs/hybrid-720 --width 720",
        "adamba surgery export hf runs/gpt-oss-20b runs/gpt-oss-20b-hf",
    ),
)
