#!/usr/bin/env bash
# GPT-OSS as published (OpenAI's original/ or transformers' folder, bf16 or MXFP4) to a canonical checkpoint.
#   bash examples/gpt_oss/import.sh gpt-oss-20b/original runs/gpt-oss-20b
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: bash examples/gpt_oss/import.sh SOURCE MODEL [surgery flags]" >&2; exit 2; }
export PATH="$(dirname "$0")/../../.venv/bin:$PATH"
adamba surgery import gpt-oss "$@"
adamba checkpoint verify "$2"
