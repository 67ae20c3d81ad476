"""A pipeline of which one stage fails, as a launcher starts it: failing_stage.py raises|dies RANK [SCHEDULE]."""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))


def main(how: str, at: int, schedule: str) -> None:
    from pipeline_jobs import fails_in_the_middle

    from megatron_adamba.engine.launch import lost_ranks_named, start_distributed
    from megatron_adamba.errors import LostRankError

    info = start_distributed()
    arguments = {"pattern": "TMTM", "sampling": "full"}
    try:
        with lost_ranks_named(info):
            fails_in_the_middle(info, arguments, how, at, pp=2, schedule=schedule)
    except LostRankError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    main(words[0], int(words[1]), words[2])
