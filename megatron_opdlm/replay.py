"""Loss and gradient norm of recorded states, without training: compares layouts, kernels and codes.

    torchrun ... -m megatron_opdlm.replay --student DIR --teacher DIR --trajectories FILE.jsonl \
        --out FILE.json [dotted.key=value ...]

A line of the input is ``{"prompt_ids": [...], "response_ids": [...], "masked": [0/1, ...]}``;
``masked`` is the noisy input as it is, blocks are counted from absolute position 0.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_opdlm import launcher
from megatron_opdlm.config import Config, load_config, path_override
from megatron_opdlm.data.rows import read_rows
from megatron_opdlm.errors import Arguments, InputError, command
from megatron_opdlm.model_files.writing import check_place


def read_states(path: Path, vocab_size: int, max_positions: int) -> list[dict[str, list[int]]]:
    """The checked rows of a trajectories file; InputError with the line of the first bad one."""
    from megatron_opdlm.run.fixed_states import checked_state

    return [
        checked_state(row.place, row.fields, vocab_size, max_positions)
        for row in read_rows(path, "--trajectories")
    ]


def replay(config: Config, trajectories: Path) -> dict[str, Any]:
    """Loss of fixed states under ``config``'s loss and layout; the same on every rank."""
    from megatron_opdlm.run import build
    from megatron_opdlm.run.fixed_states import measure_states

    student_source, teacher_source = build.open_pair(config)
    shape = student_source.shape
    rows = read_states(trajectories, shape.vocab_size, shape.max_positions)
    return measure_states(config, student_source, teacher_source, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, compute, write ``--out`` whole or not at all."""
    parser = Arguments(description=__doc__)
    parser.add_argument(
        "--student", required=True, type=Path, help="HF directory or Megatron checkpoint"
    )
    parser.add_argument(
        "--teacher", required=True, type=Path, help="HF directory or Megatron checkpoint"
    )
    parser.add_argument("--trajectories", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json")
    parser.add_argument("--config", type=Path, help="YAML recipe whose model, loss and layout hold")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    options = parser.parse_args(arguments)
    paths = [
        path_override("model.path", options.student),
        path_override("teacher.path", options.teacher),
    ]
    config = load_config(options.config, [*options.overrides, *paths])
    if options.out.is_dir():
        raise InputError(f"--out={options.out} is a directory; name a file")
    check_place(options.out, f"--out={options.out}")
    result = replay(config, options.trajectories)
    if launcher.rank() == 0:
        from megatron_opdlm.model_files.writing import write_text

        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, json.dumps(result) + "\n")
        print(f"replay: loss {result['loss']:.6f}, grad norm {result['grad_norm']:.6f}")


if __name__ == "__main__":
    command(main)
