"""One rank of a process group that stays alive between tests: reads jobs as JSON lines, answers with JSON lines."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import traceback

PR_SET_PDEATHSIG = 1
"""Linux's prctl(2): a signal for when the parent ends"""


def clean_up(kept: set) -> None:
    """End what the last job left: engines, which DeepSpeed keeps alive by hooks, and process groups, each of which
    would wake this process a hundred times a second. What DeepSpeed keeps for the next engine stays."""
    import torch.distributed as dist
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.utils import groups

    for thing in gc.get_objects():
        if issubclass(type(thing), DeepSpeedEngine):
            thing.destroy()
    held = list(vars(groups).values())
    held += [value for entry in held if isinstance(entry, dict) for value in entry.values()]
    deepspeeds = {entry for entry in held if isinstance(entry, dist.ProcessGroup)}
    for group in set(dist.distributed_c10d._world.pg_map) - kept - deepspeeds:
        dist.destroy_process_group(group)
    gc.collect()


def main() -> None:
    # between jobs the ranks are stopped, and would outlive tests that are killed
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # libraries print to stdout; answers need a pipe of their own
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

    import torch
    import torch.distributed as dist

    from megatron_adamba.engine.launch import start_distributed, stop_distributed

    torch.set_num_threads(1)
    info = start_distributed()
    kept = set(dist.distributed_c10d._world.pg_map)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            function = getattr(importlib.import_module(request["module"]), request["function"])
            answer = {"result": function(info, **request["arguments"])}
            clean_up(kept)
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    stop_distributed()


if __name__ == "__main__":
    main()
