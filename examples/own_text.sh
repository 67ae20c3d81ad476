#!/usr/bin/env bash
# Train on texts of your own, files or folders.   [MINUTES=10] bash examples/own_text.sh FILE_OR_FOLDER ...
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: [MINUTES=10] bash examples/own_text.sh FILE_OR_FOLDER ..." >&2; exit 2; }
export PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH"
adamba train --input "$@" --minutes "${MINUTES:-10}"
