#!/usr/bin/env bash
# Tasks of graded difficulty: data, a model, its gates, and whether it thinks where it has to. Two hours and
# more on two CPU cores; everything lands in runs/difficulty. `run.sh --resume auto` goes on where an earlier try stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
run=runs/difficulty
data=$run/data
. examples/ranks.sh

[ $# -gt 0 ] || rm -rf $run/{backbone,checkpoints,model}
python examples/difficulty/tasks.py --output $data
adamba data --input $data/train.jsonl --tokenizer bytes --output $data/all --split --validation-fraction 0.002
train="$threads deepspeed -q --num_gpus $ranks pretrain_adamba.py --config examples/difficulty/model.yaml $*"
$train
$train --config examples/difficulty/gates.yaml
python examples/difficulty/evaluate.py --model $run/model --data $data --json $run/adaptive.json
