#!/usr/bin/env bash
# All tests, on a CPU, from nothing: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/venv.sh
python -m pytest tests -q --durations=10 "$@"
