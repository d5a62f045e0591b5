#!/usr/bin/env bash
# One command from nothing to the report; run.sh --help has its options. The same command goes on.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
"$root/launch/setup.sh"
cd "$root"
exec .venv/bin/python -m examples.smollm2.run "$@"
