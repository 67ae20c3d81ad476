#!/usr/bin/env bash
# From a nanochat model to a wider elastic hybrid, on a laptop's CPU, in minutes. The nanochat model is a tiny one that
# this script trains itself; with a real one begin at `import` (--checkpoint.init_from takes what import writes).
# Needs the quickstart's data (make quickstart, or bash examples/quickstart_data.sh).
#   bash examples/nanochat_to_adamba.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/nanochat_settings.sh

run nanochat "$steps" 2e-3 $nanochat
$surgery export nanochat "$out/nanochat/model" "$out/published"

$surgery import nanochat "$out/published" "$out/imported" --widths "$widths" --tokenizer "$data/tokenizer.model"
$surgery reorder "$out/imported" "$out/reordered" --data "$data/train" --tokens "$tokens" --seq-len 256
$surgery compare "$out/imported" "$out/reordered" --data "$data/validation" --tokens 8192
$surgery graft "$out/reordered" "$out/grafted" $graft
run phase-1 $phase_1 --checkpoint.init_from "$out/grafted"
run phase-2 $phase_2 --checkpoint.init_from "$out/phase-1/model"
$surgery expand "$out/phase-2/model" "$out/expanded" --hidden "$wider"
$surgery compare "$out/phase-2/model" "$out/expanded" --data "$data/validation" --tokens 8192
run phase-3 $phase_3 --checkpoint.init_from "$out/expanded"

for width in ${widths//,/ } "$wider"; do
    $surgery extract "$out/phase-3/model" "$out/extracted-$width" --width "$width"
    adamba evaluate --model "$out/extracted-$width" --data "$data/validation" --max-tokens "$scored" \
        --json "$out/eval-$width.json"
done
adamba evaluate --model "$out/phase-3/model" --data "$data/validation" --max-tokens "$scored" --exits \
    --json "$out/eval.json" --plot "$out/pareto.png"
adamba plot --output "$out/road.png" \
    --metrics "$out"/{nanochat,phase-1,phase-2,phase-3}/metrics.jsonl
echo "see $out: road.png, pareto.png, eval.json"
