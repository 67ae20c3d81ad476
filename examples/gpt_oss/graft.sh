#!/usr/bin/env bash
# Mamba blocks into an imported GPT-OSS; the logits stay what they were. The default is the preset gpt-oss-20b-hybrid.
#   bash examples/gpt_oss/graft.sh runs/gpt-oss-20b runs/gpt-oss-20b-hybrid
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: bash examples/gpt_oss/graft.sh MODEL HYBRID [surgery flags]" >&2; exit 2; }
export PATH="$(dirname "$0")/../../.venv/bin:$PATH"
mamba=()
[ $# -gt 2 ] || mamba=(--pattern "(EEM)x12" --mamba-num-heads 256 --mamba-num-groups 8)
adamba surgery graft "$@" "${mamba[@]}"
adamba checkpoint verify "$2"
