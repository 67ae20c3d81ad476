#!/usr/bin/env bash
# What reordering and trained exits did on the road of nanochat_to_adamba.sh, beside what happens without them: the same
# steps on the same tokens. Needs that script's folder.
#   bash examples/nanochat_comparisons.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/nanochat_settings.sh
validation="--data $data/validation --max-tokens $scored"

# score NAME MODEL: losses at every width into $out/scores/NAME.json, on text that no order was chosen on
score() {
    mkdir -p "$out/scores"
    adamba evaluate --model "$out/$2" $validation --dtype fp32 --json "$out/scores/$1.json" "${@:3}" > "$out/scores/$1.txt"
}

echo "== before phase 1: as imported, reordered, each kind alone, random orders"
score imported imported
score reordered reordered
for kind in hidden ffn heads; do
    $surgery reorder "$out/imported" "$out/only-$kind" --data "$data/train" --tokens "$tokens" --seq-len 256 --orders $kind
    score "only-$kind" "only-$kind"
done
for seed in 1 2 3 4 5; do
    $surgery reorder "$out/imported" "$out/random-$seed" --random $seed
    score "random-$seed" "random-$seed"
done

echo "== behind phase 2: without reordering, and without exits"
$surgery graft "$out/imported" "$out/grafted-as-imported" $graft
run phase-1-as-imported $phase_1 --checkpoint.init_from "$out/grafted-as-imported"
run phase-2-as-imported $phase_2 --checkpoint.init_from "$out/phase-1-as-imported/model"
run phase-2-without-exits $phase_2 --checkpoint.init_from "$out/phase-1/model" --elastic.exit_fraction 0
for name in phase-2 phase-2-as-imported phase-2-without-exits; do
    score "$name" "$name/model" --exits
done
score expanded expanded

cd "$out/scores"
compare="adamba compare-evaluations"
$compare imported.json reordered.json only-*.json random-*.json
$compare phase-2.json expanded.json phase-2-as-imported.json phase-2-without-exits.json
