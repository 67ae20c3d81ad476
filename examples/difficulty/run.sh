#!/usr/bin/env bash
# Tasks of graded difficulty: data, training with gates, and whether the model thinks where it has to. About 40 minutes on two
# CPU cores; everything lands in runs/difficulty.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
run=runs/difficulty
data=$run/data
. examples/ranks.sh

rm -rf $run/checkpoints $run/model
python examples/difficulty/tasks.py --output $data
python tools/preprocess_data.py --input $data/train.jsonl --tokenizer bytes --output $data/all --split --validation-fraction 0.002
$threads deepspeed -q --num_gpus "$ranks" pretrain_adamba.py --config examples/difficulty/model.yaml
python examples/difficulty/evaluate.py --model $run/model --data $data --json $run/adaptive.json
