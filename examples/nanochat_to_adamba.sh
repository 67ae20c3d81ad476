#!/usr/bin/env bash
# From a nanochat model to a wider elastic hybrid, on a laptop's CPU, in minutes. The nanochat model is a tiny one that
# this script trains itself; with a real one begin at `import` (--checkpoint.init_from takes what import writes).
# Needs the quickstart's data (make quickstart, or bash examples/quickstart_data.sh).
#   bash examples/nanochat_to_adamba.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=${1:-runs/nanochat-to-adamba} data=${DATA:-runs/quickstart/data} steps=${STEPS:-300}
hidden=${HIDDEN:-128} wider=${WIDER:-192} widths=${WIDTHS:-32,64,128} tokens=${CALIBRATION_TOKENS:-32768}
scored=${EVALUATION_TOKENS:-65536}
surgery="python tools/surgery.py"
nanochat="--model.hidden_size $hidden --model.block_pattern Tx4 --model.head_dim $((hidden / 4)) --model.norm_weight false
    --model.embedding_norm true --model.rope_sign -1 --model.norm_eps 1.1920929e-7 --model.logit_softcap 15
    --data.tokenizer $data/tokenizer.model"
sandwich="--elastic.width_sampling sandwich --elastic.plans_per_step 1"

# run NAME STEPS LEARNING_RATE SETTING ...: two processes; what it learned is in $out/NAME/model
run() {
    echo "== $1"
    deepspeed -q --num_gpus 2 pretrain_adamba.py --logging.run_dir "$out/$1" --train.steps "$2" --optimizer.lr "$3" \
        --optimizer.warmup_steps $(($2 / 10)) --optimizer.schedule wsd --checkpoint.interval 0 --train.seq_len 256 \
        --train.global_batch_size 16 --train.micro_batch_size 8 --data.train "[$data/train]" \
        --data.validation "[$data/validation]" --train.eval_interval $(($2 / 4)) "${@:4}" ${RUN_SETTINGS:-}
}

run nanochat "$steps" 2e-3 $nanochat
$surgery export nanochat "$out/nanochat/model" "$out/published"

$surgery import nanochat "$out/published" "$out/imported" --widths "$widths" --tokenizer "$data/tokenizer.model"
$surgery reorder "$out/imported" "$out/reordered" --data "$data/train" --tokens "$tokens" --seq-len 256
$surgery compare "$out/imported" "$out/reordered" --data "$data/validation" --tokens 8192
$surgery graft "$out/reordered" "$out/grafted" --pattern "(TTM)x2" --mamba-head-dim 32
run phase-1 $((steps / 3)) 2e-3 --train.phase 1 --checkpoint.init_from "$out/grafted"
run phase-2 "$steps" 1e-3 --train.phase 2 --checkpoint.init_from "$out/phase-1/model" $sandwich
$surgery expand "$out/phase-2/model" "$out/expanded" --hidden "$wider"
$surgery compare "$out/phase-2/model" "$out/expanded" --data "$data/validation" --tokens 8192
run phase-3 $((steps * 2 / 3)) 1e-3 --train.phase 3 --checkpoint.init_from "$out/expanded" $sandwich

for width in ${widths//,/ } "$wider"; do
    $surgery extract "$out/phase-3/model" "$out/extracted-$width" --width "$width"
    python tools/evaluate.py --model "$out/extracted-$width" --data "$data/validation" --max-tokens "$scored" \
        --json "$out/eval-$width.json"
done
python tools/evaluate.py --model "$out/phase-3/model" --data "$data/validation" --max-tokens "$scored" --exits \
    --json "$out/eval.json" --plot "$out/pareto.png"
python tools/plot_metrics.py --output "$out/road.png" \
    --metrics "$out"/{nanochat,phase-1,phase-2,phase-3}/metrics.jsonl
echo "see $out: road.png, pareto.png, eval.json"
