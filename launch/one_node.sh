#!/usr/bin/env bash
# torchrun on this machine. See --help.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/one_node.sh [--ranks N] [--logs DIR] MODULE [ARGUMENT ...]

Runs python -m MODULE on N ranks of this machine, on any free port.

  --ranks N   ranks to start (default: $OPDLM_RANKS, else the GPUs here, else 1)
  --logs DIR  one log per rank under DIR, besides the terminal (default: $OPDLM_LOGS, else none)

  launch/one_node.sh --ranks 8 megatron_opdlm.train --config configs/opdlm_8b.yaml
TEXT
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
ranks="${OPDLM_RANKS:-}" logs="${OPDLM_LOGS:-}"
while [[ $# -gt 0 ]]; do
    case "$1" in
        --ranks | --logs)
            [[ $# -ge 2 ]] || { echo "error: $1 needs a value; see --help" >&2; exit 2; }
            if [[ "$1" == --ranks ]]; then ranks="$2"; else logs="$2"; fi
            shift 2
            ;;
        -h | --help) usage; exit 0 ;;
        -*) echo "error: unknown option $1; see --help" >&2; exit 2 ;;
        *) break ;;
    esac
done
[[ $# -ge 1 ]] || { echo "error: no module to run; see --help" >&2; exit 2; }
if [[ -z "$ranks" ]]; then
    ranks=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || true
    [[ "$ranks" -ge 1 ]] || ranks=1
fi
[[ "$ranks" =~ ^[1-9][0-9]*$ ]] || {
    echo "error: --ranks $ranks: a number of ranks; use 1 or more" >&2
    exit 2
}

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python
cd "$root"
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
    ${logs:+--log-dir "$logs" --tee 3} -m "$@"
