"""evaluate-tasks: lm-evaluation-harness with our models: its own command line, and `--model adamba`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_adamba.commands.command import Program
from megatron_adamba.config.script import without_flags
from megatron_adamba.errors import ConfigError


def start(words: Sequence[str], prog: str) -> int:
    try:
        from lm_eval.__main__ import cli_evaluate

        from megatron_adamba.commands import harness  # registers the model
    except ImportError as error:
        raise ConfigError(f"lm-evaluation-harness is not installed ({error}); pip install lm_eval==0.4.13") from None
    assert harness.AdambaLM is not None
    sys.argv[:] = [prog, *words]
    cli_evaluate()
    return 0


COMMAND = Program("benchmarks of lm-evaluation-harness: its command line, with --model adamba", start, without_flags)
