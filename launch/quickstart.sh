#!/usr/bin/env bash
# Fresh machine -> environment -> tiny teacher -> import -> train -> export -> evaluate -> report.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

case " $* " in
    *" --help "* | *" -h "*)
        cat <<'TEXT'
usage: launch/quickstart.sh [--out DIR] [--layout dp2|tp2] [--seed N]
                            [--hf DIR [--data FILE] [--test FILE.jsonl]] [--config FILE]
                            [--mask-token-id N] [key=value ...]

Sets the environment up (launch/setup.sh), then, on two processes of this machine's CPU:
  a) trains a tiny Qwen3 that adds numbers step by step and saves it as a Hugging Face directory
  b) imports it into a Megatron checkpoint
  c) turns it into a block-diffusion model by on-policy distillation
  d) kills that run on the way and resumes it with the same command
  e) exports the student to Hugging Face
  f) evaluates teacher, untrained student and student at several decoding speeds
  g) writes report.md, report.json and plots, and prints the table

  --out DIR       where everything goes; must be new (default: runs/quickstart, then -2, -3, ...)
  --layout NAME   dp2: two replicas (default); tp2: one replica split over both processes
  --seed N        seed of teacher, training and everything drawn (default 0)
  --hf DIR        your own model directory instead of the toy teacher
  --data FILE     with --hf: your training prompts (JSONL, JSON, Parquet; default: the toy questions)
  --test FILE     with --hf: your held-out rows {"question": ..., "answer": ...}, exact match
  --config FILE   training configuration (default: configs/tiny_cpu.yaml)
  --mask-token-id N   with --hf: an unused id, where the tokenizer has no mask token and no room
                  for 151669
  key=value       training configuration, e.g. optimizer.lr=1e-5 rollout.max_new_tokens=256
TEXT
        exit 0
        ;;
esac

start=$(date +%s)
"$root/launch/setup.sh"
export OPDLM_SETUP_SECONDS=$(($(date +%s) - start))
cd "$root"
exec .venv/bin/python -m launch.opdlm quickstart "$@"
