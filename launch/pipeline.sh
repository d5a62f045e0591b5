#!/usr/bin/env bash
# import -> train -> export -> evaluate -> tables, each stage once. See --help.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
python=.venv/bin/python
[[ -x "$python" ]] || python=python
exec "$python" -m launch.opdlm pipeline "$@"
