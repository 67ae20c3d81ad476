#!/usr/bin/env bash
# Run the tests: all but the slow ones, with --slow those alone, with --all everything. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
marks=(-m "not slow")
case "${1:-}" in
--all) marks=() && shift ;;
--slow) marks=(-m slow) && shift ;;
esac
# a file's tests share their process groups, so files are what two processes deal out between them, in the order in
# which tests/conftest.py puts them
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "${marks[@]}" "$@"
