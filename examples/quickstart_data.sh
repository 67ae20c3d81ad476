#!/usr/bin/env bash
# The quickstart's text: the standard library of the Python at hand, as token ids. Writes runs/quickstart/data.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
data=runs/quickstart/data

adamba tokenizer --input python-stdlib --vocab-size 4096 --output $data/tokenizer.model
adamba data --input python-stdlib --tokenizer $data/tokenizer.model --output $data --split --workers 2
