"""lm-evaluation-harness with our models: its own command line, and `--model adamba`.

python tools/evaluate_tasks.py run --model adamba --model_args pretrained=runs/difficulty/model,mode=adaptive \
    --include_path examples/difficulty/lm_eval --tasks difficulty_hard
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_adamba.config.script import run_script, without_flags
from megatron_adamba.errors import ConfigError


def main(words: list[str]) -> int:
    try:
        from inference_commands import harness  # registers the model
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ConfigError(f"lm-evaluation-harness is not installed ({error}); pip install lm_eval==0.4.13") from None
    assert harness.AdambaLM is not None
    sys.argv[1:] = words
    cli_evaluate()
    return 0


if __name__ == "__main__":
    run_script(main, without_flags)
