#!/usr/bin/env bash
# A model twice as deep as the quickstart's on the same text, then gates behind it; its own choices beside its fixed
# widths: runs/adaptive. After `make quickstart`, whose data and tokenizer it uses.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
run=runs/adaptive
. examples/ranks.sh

rm -rf $run
# What a token leaves behind in the blocks that it skips is cheap for attention and dear for Mamba: Mamba comes early.
$threads deepspeed -q --num_gpus "$ranks" pretrain_adamba.py --preset tiny-hybrid --model.block_pattern "(TM)x3TTTTTT" \
    --model.num_kv_groups 1 --train.phase 2 --train.steps 400 --train.eval_interval 0 --gates.train false \
    --elastic.exit_fraction 0.7 --elastic.mixed_exit_fraction 1 --logging.run_dir $run/backbone
$threads deepspeed -q --num_gpus "$ranks" pretrain_adamba.py --preset tiny-hybrid --config examples/python_stdlib_gates.yaml \
    --checkpoint.init_from $run/backbone/model --logging.run_dir $run
adamba evaluate --model $run/model --data runs/quickstart/data/validation --adaptive --max-tokens 100000 \
    --exit-threshold 0.9 0.95 0.97 0.98 1 --energy-price 0.0005 0.003 0.01 --plot $run/pareto.png --json $run/adaptive.json
