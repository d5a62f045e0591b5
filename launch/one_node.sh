#!/usr/bin/env bash
# torchrun on this machine. See --help.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/one_node.sh [--ranks N] [--logs DIR] [--grace SECONDS] MODULE [ARGUMENT ...]

Runs python -m MODULE on N ranks of this machine, on any free port.

  --ranks N   ranks to start (default: $OPDLM_RANKS, else the GPUs here, else 1)
  --logs DIR  one log per rank under DIR, besides the terminal (default: $OPDLM_LOGS, else none)
  --grace SECONDS  between SIGTERM and SIGKILL, for ranks to save and leave; torch before 2.12 knows
              only 30 (default: $TORCH_ELASTIC_SHUTDOWN_TIMEOUT, else 600)

  launch/one_node.sh --ranks 8 megatron_opdlm.train --config configs/opdlm_8b.yaml
TEXT
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
ranks="${OPDLM_RANKS:-}" logs="${OPDLM_LOGS:-}" grace="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
while [[ $# -gt 0 ]]; do
    case "$1" in
        --ranks | --logs | --grace)
            [[ $# -ge 2 ]] || { echo "error: $1 needs a value; see --help" >&2; exit 2; }
            printf -v "${1#--}" '%s' "$2"
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
logs="${logs/#\~\//$HOME/}" # quoted, or of a variable: no shell has expanded it
[[ "$ranks" =~ ^[1-9][0-9]*$ ]] || {
    echo "error: --ranks $ranks: a number of ranks; use 1 or more" >&2
    exit 2
}
[[ "$grace" =~ ^[0-9]+$ ]] || { echo "error: --grace $grace: use seconds, 0 or more" >&2; exit 2; }

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$grace" # torchrun's; older ones do not look
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python
cd "$root"
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
    ${logs:+--log-dir "$logs" --tee 3} -m "$@"
