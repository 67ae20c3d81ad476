"""One rank of a process group that stays alive between tests: reads jobs as JSON lines, answers with JSON lines."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback


def main() -> None:
    # libraries print to stdout; answers need a pipe of their own
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

    import torch

    from megatron_adamba.engine.launch import start_distributed, stop_distributed

    torch.set_num_threads(1)
    info = start_distributed()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            function = getattr(importlib.import_module(request["module"]), request["function"])
            answer = {"result": function(info, **request["arguments"])}
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    stop_distributed()


if __name__ == "__main__":
    main()
