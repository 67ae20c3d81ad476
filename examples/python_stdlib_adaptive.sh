#!/usr/bin/env bash
# A model twice as deep as the quickstart's on the same text, with exits and gates; its own choices beside its fixed
# widths: runs/adaptive. After `make quickstart`, whose data and tokenizer it uses.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
run=runs/adaptive
. examples/ranks.sh

rm -rf $run/checkpoints $run/model
$threads deepspeed -q --num_gpus "$ranks" pretrain_adamba.py --preset tiny-hybrid --model.block_pattern "(TM)x6" \
    --train.phase 2 --train.steps 360 --train.eval_interval 0 --elastic.exit_fraction 0.7 --elastic.mixed_exit_fraction 0.5 \
    --gates.target signed --gates.loss deviance --gates.positions 64 --gates.warmup_steps 50 --logging.run_dir $run
python tools/evaluate.py --model $run/model --data runs/quickstart/data/validation --adaptive --max-tokens 20000 \
    --exit-threshold 0.8 0.9 0.95 0.98 1 --energy-price 0.02 0.1 0.3 --plot $run/pareto.png --json $run/adaptive.json
