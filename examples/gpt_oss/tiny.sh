#!/usr/bin/env bash
# The road of this folder on a laptop's CPU, in minutes: a tiny GPT-OSS is trained, published as transformers would have
# it, and goes through the very scripts that take the real one. Needs the quickstart's data (make quickstart, or
# bash examples/quickstart_data.sh).
#   bash examples/gpt_oss/tiny.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=${1:-runs/gpt-oss-tiny} data=${DATA:-runs/quickstart/data} steps=${STEPS:-200}
settings="--train.steps $steps --optimizer.warmup_steps $((steps / 10))"
small="$settings --train.seq_len 256 --train.global_batch_size 8 --train.micro_batch_size 4"

deepspeed -q --num_gpus 2 --master_port "${MASTER_PORT:-29500}" pretrain_adamba.py --preset gpt-oss-tiny \
    --parallel.ep 2 $settings ${MODEL_SETTINGS:-} --data.tokenizer "$data/tokenizer.model" \
    --data.train "[$data/train]" --data.validation "[$data/validation]" --logging.run_dir "$out/pretrained"
adamba surgery export hf "$out/pretrained/model" "$out/published"

bash examples/gpt_oss/import.sh "$out/published" "$out/imported" --widths "${WIDTHS:-32,64,128,256}" \
    --tokenizer "$data/tokenizer.model"
bash examples/gpt_oss/graft.sh "$out/imported" "$out/hybrid" --pattern "(EEM)x2" --mamba-head-dim 32
small="$small --checkpoint.interval $steps --train.activation_checkpointing false ${RUN_SETTINGS:-}"
RANKS=2 bash examples/gpt_oss/phase.sh 1 "$out/hybrid" "$data" "$out/phase1" $small
RANKS=2 bash examples/gpt_oss/phase.sh 2 "$out/phase1/model" "$data" "$out/phase2" $small --optimizer.lr 0.001
adamba generate --model "$out/phase2/model" --prompt "def " --max-new-tokens 40
