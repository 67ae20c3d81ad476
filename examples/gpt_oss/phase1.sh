#!/usr/bin/env bash
# Phase 1: the grafted Mamba layers train, all else stays as it was. Experts are spread over the ranks of a node.
# Started again, an interrupted run goes on.
#   bash examples/gpt_oss/phase1.sh runs/gpt-oss-20b-hybrid runs/own/data runs/gpt-oss-20b-phase1
# DATA holds train.bin and validation.bin, made with the model's own tokenizer:
#   python tools/preprocess_data.py --tokenizer HYBRID/tokenizer.json --input TEXTS --output DATA --split
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: [RANKS=8] bash examples/gpt_oss/phase1.sh HYBRID DATA RUN [settings]" >&2; exit 2; }
here=$(dirname "$0")
export PATH="$here/../../.venv/bin:$PATH"
hybrid=$1 data=$2 run=$3
shift 3
deepspeed -q --num_gpus "${RANKS:-8}" "$here/../../pretrain_adamba.py" --config "${SETTINGS:-$here/phase1.yaml}" \
    --checkpoint.init_from "$hybrid" --parallel.ep "${RANKS:-8}" --logging.run_dir "$run" \
    --data.train "[$data/train]" --data.validation "[$data/validation]" --resume auto "$@"
