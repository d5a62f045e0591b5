#!/usr/bin/env bash
# One rank of launch/slurm.sbatch: Slurm's numbers under torch's names, a log of its own.
set -euo pipefail

export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
export LOCAL_WORLD_SIZE="${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
cd "$OPDLM_ROOT"
python="$OPDLM_ROOT/.venv/bin/python"
# A host's environment is not the image's, even where both see its directory.
[[ -x "$python" && -z "${OPDLM_IMAGE:-}" ]] || python=python
log="$OPDLM_LOGS_OF_JOB/rank_$(printf '%05d' "$RANK").log"
if [[ "$RANK" == 0 ]]; then # also what Slurm's own output shows; tee outlives the signals
    exec "$python" -m "$@" > >(trap '' USR1 TERM INT && exec tee -a "$log") 2>&1
fi
exec "$python" -m "$@" >>"$log" 2>&1
