#!/usr/bin/env bash
# Make .venv: `tools/setup.sh` for running, `tools/setup.sh test` with the test oracles too. Does nothing when up to date.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:-run}
venv=.venv
stamp=$venv/.stamp-$kind
wanted=$(cat pyproject.toml requirements/*.txt tools/setup.sh | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi
[ -x $venv/bin/python ] || ${PYTHON:-python3} -m venv $venv
pip() { $venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }

echo "setting up $venv ($kind)"
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    grep -v '^torch==' requirements/cpu.txt > $venv/requirements-gpu.txt
    pip install torch
    pip install -r $venv/requirements-gpu.txt
else
    pip install "$(grep '^torch==' requirements/cpu.txt)"
    pip install -r requirements/cpu.txt
fi
if [ "$kind" = test ]; then
    pip install -r requirements/test.txt
    MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
        pip install --no-build-isolation --no-deps -r requirements/test-no-deps.txt
fi
# the build backend warns about every editable install; its words matter only when it fails
pip install --no-build-isolation --no-deps --editable . > $venv/editable.log 2>&1 || { cat $venv/editable.log; exit 1; }
echo "$wanted" > "$stamp"
