#!/usr/bin/env bash
# All tests, on a CPU, from nothing: bash tests/run.sh [pytest arguments]. Two files at a time, each on one core.
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/venv.sh
ruff check .
ruff format --check .
python -m pytest tests -q -n 2 --dist loadfile --durations=15 "$@"
