#!/usr/bin/env bash
# The whole product once, in minutes: real text, a tokenizer, a tiny elastic hybrid, its loss at every width, generated text.
# Everything lands in runs/quickstart. Run it through `make quickstart`, or by hand after `make setup`.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
run=runs/quickstart
data=$run/data
. examples/ranks.sh

# what an earlier quickstart left would be in the way of a fresh start
rm -rf $run/checkpoints $run/model
bash examples/quickstart_data.sh
$threads deepspeed -q --num_gpus "$ranks" pretrain_adamba.py --preset tiny-hybrid
adamba evaluate --model $run/model --data $data/validation --json $run/eval.json --plot $run/pareto.png
adamba plot --metrics $run/metrics.jsonl --output $run/curves.png
adamba generate --model $run/model --mode think --prompt "def " --max-new-tokens 200 --output $run/sample.txt
adamba compare-with-xz --eval $run/eval.json --data $data/validation --tokenizer $data/tokenizer.model
echo "see $run: metrics.jsonl, eval.json, pareto.png, curves.png, sample.txt"
