#!/usr/bin/env bash
# A phase of training; experts are spread over the ranks of a node. Started again, an interrupted run goes on.
# 1: the grafted Mamba layers train, all else stays as it was. 2: everything trains, experts nested, exits too.
#   bash examples/gpt_oss/phase.sh 1 runs/gpt-oss-20b-hybrid runs/own/data runs/gpt-oss-20b-phase1
#   bash examples/gpt_oss/phase.sh 2 runs/gpt-oss-20b-phase1/model runs/own/data runs/gpt-oss-20b-phase2
# DATA holds train.bin and validation.bin, made with the model's own tokenizer:
#   adamba data --tokenizer MODEL/tokenizer.json --input TEXTS --output DATA --split
set -euo pipefail
usage="usage: [RANKS=8] bash examples/gpt_oss/phase.sh 1|2 MODEL DATA RUN [settings]"
[ $# -ge 4 ] && [[ $1 =~ ^[12]$ ]] || { echo "$usage" >&2; exit 2; }
here=$(dirname "$0") phase=$1 model=$2 data=$3 run=$4
export PATH="$here/../../.venv/bin:$PATH"
shift 4
# with everything training, gradients are cut as the optimizer's state is: 57 GB a GPU without activations, not 75
ds_config=$([ "$phase" = 1 ] && echo zero1 || echo zero2)
ranks=${RANKS:-8}
deepspeed -q --num_gpus "$ranks" --master_port "${MASTER_PORT:-29500}" "$here/../../pretrain_adamba.py" \
    --config "${SETTINGS:-$here/phase$phase.yaml}" --deepspeed_config "$ds_config" --parallel.ep "$ranks" \
    --checkpoint.init_from "$model" --logging.run_dir "$run" --resume auto \
    --data.train "[$data/train]" --data.validation "[$data/validation]" "$@"
