#!/usr/bin/env bash
# Creates .venv and installs the project with pinned dependencies. See --help.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
environment="$root/launch/environment.py"
record="$venv/.setup" # written by a finished set-up: mode, directory, fingerprint
unfinished="$venv/.setup-unfinished"
log="$venv/setup.log"

usage() {
    cat <<'TEXT'
usage: launch/setup.sh [--gpu] [--python PATH]

Creates .venv in the repository and installs the project and everything it needs, at the versions of
launch/constraints.txt. Safe to run again: does nothing when all is up to date, repairs what is broken.

  --gpu          inside an NGC PyTorch container: keep the container's PyTorch and Transformer Engine
  --python PATH  the Python 3.11 or 3.12 to build on (default: the first that works on PATH)
  --help         this text

Environment:
  OPDLM_PYTHON     same as --python
  TORCH_INDEX_URL  where to take PyTorch from; https://download.pytorch.org/whl/cpu is much smaller
                   than the default on machines without a GPU
TEXT
}

say() { echo "setup: $*"; }

die() { # die MESSAGE [EXIT_CODE]
    echo "error: $1" >&2
    exit "${2:-1}"
}

parse_arguments() {
    mode=""
    chosen="${OPDLM_PYTHON:-}"
    while (($#)); do
        case "$1" in
            --gpu) mode=gpu ;;
            --python)
                (($# > 1)) || die "--python needs a PATH; see launch/setup.sh --help" 2
                chosen="$2"
                shift
                ;;
            -h | --help)
                usage
                exit 0
                ;;
            *) die "unknown argument '$1'; use --gpu, --python PATH or --help" 2 ;;
        esac
        shift
    done
}

# A Python that we can build on. A name on PATH may be a shim that fails, so it has to run.
suitable() {
    local needs="sys, venv, ensurepip"
    [[ "$mode" == gpu ]] && needs="sys, venv, pip, torch"
    "$1" -c "import $needs; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))" \
        </dev/null >/dev/null 2>&1
}

find_python() {
    if [[ -n "$chosen" ]]; then
        suitable "$chosen" || die "--python $chosen is not a working Python 3.11 or 3.12 $requirement" 2
        echo "$chosen"
        return
    fi
    local names=(python3.11 python3.12 python3 python) name path
    [[ "$mode" == gpu ]] && names=(python3 python python3.12 python3.11)
    for name in "${names[@]}"; do
        while IFS= read -r path; do
            [[ "$path" == "$venv"/* ]] && continue
            if suitable "$path"; then
                echo "$path"
                return
            fi
        done < <(type -aP "$name" || true)
    done
    die "no working Python 3.11 or 3.12 $requirement on PATH; install one, or name it with --python PATH" 2
}

recorded() { # recorded LINE_NUMBER
    [[ -f "$record" ]] && sed -n "${1}p" "$record"
}

in_venv() { "$venv/bin/python" "$@"; }

# The existing .venv is whole and ours: worth building on.
reusable() {
    [[ -x "$venv/bin/python" && ! -e "$unfinished" ]] || return 1
    [[ "$(recorded 1 || echo "$mode")" == "$mode" && "$(recorded 2 || echo "$root")" == "$root" ]] || return 1
    in_venv -c 'import sys, pip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
        >/dev/null 2>&1 || return 1
    if [[ -n "$chosen" ]]; then
        local version='import sys; print(sys.version)'
        [[ "$(in_venv -c "$version")" == "$("$chosen" -c "$version")" ]] || return 1
    fi
    in_venv "$environment" damage >/dev/null 2>&1
}

up_to_date() {
    [[ "$(recorded 3)" == "$(in_venv "$environment" fingerprint --mode "$mode")" ]] &&
        in_venv "$environment" drift --constraints "$venv/constraints.txt" >/dev/null 2>&1
}

create() {
    local python
    python="$(find_python)"
    say "creating .venv with $("$python" --version) ($python)"
    rm -rf "$venv"
    local options=()
    [[ "$mode" == gpu ]] && options=(--system-site-packages --without-pip)
    "$python" -m venv "${options[@]+"${options[@]}"}" "$venv" >/dev/null ||
        die "$python could not create $venv; see whether the disk is full and the directory writable"
}

pip_install() { # pip_install WHAT ARGUMENT...
    local what="$1"
    shift
    say "installing $what"
    env -u PIP_CONSTRAINT -u PIP_USER -u PIP_TARGET -u PIP_PREFIX \
        "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" >>"$log" 2>&1 ||
        die "installing $what failed: $(grep -i '^error' "$log" | tail -n 1 | cut -c 1-300) (all of it in $log)"
}

install() {
    : >"$unfinished"
    : >"$log"
    in_venv "$environment" constraints --mode "$mode" >"$venv/constraints.txt"
    local extras="evaluation,lm-eval,quantization,tracking,dev"
    pip_install "the build tool" --constraint "$venv/constraints.txt" setuptools
    if [[ "$mode" == gpu ]]; then
        extras="gpu,$extras"
    else
        local index=()
        [[ -n "${TORCH_INDEX_URL:-}" ]] && index=(--index-url "$TORCH_INDEX_URL")
        pip_install "PyTorch, alone" --no-deps "${index[@]+"${index[@]}"}" \
            --requirement "$root/launch/torch-cpu.txt"
    fi
    pip_install "the project [$extras] and its dependencies" --no-build-isolation \
        --constraint "$venv/constraints.txt" --editable "${root}[$extras]"
    pip_install "scorers, alone" --no-deps --constraint "$venv/constraints.txt" \
        --requirement "$root/launch/scorers.txt"
    in_venv "$environment" torchrun
    verify
}

verify() {
    local problem
    problem="$(in_venv "$environment" drift --constraints "$venv/constraints.txt" 2>&1)" ||
        die "the environment is not the pinned one: $problem; remove .venv and run launch/setup.sh again"
    problem="$(in_venv -c 'import torch, megatron.core, transformers, datasets, omegaconf' 2>&1)" ||
        die "the new environment does not work: $(tail -n 1 <<<"$problem")"
    printf '%s\n' "$mode" "$root" "$(in_venv "$environment" fingerprint --mode "$mode")" >"$record"
    rm "$unfinished"
}

main() {
    parse_arguments "$@"
    # One set-up at a time: the lock is held on this script and ends with the process.
    exec 9<"${BASH_SOURCE[0]}"
    if command -v flock >/dev/null; then flock 9; fi
    # Without --gpu, an environment that was made with it stays as it is.
    mode="${mode:-$(recorded 1 || echo cpu)}"
    requirement="with venv and ensurepip"
    [[ "$mode" == gpu ]] && requirement="with PyTorch and pip"
    if ! reusable; then
        create
    elif up_to_date; then
        say ".venv is up to date"
        return
    fi
    install
    say "done: $(in_venv -c 'import sys, torch; print("Python", sys.version.split()[0], "with PyTorch", torch.__version__)')"
}

main "$@"
