#!/usr/bin/env bash
# Train on text of your own: a folder, .txt or .jsonl files.   bash examples/own_text.sh FILE_OR_FOLDER ...
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: bash examples/own_text.sh FILE_OR_FOLDER ..." >&2; exit 2; }
inputs=$(for path in "$@"; do realpath -- "$path"; done)
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
data=runs/own/data
mapfile -t inputs <<< "$inputs"

adamba tokenizer --input "${inputs[@]}" --vocab-size "${VOCAB_SIZE:-4096}" --output $data/tokenizer.model
adamba data --input "${inputs[@]}" --tokenizer $data/tokenizer.model --output $data --split
# examples/own_text.yaml resumes: started again, an interrupted run goes on
deepspeed -q --num_gpus "${RANKS:-1}" pretrain_adamba.py --config examples/own_text.yaml
adamba generate --model runs/own/model --mode think --prompt "The "
