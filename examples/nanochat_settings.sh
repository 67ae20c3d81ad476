# Settings and steps that nanochat_to_adamba.sh and nanochat_comparisons.sh share; sourced by both.
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=${1:-runs/nanochat-to-adamba} data=${DATA:-runs/quickstart/data} steps=${STEPS:-300}
hidden=${HIDDEN:-128} wider=${WIDER:-192} widths=${WIDTHS:-32,64,128} tokens=${CALIBRATION_TOKENS:-32768}
scored=${EVALUATION_TOKENS:-65536}
surgery="adamba surgery"
nanochat="--model.hidden_size $hidden --model.block_pattern Tx4 --model.head_dim $((hidden / 4)) --model.norm_weight false
    --model.embedding_norm true --model.rope_sign -1 --model.norm_eps 1.1920929e-7 --model.logit_softcap 15
    --data.tokenizer $data/tokenizer.model"
graft="--pattern (TTM)x2 --mamba-head-dim 32"
sandwich="--elastic.width_sampling sandwich --elastic.plans_per_step 1"
# number of steps, peak learning rate, and what else a phase needs
phase_1="$((steps / 3)) 2e-3 --train.phase 1"
phase_2="$steps 1e-3 --train.phase 2 $sandwich"
phase_3="$((steps * 2 / 3)) 1e-3 --train.phase 3 $sandwich"

# run NAME STEPS LEARNING_RATE SETTING ...: two processes; what it learned is in $out/NAME/model
run() {
    echo "== $1"
    deepspeed -q --num_gpus 2 --master_port "${MASTER_PORT:-29500}" pretrain_adamba.py --logging.run_dir "$out/$1" \
        --train.steps "$2" --optimizer.lr "$3" --optimizer.warmup_steps $(($2 / 10)) --optimizer.schedule wsd \
        --checkpoint.interval 0 --train.seq_len 256 --train.global_batch_size 16 --train.micro_batch_size 8 \
        --data.train "[$data/train]" --data.validation "[$data/validation]" --train.eval_interval $(($2 / 4)) \
        "${@:4}" ${RUN_SETTINGS:-}
}
