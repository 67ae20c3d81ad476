# For other scripts to source: how many processes a small run takes on this machine, and what stands before `deepspeed`.
ranks=2
threads=
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    ranks=$(nvidia-smi --list-gpus | wc -l)
    [ "$ranks" -le 2 ] || ranks=2
else
    # the cores are shared by the two ranks; left alone, each would take them all
    threads="env DS_ACCELERATOR=cpu OMP_NUM_THREADS=$(( ($(nproc) + 1) / 2 ))"
fi
