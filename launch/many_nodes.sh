#!/usr/bin/env bash
# torchrun on many machines without a scheduler: run this on each. See --help.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/many_nodes.sh --nodes N --rendezvous HOST:PORT [--id NAME] [--ranks N]
                  [--restarts N] [--logs DIR] [--grace SECONDS] MODULE [ARGUMENT ...]

Run the same command on every node; the nodes find each other at HOST:PORT, which is a free port of
one of them.

  --nodes N               machines (default: $OPDLM_NODES)
  --rendezvous HOST:PORT  where they meet (default: $OPDLM_RENDEZVOUS)
  --id NAME               of this job at that place (default: $OPDLM_JOB, else opdlm)
  --ranks N               ranks on each machine (default: $OPDLM_RANKS, else the GPUs here, else 1)
  --restarts N            times that a failed job starts again, from its checkpoint (default: 0)
  --logs DIR              one log per rank under DIR (default: $OPDLM_LOGS, else none)
  --grace SECONDS         from SIGTERM to SIGKILL (torch 2.12 and later; see one_node.sh --help)
TEXT
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
nodes="${OPDLM_NODES:-}" rendezvous="${OPDLM_RENDEZVOUS:-}" id="${OPDLM_JOB:-opdlm}"
ranks="${OPDLM_RANKS:-}" restarts=0 logs="${OPDLM_LOGS:-}"
grace="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
while [[ $# -gt 0 ]]; do
    case "$1" in
        --nodes | --rendezvous | --id | --ranks | --restarts | --logs | --grace)
            [[ $# -ge 2 ]] || { echo "error: $1 needs a value; see --help" >&2; exit 2; }
            printf -v "${1#--}" '%s' "$2"
            shift 2
            ;;
        -h | --help) usage; exit 0 ;;
        -*) echo "error: unknown option $1; see --help" >&2; exit 2 ;;
        *) break ;;
    esac
done
[[ -n "$nodes" && -n "$rendezvous" && $# -ge 1 ]] || {
    echo "error: --nodes, --rendezvous and a module are needed; see --help" >&2
    exit 2
}
if [[ -z "$ranks" ]]; then
    ranks=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || true
    [[ "$ranks" -ge 1 ]] || ranks=1
fi
logs="${logs/#\~\//$HOME/}" # quoted, or of a variable: no shell has expanded it
refuse() { echo "error: --$1 ${!1}: a number; use $2 or more" >&2; exit 2; }
for flag in nodes ranks; do [[ "${!flag}" =~ ^[1-9][0-9]*$ ]] || refuse "$flag" 1; done
for flag in restarts grace; do [[ "${!flag}" =~ ^[0-9]+$ ]] || refuse "$flag" 0; done

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$grace" # torchrun's; older ones do not look
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python
cd "$root"
exec "$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$ranks" \
    --rdzv-backend c10d --rdzv-endpoint "$rendezvous" --rdzv-id "$id" \
    --max-restarts "$restarts" ${logs:+--log-dir "$logs" --tee 3} -m "$@"
