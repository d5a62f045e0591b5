#!/usr/bin/env bash
# All checks of the project: environment, style, types, tests. See --help.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    cat <<'TEXT'
usage: tests/run.sh [PYTEST ARGUMENT ...]

Sets the environment up (launch/setup.sh), then runs ruff, pyright and the tests that need neither a
GPU nor more than a minute each. Arguments go to pytest: tests/run.sh tests/unit -k config
TEXT
    exit 0
fi

launch/setup.sh

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1

.venv/bin/ruff check .
.venv/bin/ruff format --check .

# The types are checked beside the tests' first half minute: alone, it would leave cores idle.
types=$(mktemp)
.venv/bin/pyright >"$types" 2>&1 &
pyright=$!
trap 'kill "$pyright" 2>/dev/null || true; rm -f "$types"' EXIT

# One worker a core, a file stays with one worker: tests of a file share models and running ranks.
# Files run in the order of testpaths (pyproject.toml), the long ones first.
code=0
.venv/bin/python -m pytest -m "not slow and not gpu" --timeout 300 \
    --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@" || code=$?

wait "$pyright" || code=1
cat "$types"
exit "$code"
